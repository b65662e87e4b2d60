"""Data: order, sharding and resume; digits and synthetic images; the streams built from them."""

from __future__ import annotations

import itertools
import threading
import time

import pytest
import torch
from photographs import equal

from unite_fast.base.errors import UserError
from unite_fast.config import DataConfig, ModelConfig, choices
from unite_fast.data import WorkerError, all_images, open_source, opener, stream
from unite_fast.data.ahead import ahead
from unite_fast.data.order import Order, permutation, share
from unite_fast.data.source import Source
from unite_fast.modality.images import to_float

DIGITS = DataConfig(source="digits", flip=False)
SMALL = ModelConfig(image_size=8, patch_size=2, channels=1, num_classes=10)


def take(source: Source, steps: int, **options):
    return list(itertools.islice(stream(source, 7, **options), steps))


@pytest.mark.parametrize("seed", [0, 7, -3, 2**62])
def test_permutation_is_one_and_depends_on_seed_and_epoch(seed):
    first, again, other = permutation(1000, seed, 0), permutation(1000, seed, 0), permutation(1000, seed, 1)
    assert torch.equal(first, again)
    assert torch.equal(first.sort().values, torch.arange(1000))
    assert not torch.equal(first, other)
    assert not torch.equal(first, permutation(1000, seed + 1, 0))
    assert (first == other).float().mean() < 0.02


