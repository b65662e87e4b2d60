"""examples/minimal.py, the method on one page, takes the steps that the package takes."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from support import ROOT
from torch import Tensor

from unite_fast import data
from unite_fast.config import yaml_text
from unite_fast.objective import Draws, Objective
from unite_fast.parallel.distributed import Ranks
from unite_fast.run import assemble
from unite_fast.training.step import TrainStep

# Names of the package, which are those of the published checkpoints, and of the page. A dot at the end: what is within.
NAMES = {
    "latent_tokens": "registers",
    "patch_embed.patch_embeddings.projection.": "patches.",
    "encoder.in_context_posemb": "class_token",
    "encoder.up_sample.": "latents_in.",
    "encoder.t_embedder.W": "frequencies",
    "encoder.t_embedder.mlp.": "time.",
    "encoder.y_embedder.embedding_table.": "labels.",
    "encoder.final_layer.norm_final.": "last_norm.",
    "encoder.final_layer.adaLN_modulation.1.": "last_modulation.",
    "encoder.final_layer.linear.": "latents_out.",
    "encoder.blocks.": "blocks.",
    "encoder_layer_norm.": "latent_norm.",
    "up_sample_decoder.": "decoder_in.",
    "decoder.trainable_cls_token": "cls",
    "decoder.decoder_embed.": "decoder_embed.",
    "decoder.decoder_norm.": "decoder_norm.",
    "decoder.decoder_pred.": "pixels.",
    "decoder.decoder_layers.": "layers.",
}
WITHIN = {
    "attn.q_norm": "q_norm", "attn.k_norm": "k_norm", "attn.qkv": "qkv", "attn.proj": "proj", "mlp.w12": "up",
    "mlp.w3": "down", "adaLN_modulation.1": "modulation", "layernorm_before": "norm1", "layernorm_after": "norm2",
    "qkv.": "self_attn.in_proj_", "attn_proj": "self_attn.out_proj", "ffn_up": "linear1", "ffn_down": "linear2",
}  # fmt: skip
UNUSED = {"patch_embed.position_embeddings", "encoder.t_embedder.special_time_emb"}


def renamed(name: str) -> str:
    old = next(old for old in sorted(NAMES, key=len, reverse=True) if name.startswith(old))
    rest = name.removeprefix(old)
    if old in ("encoder.blocks.", "decoder.decoder_layers."):
        number, part = rest.split(".", 1)
        inner = next((k for k in WITHIN if part.startswith(k) and (k != "qkv." or old.startswith("decoder"))), "")
        rest = f"{number}.{WITHIN.get(inner, '')}{part.removeprefix(inner)}"
    return NAMES[old] + rest


def weights(values: dict[str, Tensor], page: dict[str, Tensor]) -> dict[str, Tensor]:
    """The package's, as the page's state dict."""
    found = {renamed(k): v for k, v in values.items() if k not in UNUSED}
    return {name: found[name].reshape(value.shape).clone() if name in found else value for name, value in page.items()}


@pytest.fixture(scope="module")
def page():
    spec = importlib.util.spec_from_file_location("minimal", ROOT / "examples" / "minimal.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_one_page():
    assert len((ROOT / "examples" / "minimal.py").read_text().splitlines()) <= 150


def test_the_page_takes_the_steps_of_the_package(page):
    """Three steps of configs/digits.yaml, behind the warm-up: losses, weights and the moving average.

    Muon's iteration in bfloat16 makes 0.2 % of a matrix out of rounding errors of its gradient.
    """
    config = yaml_text.load(
        ROOT / "configs" / "digits.yaml", ["optim.newton_schulz_dtype=bf16", "efficiency.kernels=fused"]
    )
    ranks, o = Ranks(0, 1, torch.device("cpu")), config.objective
    state = assemble.fresh_state(config, ranks)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # gates begin at 0 and would hide the blocks
        for p in state.optimizer.parameters.values():
            p.add_(torch.randn(p.shape, generator=generator) * 0.05)
        for name, mean in state.optimizer.ema.items():
            mean.copy_(state.optimizer.parameters[name])
    state.model.train()
    state.images_seen = 320 * config.train.global_batch
    step = TrainStep(state, config, ranks, (32, 1), 1497, Objective.open(config.model, o, config.efficiency))
    model = page.Unite()
    model.load_state_dict(weights(state.model.state_dict(), model.state_dict()))
    average, both = copy.deepcopy(model), page.optimizers(model, 1.0)
    source = data.open_source(config.data, config.model)
    batches = data.stream(source, config.seed, state.images_seen, config.train.global_batch)
    for number in range(3):
        batch = next(batches)
        d = Draws.make(state.model, o, config.seed, batch.samples)
        drawn = {
            "register_noise": d.tokenize_noise, "register_t": d.tokenize_t, "noised": d.noising_mask,
            "noised_t": d.noising_t, "noise": d.noising_noise, "flow_t": d.flow_t, "flow_noise": d.flow_noise,
            "dropped": d.flow_class_dropped,
        }  # fmt: skip
        assert drawn.keys() == page.draw(2).keys()
        for optimizer in both:
            optimizer.param_groups[0]["lr"] = step.lr(state.images_seen)
        metrics = step(batch)
        losses = page.step(model, average, both, batch.images, batch.labels, drawn)
        for name, value in zip(("l2", "flow", "total"), losses, strict=True):
            assert float(metrics[name]) == pytest.approx(value, rel=5e-4 if number else 1e-6), name
    for one, values in ((model, state.optimizer.parameters), (average, state.optimizer.ema)):
        known = {name: p.detach() for name, p in one.named_parameters()}
        expected = weights({k: v.detach() for k, v in values.items()}, known)
        assert len(known) == len(values) - 1
        for name, p in known.items():
            assert float((p - expected[name]).norm() / expected[name].norm()) < 5e-3, name
