"""A second modality, sets of points of different sizes: one class, and nothing else knows of it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from stepping import load_tiny
from torch import Tensor, nn

from unite_fast import modality
from unite_fast.config import Config, batch_split
from unite_fast.data import Batch
from unite_fast.layers.vit import ViT
from unite_fast.model.unite import UNITE, build, slots_taken
from unite_fast.objective import Objective
from unite_fast.parallel.distributed import Ranks
from unite_fast.run import assemble
from unite_fast.training import step as steps
from unite_fast.training.step import TrainStep


class Embedder(nn.Linear):
    def forward(self, content, sizes=None):
        return super().forward(content["points"])


class Decoder(ViT):
    def __init__(self, config):
        super().__init__(config.decoder)
        self.head = nn.Linear(config.decoder.width, 2)

    def forward(self, z, sizes=None):
        x = self.with_class_token(self.decoder_embed(z))
        x = self.run(x, None if sizes is None else slots_taken(sizes + 1, x.shape[1]))
        return {"points": self.head(self.decoder_norm(x))[:, 1:]}


class Losses(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = {"points": 1.0}

    def forward(self, content, prediction, sizes):
        error = (prediction["points"] - content["points"]).square().mean(-1)
        there = slots_taken(sizes, error.shape[1])
        return {"points": ((error * there).sum(1) / sizes).mean()}


class Points:
    """(B, K, 2) points, of which a sample has its first ``sizes``."""

    embedder_name = "points"

    def context_tokens(self, config):
        return config.num_latents

    def decoder_tokens(self, config):
        return config.num_latents + 1

    def embedder(self, config):
        return Embedder(2, config.encoder.width)

    def decoder(self, config):
        return Decoder(config)

    def registers(self, config, content):
        return content["points"].shape[1]

    def content(self, given):
        return {"points": given} if isinstance(given, Tensor) else dict(given)

    def losses(self, model, objective, efficiency):
        return Losses()


SIZES = torch.tensor([8, 3, 5, 1, 8, 2, 7, 4])


@pytest.fixture
def config(monkeypatch) -> Config:
    monkeypatch.setitem(modality.MODALITIES, "points", Points())
    found = load_tiny("train.micro_batch=4", "train.global_batch=8")
    return dataclasses.replace(found, model=dataclasses.replace(found.model, modality="points"))


def woken(model: UNITE) -> UNITE:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def batch_of(first: int = 0, padding: float = 0.0) -> Batch:
    points = torch.rand(8, 8, 2, generator=torch.Generator().manual_seed(first))
    points = torch.where(slots_taken(SIZES, 8)[:, :, None], points, padding)
    return Batch({"points": points}, torch.arange(8) % 10, torch.arange(first, first + 8), SIZES)


@torch.no_grad()
def test_padding_does_not_matter(config):
    """Latents and predictions that are there are the same beside any padding; those that are not are 0."""
    model = woken(build(config.model)).eval()
    there = slots_taken(SIZES, 8)
    results = []
    for padding in (0.0, 7.0):
        batch = batch_of(padding=padding)
        z = model.tokenize(batch.content, sizes=SIZES)
        zt = torch.where(there[:, :, None], z + 1, padding)
        x0 = model.denoise(zt, torch.full((8,), 0.3), batch.labels, SIZES)
        results.append([z, x0, model.decode(torch.where(there[:, :, None], z, padding), SIZES)["points"][there]])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert all((x[~there] == 0).all() and x[there].std() > 0.1 for x in results[0][:2])
    assert not torch.allclose(model.tokenize(batch.content)[there], results[1][0][there], atol=1e-3)


@torch.no_grad()
def test_a_sample_is_what_it_is_alone(config):
    """Denoising registers alone: as a model that has no more of them than the sample has."""
    model = woken(build(config.model)).eval()
    zt, t, labels = torch.randn(8, 8, 4), torch.rand(8), torch.arange(8)
    together = model.denoise(zt, t, labels, SIZES)
    for i, size in enumerate(SIZES.tolist()):
        args = zt[i : i + 1, :size], t[i : i + 1], labels[i : i + 1], model.latent_tokens[:, :size]
        alone = model.normalise(model.encoder(*args))
        torch.testing.assert_close(together[i : i + 1, :size], alone, rtol=1e-4, atol=1e-5)


def test_gradients_do_not_depend_on_how_a_batch_is_cut(config):
    """Nor on its padding: every sample counts alike in every term, and the draws are those of its position."""
    gradients = []
    for size, padding in ((8, 0.0), (2, 0.0), (8, 7.0)):
        model = woken(build(config.model)).train()
        objective = Objective.open(config.model, config.objective, config.efficiency)
        assert objective.terms == ("points", "flow")
        for part in batch_of(padding=padding).split(size):
            objective.backward(model, part, objective.draws(model, 0, part.samples), size / 8)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert "points.weight" in gradients[0]
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("overrides", ["efficiency.kernels=fused", "efficiency.recompute=blocks"])
def test_steps_of_training(config, overrides):
    """The step, its optimizer and its metrics, which are the modality's."""
    section, value = overrides.removeprefix("efficiency.").split("=")
    config = dataclasses.replace(config, efficiency=dataclasses.replace(config.efficiency, **{section: value}))
    ranks = Ranks(0, 1, torch.device("cpu"))
    state = assemble.fresh_state(config, ranks)
    state.model.train()
    objective = Objective.open(config.model, config.objective, config.efficiency)
    step = TrainStep(state, config, ranks, batch_split(config.train, 1), 1000, objective)
    assert step.metrics == ("total", "points", "flow", "latent_std", "grad_norm", "lr", "skipped")
    losses = []
    for _ in range(30):
        metrics = step(batch_of())
        losses.append(float(metrics["points"]))
        assert set(metrics) == set(step.metrics)
    assert losses[-1] < 0.5 * losses[0]
    assert 0 < float(metrics["latent_std"]) < 2


def test_spread_of_latents_that_are_not_always_there():
    """The standard deviation over the samples that have a register, in any division into parts."""
    z = torch.randn(8, 5, 3, dtype=torch.float64)
    sizes = torch.tensor([5, 3, 5, 1, 4, 2, 3, 4])
    there = slots_taken(sizes, 5)
    z = z * there[:, :, None]
    parts = [steps.moments(z[i : i + 2], sizes[i : i + 2]) for i in range(0, 8, 2)]
    averaged = [torch.stack([part[name] for part in parts]).mean(0) for name in parts[0]]
    expected = torch.stack([z[there[:, k], k].std(dim=0, correction=0) for k in range(5)]).mean()
    assert float(steps.spread(*averaged)) == pytest.approx(float(expected))
