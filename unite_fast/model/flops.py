"""Floating-point operations of a training step, counted from sizes; utilisation against a device's peak.

A multiply-add is 2 operations; only matrix products and convolutions count. Backward costs one product for each
operand that needs a gradient; inputs (pixels, noise) need none. The model's operations by definition are what
utilisation (MFU) counts; what is executed is less, since the encoder's last block computes the kept rows alone, and
more where activations are recomputed.
"""

from __future__ import annotations

import torch

from unite_fast import modality
from unite_fast.config import ModelConfig

# Dense bf16 peak in TFLOP/s from the vendor's data sheets (half of their figure with sparsity), the longer name first.
PEAK_BF16 = {
    "GB200": 2500, "B200": 2250, "GH200": 989, "H200 NVL": 835, "H200": 989, "H100 NVL": 835, "H100 PCIe": 756,
    "H100": 989, "H800": 989, "H20": 148, "A100": 312, "A800": 312, "L40S": 362, "L40": 181, "L4": 121,
}  # fmt: skip


def encoder_forward(model: ModelConfig, tokens: int, pruned: bool = False) -> float:
    """One pass of the Generative Encoder over ``tokens`` tokens (before the class tokens), FLOPs per image.

    pruned: as executed, the last block's queries, projection and MLP for the registers alone.
    """
    e = model.encoder
    d, hidden = e.width, int(2 / 3 * e.mlp_ratio * e.width)
    per_token = 2 * (4 * d * d + 3 * d * hidden)  # qkv and projection, SwiGLU
    total = 0.0
    for block in range(e.depth):
        t = tokens + (e.in_context_len if block >= e.in_context_start else 0)
        if pruned and block == e.depth - 1:
            unpruned_queries = (t - model.num_latents) * 2 * d * d if e.heads % 2 else 0
            keys_values = t * 4 * d * d
            total += model.num_latents * (per_token - 4 * d * d + 4 * t * d) + keys_values + unpruned_queries
        else:
            total += t * per_token + 4 * t * t * d
        total += 2 * 6 * d * d
    total += 2 * model.num_latents * model.latent_dim * d * 2 + 2 * 2 * d * d  # registers in, latents out, final adaLN
    return total + 2 * (512 * d + d * d)  # time MLP


def decoder_forward(model: ModelConfig) -> float:
    """One pass of the decoder, FLOPs per image."""
    d = model.decoder
    tokens = modality.of(model).decoder_tokens(model)
    layer = tokens * 2 * (4 * d.width**2 + 2 * d.width * d.mlp_hidden) + 4 * tokens**2 * d.width
    embed = 2 * model.num_latents * (model.latent_dim * d.in_features + d.in_features * d.width)
    return embed + d.depth * layer + 2 * d.width * modality.of(model).outputs(model)


def attentions(model: ModelConfig) -> list[tuple[int, int, int]]:
    """(keys, heads, head size) of every attention of a training step, without repetition."""
    e, d, of = model.encoder, model.decoder, modality.of(model)
    passes = (model.num_latents, model.num_latents + of.context_tokens(model))
    found = {(n + c, e.heads, e.width // e.heads) for n in passes for c in (0, e.in_context_len)}
    return sorted(found | {(of.decoder_tokens(model), d.heads, d.width // d.heads)})


def denoiser_flops(model: ModelConfig) -> float:
    """FLOPs of one forward pass of the denoiser, of one sample."""
    return encoder_forward(model, model.num_latents)


def sampling_flops(model: ModelConfig, passes: float) -> float:
    """FLOPs of one sampled image: ``passes`` of the denoiser, as counted, and the decoder."""
    return passes * denoiser_flops(model) + decoder_forward(model)


def training_flops(model: ModelConfig, flow_steps: int, perceptual: bool, pruned: bool = False) -> dict[str, float]:
    """FLOPs per image and part, forward and backward: tokenize, flow, decode, perceptual, total.

    By definition of the model; with ``pruned`` as executed without recomputation.
    """
    e, of = model.encoder, modality.of(model)
    registers_in = 2 * model.num_latents * model.latent_dim * e.width
    no_gradient = registers_in + 2 * 512 * e.width  # the inputs of these products need no gradient
    tokenize = (
        3 * encoder_forward(model, model.num_latents + of.context_tokens(model), pruned)
        - no_gradient
        + of.embedding_flops(model)
    )
    flow = 3 * encoder_forward(model, model.num_latents, pruned) - no_gradient
    parts: dict[str, float] = {
        "tokenize": tokenize,
        "flow": flow * flow_steps,
        "decode": 3 * decoder_forward(model),
        "perceptual": of.perceptual_flops(model) if perceptual else 0.0,
    }
    return parts | {"total": sum(parts.values())}


def peak_of(name: str) -> float | None:
    """The dense bf16 peak in FLOP/s of a device of this name, where the table knows it."""
    return next((peak * 1e12 for key, peak in PEAK_BF16.items() if key in name), None)


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak in FLOP/s where the table knows it."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
