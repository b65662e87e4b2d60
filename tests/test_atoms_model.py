"""Molecules and crystals in the model: padding, poses, sizes and classes, and a run from its start to its samples."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from support import command

from unite_fast import checkpoint, data, sampling
from unite_fast.base.errors import UserError
from unite_fast.config import Config
from unite_fast.config.yaml_text import from_dict
from unite_fast.data import Batch, stream
from unite_fast.data.atoms import Structure, Structures, join, lattice, pack
from unite_fast.data.atoms.augment import posed, rotations
from unite_fast.data.atoms.source import AtomSource
from unite_fast.data.batch import slots_taken
from unite_fast.modality.atoms import AtomLosses
from unite_fast.model.flops import training_flops
from unite_fast.model.unite import UNITE, build
from unite_fast.objective import Objective
from unite_fast.sampling.reconstruct import reconstruct
from unite_kernels.philox import uniform

SLOTS = 7
TINY = f"""
name: tiny
model:
  modality: atoms
  num_classes: 2
  num_latents: {SLOTS}
  latent_dim: 4
  time_shift: 1.0
  encoder: {{depth: 3, width: 32, heads: 2, in_context_start: 1, in_context_len: 2}}
  decoder: {{depth: 1, width: 32, heads: 2, mlp_hidden: 64, in_features: 32}}
objective: {{perceptual_weight: 0, flow_weight: 0.03, flow_steps: 2}}
optim: {{lr: 2e-3, warmup_epochs: 0.1, flat_epochs: 1e9}}
sample: {{solver: heun, steps: 2, last: prediction}}
evaluation: {{precision: fp32}}
train: {{global_batch: 8, micro_batch: 4, epochs: 4, log_every: 1, image_every: 0, checkpoint_every: 1000}}
efficiency: {{precision: fp32}}
"""


def structures(count: int = 24) -> Structures:
    """Molecules of up to 7 atoms, then crystals, as two data sets."""
    random = np.random.default_rng(0)
    listed = []
    for k in range(count):
        n = 2 + k % 6
        places = np.stack([np.arange(n), np.arange(n) % 2, np.zeros(n)], 1) * 1.2 + random.normal(0, 0.1, (n, 3))
        cell = np.diag(random.uniform(3, 6, 3)) + random.normal(0, 0.1, (3, 3)) if k >= count // 2 else None
        if cell is not None:
            places = (np.arange(n) / n)[:, None] + random.normal(0, 0.01, (n, 3))
        listed.append(Structure(random.choice([1, 6, 7, 8, 9], n), places, cell, f"number {k}"))
    return join([pack(listed[: count // 2]), pack(listed[count // 2 :])])


def config(**model: object) -> Config:
    import yaml

    values = yaml.safe_load(TINY)
    values["model"] |= model
    values["optim"]["lr"] = 2e-3
    return from_dict(values)


def woken(settings: Config) -> UNITE:
    """With weights that make everything matter, and the sizes of the structures above."""
    model = build(settings.model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    model.modality.prepare(model, AtomSource(structures(), SLOTS, ("molecules", "crystals")))
    return model


def batch_of(size: int = 8) -> Batch:
    source = AtomSource(structures(), SLOTS, ("molecules", "crystals"))
    return next(stream(source, 3, global_batch=size))


def prepared(model: UNITE, batch: Batch) -> Batch:
    return batch._replace(content=model.modality.content(batch.content))


def gradients(settings: Config, parts: list[Batch]) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Losses and gradients of samples that come in these parts."""
    model, total = woken(settings).train(), sum(len(p.labels) for p in parts)
    objective = Objective.open(settings.model, settings.objective, settings.efficiency)
    losses: dict[str, float] = {}
    for part in parts:
        share = len(part.labels) / total
        found = objective.backward(model, prepared(model, part), objective.draws(model, 0, part.samples), share)
        for name in (*objective.terms, "total"):
            losses[name] = losses.get(name, 0.0) + share * float(found[name])
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("registers", ["per_atom", "fixed"])
def test_a_batch_is_its_samples_one_by_one(registers):
    """Every loss and every gradient, to 1e-5."""
    settings = config(atoms={"registers": registers})
    batch = batch_of()
    batch = batch if registers == "per_atom" else batch._replace(sizes=None)
    together, alone = gradients(settings, [batch]), gradients(settings, list(batch.split(1)))
    assert together[0].keys() == {"types", "positions", "fractional", "lengths", "angles", "flow", "total"}
    for name, value in together[0].items():
        assert value > 0
        assert alone[0][name] == pytest.approx(value, rel=1e-5), name
    scale = max(float(g.abs().max()) for g in together[1].values())
    for name, gradient in together[1].items():
        torch.testing.assert_close(alone[1][name], gradient, rtol=1e-5, atol=1e-5 * scale, msg=name)


