"""Every rung of ``efficiency`` gives the losses of eager fp32 training."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support import command
from torch._subclasses.fake_tensor import FakeTensorMode

from unite_fast import objective
from unite_fast.config import ObjectiveConfig
from unite_fast.config_io import from_dict, parse_yaml
from unite_fast.model.unite import UNITE, build
from unite_fast.runtime.stats import read_metrics

COMPARED = ("total", "l1", "flow", "grad_norm")
# Relative tolerance over 20 steps, of (total, l1) and of (flow, grad_norm). The flow loss starts on latents close to
# zero, where the latent LayerNorm multiplies every rounding error by up to 300.
RUNGS = {
    "efficiency.kernels=fused": (1e-3, 1e-3),
    "efficiency.flow_mini_batch=2": (1e-3, 1e-3),
    "efficiency.checkpoint_blocks=true": (1e-6, 1e-6),
    "efficiency.precision=bf16": (5e-2, 1.5e-1),
}


def losses(tiny, run, *overrides: str) -> list[list[float]]:
    result = command("train.py", "--config", tiny, f"run_dir={run}", "train.max_steps=20", *overrides)
    assert result.returncode == 0, result.stderr
    return [[row[k] for k in COMPARED] for row in read_metrics(run / "metrics.jsonl")]


@pytest.mark.parametrize("rung", RUNGS)
def test_losses_of_every_rung(tiny, tmp_path, rung):
    expected = losses(tiny, tmp_path / "eager")
    actual = losses(tiny, tmp_path / "rung", rung)
    assert len(actual) == 20
    for a, e in zip(actual, expected, strict=True):
        tight, loose = RUNGS[rung]
        assert a[:2] == pytest.approx(e[:2], rel=tight)
        assert a[2:] == pytest.approx(e[2:], rel=loose)


def test_kernels_draw_the_same_numbers():
    """SeededDraws, whose randomness is made inside the kernels, equals Draws.make."""
    from support import TINY

    model = build(from_dict(parse_yaml(TINY, "tiny")).model)
    o, samples, labels = ObjectiveConfig(), torch.arange(50, 58), torch.arange(8)
    explicit = objective.Draws.make(model, o, 3, samples)
    seeded = objective.SeededDraws(model, o, 3, samples)
    z = torch.randn(8, *model.latent_shape)
    for a, b in zip(explicit.tokenizer(), seeded.tokenizer(), strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(seeded.decoder_input(z, o), explicit.decoder_input(z, o), rtol=1e-6, atol=1e-6)
    zt, t, y = explicit.flow(z, labels, model.null_class)
    zt2, t2, y2 = seeded.flow(z, labels, model.null_class)
    assert torch.equal(t, t2)
    assert torch.equal(y, y2)
    torch.testing.assert_close(zt2, zt, rtol=1e-6, atol=1e-6)
    added = dataclasses.replace(o, noising="add")
    assert torch.equal(seeded.decoder_input(z, added), explicit.decoder_input(z, added))


def test_a_step_never_waits_for_the_device():
    """Nothing in forward and backward asks for a tensor's value: fake tensors have none and would raise."""
    from support import TINY

    config = from_dict(parse_yaml(TINY, "tiny"))
    with FakeTensorMode():
        model = UNITE(config.model)
        draws = objective.Draws.make(model, config.objective, 0, torch.arange(4))
        images, labels = torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
        losses = objective.backward(model, images, labels, draws, config.objective)
    assert losses["total"].shape == ()
