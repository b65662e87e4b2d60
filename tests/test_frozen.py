"""optim.frozen: parameters that are not trained cost no gradients, no optimizer state and no products."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from stepping import load_tiny, trainer
from support import command

from unite_fast.base.errors import UserError
from unite_fast.checkpoint import read
from unite_fast.config import DECODER_SIZES, ENCODER_SIZES, ModelConfig, ObjectiveConfig
from unite_fast.modality import MODALITIES
from unite_fast.model.flops import training_flops
from unite_fast.model.unite import build
from unite_fast.optim.groups import freeze
from unite_fast.plan import cost
from unite_kernels import copied_linear

ALL_BUT_THE_DECODER = "optim.frozen=[encoder, encoder_layer_norm, latent_tokens, patch_embed]"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_frozen_weights_stay_and_the_others_learn(precision, monkeypatch):
    """The gradients of weights in low precision are asked for by name: those of frozen layers are never computed."""
    shapes, original = [], copied_linear._layer_weight_gradient
    monkeypatch.setattr(
        copied_linear, "_layer_weight_gradient", lambda *a: (shapes.append(tuple(a[4])), original(*a))[1]
    )
    step, batch = trainer(f"efficiency.precision={precision}", "optim.warmup_epochs=0", "optim.frozen=[decoder]")
    before = {n: p.detach().clone() for n, p in step.state.model.named_parameters()}
    for _ in range(3):  # the first moves the last layer alone, which begins with zeros
        step(batch())
    for name, parameter in step.state.model.named_parameters():
        if name.startswith("decoder."):
            assert torch.equal(parameter, before[name]), name
            assert name not in step.state.optimizer.parameters
    moved = [n for n, p in step.state.optimizer.parameters.items() if not torch.equal(before[n], p)]
    assert len(moved) > 20
    assert not any(".decoder." in f".{name}." for name in step.state.optimizer.state_dict())
    decoders = {tuple(p.shape) for n, p in before.items() if n.startswith("decoder.decoder_layers") and p.ndim == 2}
    encoders = {tuple(p.shape) for n, p in before.items() if n.startswith("encoder.") and p.ndim == 2}
    assert not (decoders - encoders) & set(shapes)
    assert bool(shapes) == (precision != "fp32")


@pytest.mark.parametrize("graphs", ["none", "step"])
def test_the_decoder_alone(graphs, monkeypatch):
    """The flow's passes then have nothing to learn, and their losses are told all the same."""
    from tape import Tape

    from unite_fast.efficiency import graph

    monkeypatch.setitem(graph.RECORDINGS, "cpu", Tape)
    step, batch = trainer(ALL_BUT_THE_DECODER, f"efficiency.cuda_graph={graphs}", "optim.warmup_epochs=0")
    rows = [step(batch()) for _ in range(5)]
    assert all(row["flow"].isfinite() for row in rows)
    assert rows[-1]["total"] < rows[0]["total"]
    assert {n.split(".")[0] for n in step.state.optimizer.parameters} == {"decoder", "up_sample_decoder"}


def test_a_prefix_that_fits_nothing():
    model = build(load_tiny().model)
    with pytest.raises(UserError, match=r"optim\.frozen: no parameter's name begins with enc; .* parts are .*encoder"):
        freeze(model, ["enc"])
    with pytest.raises(UserError, match="no parameter to train"):
        freeze(model, [name for name, _ in model.named_children()] + ["latent_tokens"])


def test_a_run_goes_on_with_frozen_parameters(tiny, tmp_path):
    """A checkpoint in which they were trained resumes; their averages are then the weights themselves."""
    options = ("--config", tiny, f"run_dir={tmp_path / 'run'}", "optim.warmup_epochs=0", "train.keep_last=5")
    assert command("train.py", *options, "train.max_steps=2").returncode == 0
    outcome = command("train.py", *options, "train.max_steps=4", "optim.frozen=[encoder]")
    assert outcome.returncode == 0, outcome.stderr
    assert "optim.frozen [] -> ['encoder']" in outcome.stdout
    first, last = (read(tmp_path / "run" / "checkpoints" / f"step-{n:07d}") for n in (2, 4))
    for name, value in first.items():
        if name.startswith("model.encoder."):
            assert torch.equal(value, last[name]), name
    assert not any(name.startswith(("ema.encoder.", "momentum.encoder.")) for name in last)


def test_frozen_parameters_count_as_what_they_cost():
    """MFU would otherwise be of a backward that is not there. A product costs its forward and one for each gradient."""
    encoder = dataclasses.replace(ENCODER_SIZES["small"], depth=2, in_context_start=1)
    decoder = dataclasses.replace(DECODER_SIZES["small"], depth=2)
    config = ModelConfig(encoder=encoder, decoder=decoder, image_size=128, num_latents=64)
    o = ObjectiveConfig(perceptual_weight=0.0, flow_steps=2)
    everything = cost.counted_flops(config, o)
    executed = training_flops(config, 2, False, pruned=True)
    assert everything == pytest.approx(executed["total"], rel=1e-3)
    assert cost.step_flops(config, o) == training_flops(config, 2, False)
    without_decoder = cost.step_flops(config, o, ("decoder",))["total"]
    d, tokens = config.decoder, MODALITIES["images"].decoder_tokens(config)
    of_attention = d.depth * 4 * tokens**2 * d.width  # which has no weights
    assert everything - without_decoder == pytest.approx(executed["decode"] / 3 - of_attention, rel=0.01)
    parts = ("encoder", "encoder_layer_norm", "latent_tokens", "patch_embed")
    decoder_alone = cost.step_flops(config, o, parts)["total"]
    assert decoder_alone == pytest.approx(executed["decode"] + (executed["tokenize"] + executed["flow"]) / 3, rel=0.01)