def test_padding_never_counts():
    """Whatever stands in the empty slots: losses, gradients, reconstructions and samples have the same bits."""
    settings, batch = config(), batch_of()
    rubbish = {}
    for name, value in batch.content.items():
        empty = ~slots_taken(batch.sizes, SLOTS)
        empty = empty[..., None] if value.ndim == 3 else empty
        keep = name in ("lattice", "species")  # a species of 0 is what says that there is no atom
        rubbish[name] = value if keep else torch.where(empty, 3.7, value)
    other = batch._replace(content=rubbish)
    assert not torch.equal(other.content["positions"], batch.content["positions"])
    (a, b), model = (gradients(settings, [x]) for x in (batch, other)), woken(settings).eval()
    assert a[0] == b[0]
    assert all(torch.equal(gradient, b[1][name]) for name, gradient in a[1].items())
    made = [
        reconstruct(model, model.modality.content(x.content), x.samples, 0.01, x.labels, x.sizes)
        for x in (batch, other)
    ]
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    labels, seeds = torch.arange(6) % 2, torch.arange(6)
    noise = sampling.initial_noise(model, seeds, "cpu")
    sizes = model.modality.draw_sizes(model, seeds, labels)
    drawn = [
        sampling.sample(model, labels, settings.sample, noise=x, sizes=sizes)
        for x in (noise, torch.where(slots_taken(sizes, SLOTS)[..., None], noise, 9.0))
    ]
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])


@pytest.mark.parametrize("solver", ["heun", "dopri5"])
def test_samples_are_what_they_are_alone(solver):
    settings = config()
    model = woken(settings).eval()
    seeds, labels = torch.arange(5), torch.tensor([0, 1, 0, 1, 1])
    how = dataclasses.replace(settings.sample, solver=solver, steps=3, cfg_scale=1.5)
    together = sampling.sample(model, labels, how, seeds=seeds)
    alone = [sampling.sample(model, labels[i : i + 1], how, seeds=seeds[i : i + 1]) for i in range(5)]
    near = {"atol": 1e-4, "rtol": 1e-4} if solver == "heun" else {"atol": 2e-2, "rtol": 2e-2}  # steps of the batch
    for name, value in together.items():
        torch.testing.assert_close(torch.cat([one[name] for one in alone]), value, **near)
    sizes = model.modality.draw_sizes(model, seeds, labels)
    assert torch.equal((together["species"] > 0).sum(1), sizes)
    crystal = together["lattice"].flatten(1).any(1)
    assert torch.equal(crystal, labels == 1)  # the class says what it is
    items = model.modality.items(together)
    assert [len(one.species) for one in items] == sizes.tolist()
    assert [one.lattice is not None for one in items] == crystal.tolist()


def test_losses_know_no_pose():
    """Turning a molecule with its prediction, or moving either, changes nothing; a crystal's terms know no rotation."""
    batch = batch_of()
    padded = batch.content | {"sizes": batch.sizes, "labels": batch.labels}
    crystal = (batch.labels == 1)[:, None, None]
    losses, model = AtomLosses(config().objective.atoms, absent=False), woken(config())
    generator = torch.Generator().manual_seed(1)
    random = {
        "types": torch.randn(8, SLOTS, 100, generator=generator),
        "positions": torch.randn(8, SLOTS, 3, generator=generator) * 0.2,
        "fractional": torch.rand(8, SLOTS, 3, generator=generator),
        "cell": torch.rand(8, 6, generator=generator) + 1,
    }
    before = losses(model.modality.content(batch.content), random)
    turn = rotations(uniform(1, 0, torch.arange(8), (3,)))
    turned = dict(padded) | {
        "positions": torch.einsum("bij,bmj->bmi", turn, padded["positions"]),
        "lattice": torch.einsum("bij,bkj->bki", turn, padded["lattice"]),
    }
    moved = random | {"positions": torch.einsum("bij,bmj->bmi", turn, random["positions"]) + 5}
    after = losses(model.modality.content({k: turned[k] for k in batch.content}), moved)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=2e-5, atol=1e-6, msg=name)
    wrapped = AtomLosses(dataclasses.replace(config().objective.atoms, wrapped=True), absent=False)
    shifted = random | {"fractional": torch.where(crystal, random["fractional"] + 2, random["fractional"])}
    content = model.modality.content(batch.content)
    torch.testing.assert_close(wrapped(content, shifted)["fractional"], wrapped(content, random)["fractional"])
    assert losses(content, shifted)["fractional"] > 2 * before["fractional"]


