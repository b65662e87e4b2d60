"""Molecules and crystals in the model: padding, poses, sizes and classes, and a run from its start to its samples."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from atoms_support import SLOTS, config, structures

from unite_fast import data, sampling
from unite_fast.config import Config
from unite_fast.data import Batch, stream
from unite_fast.data.atoms import lattice
from unite_fast.data.atoms.augment import posed, rotations
from unite_fast.data.atoms.source import AtomSource
from unite_fast.data.batch import slots_taken
from unite_fast.modality.atoms import AtomLosses
from unite_fast.model.flops import training_flops
from unite_fast.model.unite import UNITE, build
from unite_fast.objective import Objective
from unite_fast.plan import cost
from unite_fast.sampling.reconstruct import reconstruct
from unite_kernels import backend
from unite_kernels.philox import uniform


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
        registers = model.modality.registers(settings.model, part.content)
        draws = objective.draws(model, 0, part.samples, registers)
        found = objective.backward(model, prepared(model, part), draws, share)
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


def test_a_batch_padded_to_its_largest_sample_is_the_same():
    """Losses and gradients of crystals and molecules, with class tokens and rotary positions."""
    settings = config()
    few = structures().select(torch.tensor([0, 1, 2, 12, 13, 14, 6, 18]))
    whole = next(stream(AtomSource(few, SLOTS, ("molecules", "crystals")), 3, global_batch=8))
    assert int(whole.sizes.max()) == 4
    cut = whole._replace(content={k: v if k == "lattice" else v[:, :4] for k, v in whole.content.items()})
    (a, b) = (gradients(settings, [x]) for x in (whole, cut))
    for name, value in a[0].items():
        assert b[0][name] == pytest.approx(value, rel=1e-5), name
    scale = max(float(g.abs().max()) for g in a[1].values())
    for name, gradient in a[1].items():
        torch.testing.assert_close(b[1][name], gradient, rtol=1e-5, atol=1e-6 * scale, msg=name)


@pytest.mark.parametrize("solver", ["heun", "dopri5"])
def test_samples_are_what_they_are_alone(solver):
    """To float32's rounding, which products of one row and of five differ in, by machine.

    It is 4e-7 of a latent in each evaluation; three steps of these weights, whose latents are normalised over four
    numbers, make up to 6e-5 Angstrom of it. Samples of other seeds are 1 to 3 Angstrom apart.
    """
    settings = config()
    model = woken(settings).eval()
    seeds, labels = torch.arange(5), torch.tensor([0, 1, 0, 1, 1])
    how = dataclasses.replace(settings.sample, solver=solver, steps=3, cfg_scale=1.5)
    together = sampling.sample(model, labels, how, seeds=seeds)
    alone = [sampling.sample(model, labels[i : i + 1], how, seeds=seeds[i : i + 1]) for i in range(5)]
    near = {"atol": 1e-4, "rtol": 1e-5} if solver == "heun" else {"atol": 2e-2, "rtol": 2e-2}  # steps of the batch
    for name, value in together.items():
        torch.testing.assert_close(torch.cat([one[name] for one in alone]), value, **near)
    sizes = model.modality.draw_sizes(model, seeds, labels)
    assert torch.equal((together["species"] > 0).sum(1), sizes)
    crystal = together["lattice"].flatten(1).any(1)
    assert torch.equal(crystal, labels == 1)  # the class says what it is
    items = model.modality.items(together)
    assert [len(one.species) for one in items] == sizes.tolist()
    assert [one.lattice is not None for one in items] == crystal.tolist()


def test_in_float64_samples_are_what_they_are_alone(monkeypatch):
    """Nothing but rounding, then, tells a sample from itself in a batch."""
    settings = config()
    model = woken(settings).eval()
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(backend, "check_float", lambda *_: None)
    model.double()
    for name in ("rotary_cos", "rotary_sin"):
        setattr(model.encoder, name, getattr(model.encoder, name).to(torch.float32))
    seeds, labels = torch.arange(5), torch.tensor([0, 1, 0, 1, 1])
    noise, sizes = sampling.initial_noise(model, seeds, "cpu").double(), model.modality.draw_sizes(model, seeds, labels)

    def made(which: slice) -> dict[str, torch.Tensor]:
        return sampling.sample(model, labels[which], settings.sample, noise=noise[which], sizes=sizes[which], steps=3)

    together, alone = made(slice(None)), [made(slice(i, i + 1)) for i in range(5)]
    assert together["positions"].dtype == torch.float64
    for name, value in together.items():
        torch.testing.assert_close(torch.cat([one[name] for one in alone]), value, atol=1e-12, rtol=1e-12)


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


def test_flops_are_those_of_the_atoms_that_are_there():
    settings, lengths = config(), torch.tensor([2, 7, 7, 3])
    alone = [
        training_flops(dataclasses.replace(settings.model, num_latents=n), 2, False)["total"] for n in lengths.tolist()
    ]
    mean = cost.step_flops(settings.model, settings.objective, lengths=lengths)["total"]
    assert mean == pytest.approx(sum(alone) / 4)
    assert mean < 0.8 * cost.step_flops(settings.model, settings.objective)["total"]