def test_order_straddles_epochs():
    order = Order(10, seed=3)
    straight = torch.cat([permutation(10, 3, epoch) for epoch in range(7)])
    assert torch.equal(order.indices(0, 70), straight)  # more epochs than the cache holds
    for start, stop in [(0, 0), (3, 4), (8, 13), (9, 31), (69, 70), (5, 10)]:
        assert torch.equal(order.indices(start, stop), straight[start:stop])


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_share_tiles(world_size):
    parts = [share(5, 12, rank, world_size) for rank in range(world_size)]
    assert parts[0][0] == 5
    assert parts[-1][1] == 17
    assert all(a[1] == b[0] for a, b in itertools.pairwise(parts))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_sample_once_per_epoch_for_any_world_size(world_size):
    source = open_source(DIGITS, SMALL)
    n, batch = len(source), 48
    assert n % batch  # so a batch straddles the epochs
    steps = 2 * n // batch + 1
    ranks = [take(source, steps, global_batch=batch, rank=r, world_size=world_size) for r in range(world_size)]
    assert all(len(b.samples) == batch // world_size for rank in ranks for b in rank)
    positions = torch.cat([b.samples for step in zip(*ranks, strict=True) for b in step])
    assert torch.equal(positions, torch.arange(steps * batch))  # steps in order, ranks contiguous inside a step
    images = torch.cat([b.images for step in zip(*ranks, strict=True) for b in step])
    labels = torch.cat([b.labels for step in zip(*ranks, strict=True) for b in step])
    order = Order(n, 7).indices(0, steps * batch)
    assert torch.equal(order[:n].sort().values, torch.arange(n))
    assert torch.equal(order[n : 2 * n].sort().values, torch.arange(n))
    assert torch.equal(labels, source.labels[order])
    everything = torch.cat([b.images for b in all_images(source)])
    assert torch.equal(images, everything[order])


def test_resume_is_one_integer():
    source = open_source(DIGITS, SMALL)
    straight = take(source, 40, global_batch=100)
    resumed = take(source, 22, start=18 * 100, global_batch=100)
    assert equal(straight[18:], resumed)


@pytest.mark.parametrize("options", [{"global_batch": 10, "world_size": 3}, {"start": -1}, {"global_batch": 0}])
def test_stream_refuses_at_once(options):
    with pytest.raises(UserError):
        stream(open_source(DIGITS, SMALL), 0, **options)


def test_digits_split():
    train, held_out = open_source(DIGITS, SMALL), open_source(DIGITS, SMALL, split="heldout")
    assert (len(train), len(held_out)) == (1497, 300)
    assert torch.equal(held_out.labels.bincount(), torch.full((10,), 30))
    assert train.labels.dtype == torch.int64
    assert train.class_names == [str(i) for i in range(10)]
    batch = next(all_images(train, batch_size=2000))
    assert batch.images.dtype == torch.float32
    assert batch.images.shape == (1497, 1, 8, 8)
    assert batch.images.min() == 0
    assert batch.images.max() == 1
    rows = {tuple(r.tolist()) for r in batch.images.flatten(1)}
    held_rows = {tuple(r.tolist()) for r in next(all_images(held_out, 300)).images.flatten(1)}
    from sklearn.datasets import load_digits

    real = {tuple(r) for r in (load_digits(return_X_y=True)[0] / 16).tolist()}
    assert rows | held_rows == real
    assert torch.equal(train.load(5, position=99, seed=1), batch.images[5])


@pytest.mark.parametrize(("size", "channels"), [(16, 1), (8, 3), (32, 3)])
def test_digits_size_and_channels(size, channels):
    model = ModelConfig(image_size=size, patch_size=2, channels=channels, num_classes=10)
    images = next(all_images(open_source(DIGITS, model), 64)).images
    assert images.shape == (64, channels, size, size)
    assert images.min() >= 0
    assert images.max() <= 1
    assert torch.equal(images[:, 0], images[:, -1])
    small = next(all_images(open_source(DIGITS, SMALL), 64)).images
    assert (images[:, :1].mean((1, 2, 3)) - small.mean((1, 2, 3))).abs().max() < 0.02


@pytest.mark.parametrize(
    ("data", "model", "words"),
    [
        (DataConfig(source="digits"), SMALL, "data.flip=false"),
        (DataConfig(source="digits", flip=False, crop="resize_random"), SMALL, "data.crop=adm"),
        (DIGITS, ModelConfig(image_size=8, channels=1, num_classes=1000), "10 classes .* 1000"),
        (DIGITS, ModelConfig(image_size=8, channels=4, num_classes=10), "model.channels is 4"),
        (DataConfig(source="synthetic", crop="random_resized"), SMALL, "data.crop=adm"),
        (DataConfig(source="digits", flip=False, workers=-1), SMALL, "data.workers"),
        (DataConfig(source="digits", flip=False, timeout=0), SMALL, "data.timeout"),
        (DataConfig(source="nothing"), SMALL, "data.source 'nothing'"),  # type: ignore[arg-type]
    ],
)
def test_refusals_are_one_line(data, model, words):
    with pytest.raises(UserError, match=words) as caught:
        open_source(data, model)
    assert "\n" not in str(caught.value)


def test_synthetic():
    model = ModelConfig(image_size=16, channels=3, num_classes=7)
    source = open_source(DataConfig(source="synthetic", flip=False), model)
    batch = take(source, 1, global_batch=64, start=640)[0]
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (64, 3, 16, 16)
    assert abs(batch.images.float().mean() - 127.5) < 2
    index = Order(len(source), 7).indices(640, 704)
    assert torch.equal(batch.labels, index % 7)
    assert torch.equal(source.load(int(index[3]), 643, 7), batch.images[3])
    assert not torch.equal(source.load(0, seed=7), source.load(0, seed=8))
    held_out = open_source(DataConfig(source="synthetic", flip=False), model, "heldout")
    assert len(held_out) == 50_000
    assert not torch.equal(source.load(0), held_out.load(0))


def test_flip_is_a_function_of_seed_and_position():
    model = ModelConfig(image_size=8, channels=3, num_classes=7)
    plain = open_source(DataConfig(source="synthetic", flip=False), model)
    flipping = open_source(DataConfig(source="synthetic", flip=True), model)
    still, moved = take(plain, 1, global_batch=512)[0].images, take(flipping, 1, global_batch=512)[0].images
    mirrored = (moved == still.flip(-1)).flatten(1).all(1)
    assert torch.equal(moved[~mirrored], still[~mirrored])
    assert 0.4 < mirrored.float().mean() < 0.6
    halves = [take(flipping, 1, global_batch=512, rank=r, world_size=2)[0].images for r in range(2)]
    assert torch.equal(torch.cat(halves), moved)
    index = Order(len(flipping), 7).indices(0, 20).tolist()
    for position, i in enumerate(index):
        assert torch.equal(flipping.load(i, position, 7), moved[position])
    assert torch.equal(next(all_images(flipping, 8, seed=7)).images, next(all_images(plain, 8, seed=7)).images)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_images(world_size):
    source = open_source(DIGITS, SMALL, split="heldout")
    batches = [b for r in range(world_size) for b in all_images(source, 64, r, world_size)]
    assert torch.equal(torch.cat([b.samples for b in batches]), torch.arange(300))
    assert torch.equal(torch.cat([b.labels for b in batches]), source.labels)
    some = torch.tensor([5, 299, 0, 7])
    few = [b for r in range(world_size) for b in all_images(source, 3, r, world_size, indices=some)]
    assert torch.equal(torch.cat([b.labels for b in few]), source.labels[some])
    assert torch.equal(torch.cat([b.images for b in few]), torch.cat([b.images for b in batches])[some])


def test_to_float():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    floats = to_float(levels)
    assert floats.dtype == torch.float32
    assert floats.min() == 0
    assert floats.max() == 1
    assert torch.equal((floats * 255).round().to(torch.uint8), levels)
    assert to_float(floats) is floats
    with pytest.raises(TypeError, match="float64"):
        to_float(floats.double())


def test_every_source_has_its_opener():
    for name in choices(DataConfig, "source"):
        assert callable(opener(name)), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_the_gpu_equal_those_on_the_cpu():
    for data in (DIGITS, DataConfig(source="synthetic")):
        source = open_source(data, SMALL)
        for a, b in zip(take(source, 3, global_batch=64), take(source, 3, global_batch=64, device="cuda"), strict=True):
            assert b.images.is_cuda
            assert b.labels.is_cuda
            assert b.samples.is_cuda
            assert all(torch.equal(x, y.cpu()) for x, y in zip(a, b, strict=True))


def test_ahead_keeps_order_passes_errors_and_ends():
    assert list(ahead(lambda x: x * x, range(50), 2, 10, str)) == [x * x for x in range(50)]

    def fail(x: int) -> int:
        if x == 3:
            raise ValueError("three")
        return x

    seen = []
    with pytest.raises(ValueError, match="three"):
        seen.extend(ahead(fail, range(9), 2, 10, str))
    with pytest.raises(WorkerError, match=r"no images for 0.2 s \(data.timeout\) while reading that shard"):
        next(ahead(time.sleep, [3], 2, 0.2, lambda: "that shard"))
    before = set(threading.enumerate())
    endless = ahead(lambda x: x, iter(int, 1), 2, 10, str)
    assert next(endless) == 0
    (thread,) = set(threading.enumerate()) - before
    endless.close()
    thread.join(20)
    assert not thread.is_alive()