def test_a_perfect_prediction_loses_nothing_and_gives_back_the_structures():
    batch, model = batch_of(), woken(config())
    content = model.modality.content(batch.content)
    perfect = {
        "types": torch.nn.functional.one_hot(content["species"], 100).float() * 100,
        "positions": content["positions"] / 10,
        "fractional": content["fractional"],
        "cell": content["cell"],
    }
    terms = AtomLosses(config().objective.atoms, absent=True)(content, perfect)
    assert all(float(value) < 1e-9 for value in terms.values())
    found = model.modality.finished(model, perfect, batch.labels, batch.sizes)
    assert torch.equal(found["species"], content["species"])
    torch.testing.assert_close(found["fractional"], content["fractional"])
    for mine, given in zip(found["lattice"], content["lattice"], strict=True):
        torch.testing.assert_close(lattice.parameters(mine)[0], lattice.parameters(given)[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(lattice.parameters(mine)[1], lattice.parameters(given)[1], rtol=1e-4, atol=1e-3)
    molecule = batch.labels == 0
    torch.testing.assert_close(found["positions"][molecule], content["positions"][molecule], atol=1e-5, rtol=1e-5)


def test_sizes_follow_the_training_set():
    """Each class its own; a function of the seed alone; kept with the weights."""
    model = woken(config())
    seeds = torch.arange(4000)
    for label, own in enumerate((structures(), structures())):
        mine = own.sizes[own.labels == label]
        labels = torch.full_like(seeds, label)
        drawn = model.modality.draw_sizes(model, seeds, labels)
        share = torch.bincount(drawn, minlength=SLOTS + 1) / len(seeds)
        expected = torch.bincount(mine, minlength=SLOTS + 1) / len(mine)
        assert (share - expected).abs().max() < 0.02
        assert torch.equal(model.modality.draw_sizes(model, seeds[70:80], labels[70:80]), drawn[70:80])
    assert model.state_dict()["atom_embed.sizes_seen"].sum() == 24
    assert model.state_dict()["atom_embed.periodic"].tolist() == [False, True]


def test_an_order_of_its_own_keeps_each_atom_whole():
    source = AtomSource(structures(), SLOTS, ("molecules", "crystals"), poses=False, shuffle=True)
    batch, plain = (
        next(stream(source, 3, global_batch=24)),
        structures().gather(data.Order(24, 3).indices(0, 24), SLOTS),
    )
    assert not torch.equal(batch.content["species"], plain.species)
    for i, n in enumerate(plain.sizes.tolist()):
        rows = [torch.cat([x["species"][i, :n, None].float(), x["positions"][i, :n], x["fractional"][i, :n]], 1)
                for x in (batch.content, plain._asdict())]  # fmt: skip
        assert sorted(map(tuple, rows[0].tolist())) == sorted(map(tuple, rows[1].tolist()))
        assert not batch.content["species"][i, n:].any()
    alone = next(stream(source, 3, start=8, global_batch=1))
    assert torch.equal(alone.content["species"][0], batch.content["species"][8])
    assert posed(plain, torch.zeros(24, 6)).positions.shape == (24, SLOTS, 3)


def test_flops_are_counted():
    """As torch counts the products of one sample's passes."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    settings = config()
    model = woken(settings).train()
    batch = model.modality.example(settings.model, 1)
    content = {k: torch.ones_like(v) for k, v in batch.content.items()}
    objective = Objective.open(settings.model, settings.objective, settings.efficiency)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        objective.backward(model, batch._replace(content=content), objective.draws(model, 0, batch.samples))
    expected = training_flops(settings.model, 2, False, pruned=True)["total"]
    assert counter.get_total_flops() == pytest.approx(expected, rel=2e-3)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("atoms")
    structures().select(range(12)).labelled(0).save(folder / "all.safetensors")
    (folder / "tiny.yaml").write_text(TINY)
    return folder


def run_of(packed, name: str, *overrides: object):
    return command(
        "train.py", "--config", packed / "tiny.yaml", f"run_dir={packed / name}", "model.num_classes=1", "device=cpu",
        "data.source=structures", f"data.path={packed / 'all.safetensors'}",
        f"data.heldout_path={packed / 'all.safetensors'}", *overrides,
    )  # fmt: skip


def tensors(folder):
    return checkpoint.read(checkpoint.locate(folder))


def test_a_run_resumes_with_the_same_bits(packed):
    whole = run_of(packed, "whole", "train.max_steps=6", "train.image_every=6")
    assert whole.returncode == 0, whole.stderr
    assert (packed / "whole" / "samples" / "step_0000006.png").is_file()
    for steps in (2, 6):
        assert run_of(packed, "parts", f"train.max_steps={steps}").returncode == 0
    a, b = tensors(packed / "whole"), tensors(packed / "parts")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    model, _ = checkpoint.load_model(packed / "whole")
    assert model.embedder.sizes_seen.tolist() == [[0, 0, 2, 2, 2, 2, 2, 2]]


def test_what_does_not_fit_is_one_line(packed):
    for override, words in (
        ("model.num_classes=3", "has 1 classes but model.num_classes is 3"),
        ("model.num_latents=4", "too many atoms"),
        ("model.modality=images", "does not give model.modality images"),
        ("data.source=joint", "needs data.atoms.joint"),
        ("data.source=digits", "does not give model.modality atoms"),
    ):
        found = run_of(packed, "bad", "train.max_steps=1", override)
        assert found.returncode == 2, found.stderr
        assert words in found.stderr
        assert len(found.stderr.strip().splitlines()) == 1
    model = woken(config())
    with pytest.raises(UserError, match="needs a source of molecules"):
        model.modality.prepare(model, object())
