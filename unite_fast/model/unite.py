"""UNITE: the Generative Encoder, the decoder and the latent LayerNorm, with the three operations users call.

Shape letters: B batch, K registers, C latent dim, D encoder width, M patches, Q channels, S image size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from unite_fast.base.errors import UserError
from unite_fast.config import ModelConfig
from unite_fast.layers import Linear, adamw_parameter, sincos_1d, use_adamw
from unite_fast.layers.vit import Decoder
from unite_fast.model.encoder import GenerativeEncoder
from unite_kernels import corruption
from unite_kernels.backend import obstacle

TOKENIZE_SEED = 0  # of the registers' noise when a caller of tokenize() gives none
TOKENIZE_T_MAX = 0.01
FORWARDS = ("tokenize", "denoise_raw", "denoise", "normalise", "decode")  # what callers use in place of forward()


class Projection(nn.Module):
    def __init__(self, channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(channels, width, patch_size, stride=patch_size)


class ImagePatches(nn.Module):
    """Images (B, Q, S, S) -> patch tokens (B, M, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, count = config.encoder.width, (config.image_size // config.patch_size) ** 2
        table = torch.zeros(1, count + 1, width)
        learned = config.patch_positions == "learned"
        if learned:
            nn.init.normal_(table, std=0.5)
        # Row 0 belongs to a class token that the published model does not use.
        self.position_embeddings = nn.Parameter(table, requires_grad=learned)
        self.patch_embeddings = Projection(config.channels, width, config.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.patch_embeddings.projection(images).flatten(2).transpose(1, 2) + self.position_embeddings[:, 1:]


class UNITE(nn.Module):
    """The whole model (arXiv 2603.22283, section 3). ``null_class`` is the label of classifier-free guidance."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.null_class = config.num_classes
        side = config.image_size // config.patch_size
        width = config.encoder.width
        positions = sincos_1d(torch.arange(config.num_latents), width).float()[None]
        self.latent_tokens = adamw_parameter(positions)
        if config.separate_denoiser:
            self.latent_tokens_denoiser = adamw_parameter(positions.clone())
        self.patch_embed = use_adamw(ImagePatches(config))
        self.encoder = self._generative_encoder()
        if config.separate_denoiser:
            self.denoiser = self._generative_encoder()
            self.denoiser.load_state_dict(self.encoder.state_dict())
        self.encoder_layer_norm = nn.LayerNorm(config.latent_dim, eps=1e-5)
        self.decoder = Decoder(config.decoder, config.num_latents, side, config.patch_size, config.channels)
        self.up_sample_decoder = Linear(config.latent_dim, config.decoder.in_features)

    def _generative_encoder(self) -> GenerativeEncoder:
        c = self.config
        return GenerativeEncoder(
            c.encoder, c.latent_dim, c.num_classes, c.num_latents + (c.image_size // c.patch_size) ** 2
        )

    def encoders(self) -> list[GenerativeEncoder]:
        """The Generative Encoder, and the denoiser where it has its own weights."""
        return [self.encoder, self.denoiser] if self.config.separate_denoiser else [self.encoder]

    def shard_units(self) -> list[list[nn.Module]]:
        """Modules whose parameters a pass needs at the same time, those within others first (``parallel.sharding``).

        An encoder computes the modulations of all blocks first and reads their norms from outside the blocks.
        """
        units: list[list[nn.Module]] = []
        for encoder in self.encoders():
            blocks: list[Any] = list(encoder.blocks)
            units += [[part] for block in blocks for part in (block.adaLN_modulation[1], block.attn, block.mlp)]
            units.append([encoder])
        return [*units, *([layer] for layer in self.decoder.decoder_layers), [self.decoder]]

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(K, C)."""
        return self.config.num_latents, self.config.latent_dim

    @property
    def time_shift(self) -> float:
        """The resolution shift a of t' = a t / (1 + (a - 1) t), for training times and for the sampler's grid."""
        mode = self.config.time_shift
        if isinstance(mode, str):
            k, c = self.latent_shape
            return math.sqrt({"total": k * c, "channels": c, "tokens": k}[mode] / 4096)
        return mode

    def use_kernels(self, backend: str) -> None:
        """The implementation of the encoder's fused operations: "eager" or "fused" (``efficiency.kernels``).

        The model is where it will run. Raises UserError when the implementation cannot run there.
        """
        device = self.latent_tokens.device
        if device.type != "meta" and (why := obstacle(backend, device)):
            raise UserError(f"kernels={backend}: {why}; or choose kernels=eager")
        for encoder in self.encoders():
            encoder.backend = backend

    def normalise(self, latents: Tensor) -> Tensor:
        """The latent LayerNorm: (B, K, C) -> (B, K, C)."""
        return self.encoder_layer_norm(latents)

    def tokenize(self, images: Tensor, noise: Tensor | None = None, t: Tensor | None = None) -> Tensor:
        """Images (B, Q, S, S) in [0, 1] -> normalised latents (B, K, C).

        noise: the registers' input (B, K, C); t: their times (B,) in [0, 0.01]. When either is None it is
        drawn from a fixed seed by place in the batch, so equal batches give equal latents.
        """
        b = len(images)
        if noise is None or t is None:
            places = torch.arange(b, device=images.device)
            drawn = corruption.draw_tokenizer(TOKENIZE_SEED, places, self.latent_shape, TOKENIZE_T_MAX)
            noise, t = drawn[0] if noise is None else noise, drawn[1] if t is None else t
        labels = torch.full((b,), self.null_class, device=images.device)
        patches = self.patch_embed(images)
        return self.normalise(self.encoder(noise, t, labels, self.latent_tokens, patches))

    def denoise_raw(self, zt: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """As ``denoise``, before the latent LayerNorm."""
        if self.config.separate_denoiser:
            return self.denoiser(zt, t, labels, self.latent_tokens_denoiser)
        return self.encoder(zt, t, labels, self.latent_tokens)

    def denoise(self, zt: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Noised latents (B, K, C), times (B,), labels int64 (B,) -> predicted clean normalised latents (B, K, C)."""
        return self.normalise(self.denoise_raw(zt, t, labels))

    def decode(self, z: Tensor) -> Tensor:
        """Normalised latents (B, K, C) -> images (B, Q, S, S), nominally in [0, 1], not clamped."""
        return self.decoder(self.up_sample_decoder(z))

    def trainable_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


def build(config: ModelConfig, seed: int = 0, device: torch.device | str = "cpu") -> UNITE:
    """A freshly initialised model; the weights depend on ``seed`` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = UNITE(config)
    return model.to(device)
