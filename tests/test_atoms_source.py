"""Batches of structures in the order of a run: ranks, resume and poses as functions of (seed, position)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from unite_fast.data import Order, all_images, stream
from unite_fast.data.atoms import Structure, Structures, join, pack
from unite_fast.data.atoms.augment import LANES, posed
from unite_fast.data.atoms.source import AtomSource
from unite_fast.data.source import AUGMENT_STREAM
from unite_kernels.philox import uniform

SLOTS = 9


def structures(count: int = 23) -> Structures:
    """Molecules and crystals of 1 to 7 atoms, two data sets."""
    random = np.random.default_rng(0)
    listed = []
    for k in range(count):
        n = 1 + k % 7
        lattice = np.eye(3) * (4 + k % 3) + random.normal(0, 0.2, (3, 3)) if k >= count // 2 else None
        listed.append(Structure(random.integers(1, 90, n), random.normal(0, 2, (n, 3)), lattice, f"number {k}"))
    return join([pack(listed[: count // 2]), pack(listed[count // 2 :])])


def taken(source: AtomSource, batches: int, **options) -> list:
    return list(itertools.islice(stream(source, 5, **options), batches))


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.tensors().values(), b.tensors().values(), strict=True))


def test_a_batch_is_what_the_order_and_the_seed_say():
    source = AtomSource(structures(), SLOTS, ("molecules", "crystals"))
    for k, batch in enumerate(taken(source, 5, global_batch=8)):
        positions = torch.arange(8 * k, 8 * k + 8)
        indices = Order(23, 5).indices(8 * k, 8 * k + 8)
        expected = posed(structures().gather(indices, SLOTS), uniform(5, AUGMENT_STREAM, positions, (LANES,)))
        assert torch.equal(batch.samples, positions)
        for name, value in batch.content.items():
            assert torch.equal(value, getattr(expected, name)), name
        assert batch.sizes is not None
        assert torch.equal(batch.sizes, structures().sizes[indices])
        assert torch.equal(batch.labels, (indices >= 11).long())
        assert not batch.content["species"][torch.arange(SLOTS) >= batch.sizes[:, None]].any()


def test_resume_and_ranks_give_the_same_samples():
    source = AtomSource(structures(), SLOTS)
    whole = taken(source, 6, global_batch=6)
    assert all(map(equal, taken(source, 3, start=18, global_batch=6), whole[3:]))
    shares = [taken(source, 6, global_batch=6, rank=rank, world_size=3) for rank in range(3)]
    for k, batch in enumerate(whole):
        for name, value in batch.tensors().items():
            assert torch.equal(value, torch.cat([share[k].tensors()[name] for share in shares])), name


def test_batches_of_similar_sizes():
    """Each structure once per epoch, in few slots; the same on any number of ranks and after a resume."""
    source = AtomSource(structures(), SLOTS, pad_multiple=3)
    whole = taken(source, 46, global_batch=8)  # 16 epochs in windows of 16 batches
    plain, places = taken(AtomSource(structures(), SLOTS), 46, global_batch=8), torch.arange(46 * 8)
    assert torch.equal(torch.cat([batch.samples for batch in whole]), places)
    for first, last in ((0, 16), (16, 32)):  # a window's samples are those that come without sorting
        sizes = [torch.cat([b.sizes for b in batches[first:last]]).sort().values for batches in (whole, plain)]
        assert torch.equal(*sizes)
    for batch in whole:
        assert batch.content["species"].shape[1] == -(-int(batch.sizes.max()) // 3) * 3
        assert batch.content["positions"].shape[1] == batch.content["species"].shape[1]
    slots = [batch.content["species"].shape[1] for batch in whole]
    assert set(slots) == {3, 6, 9}
    assert slots[:16] != sorted(slots[:16])
    assert sum(slots) < 0.8 * SLOTS * len(slots)
    assert all(map(equal, taken(source, 29, start=17 * 8, global_batch=8), whole[17:]))
    shares = [taken(source, 46, global_batch=8, rank=rank, world_size=2) for rank in range(2)]
    for k, batch in enumerate(whole):
        assert torch.equal(batch.sizes, torch.cat([share[k].sizes for share in shares]))
    assert source.pipeline_id() != AtomSource(structures(), SLOTS).pipeline_id()


def test_every_structure_once_and_as_it_is():
    source = AtomSource(structures(), SLOTS)
    batches = list(all_images(source, 10))
    assert [len(batch.labels) for batch in batches] == [10, 10, 3]
    plain = structures().gather(torch.arange(23), SLOTS)
    assert torch.equal(torch.cat([batch.content["positions"] for batch in batches]), plain.positions)
    unposed = AtomSource(structures(), SLOTS, poses=False)
    (batch,) = taken(unposed, 1, global_batch=23)
    assert torch.equal(batch.content["positions"], plain.positions[Order(23, 5).indices(0, 23)])


def test_what_a_run_records_follows_from_the_content():
    source = AtomSource(structures(), SLOTS)
    assert source.pipeline_id() == AtomSource(structures(), SLOTS).pipeline_id()
    assert source.pipeline_id() != AtomSource(structures(), SLOTS + 1).pipeline_id()
    assert source.pipeline_id() != AtomSource(structures(22), SLOTS).pipeline_id()
    assert source.name(3) == "number 3"
    with pytest.raises(ValueError, match="6 slots cannot hold structures of up to 7 atoms"):
        AtomSource(structures(), 6)
