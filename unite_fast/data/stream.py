"""Batches in the order of a run (``stream``), and all images once in the order of the source (``all_images``)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from unite_fast.base.errors import UserError
from unite_fast.data.batch import Batch
from unite_fast.data.order import share
from unite_fast.data.source import Request, Source


def stream(
    source: Source,
    seed: int,
    start: int = 0,
    global_batch: int = 1024,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    workers: int = 0,
    timeout: float = 120.0,
) -> Iterator[Batch]:
    """Endless training batches, one per optimizer step: this rank's global_batch / world_size images of the step.

    ``start`` is the number of images seen so far (over all ranks); the k-th batch holds positions
    start + k * global_batch onwards, of which rank r takes the r-th contiguous part. Images, crops and flips are
    functions of (seed, position). ``timeout`` is in seconds. Raises UserError at once for a batch that does not
    divide or a negative start; while iterating, UserError for unreadable images and WorkerError for workers.
    """
    if global_batch < world_size or global_batch % world_size:
        raise UserError(f"train.global_batch {global_batch} does not divide over {world_size} ranks")
    if start < 0:
        raise UserError(f"the number of images seen must not be negative, got {start}")
    order = source.order(seed, global_batch)

    def plan() -> Iterator[Request]:
        position = start
        while True:
            low, high = share(position, global_batch, rank, world_size)
            yield Request(order.indices(low, high), torch.arange(low, high), True)
            position += global_batch

    return source.batches(plan(), seed, torch.device(device), workers, timeout)


def all_images(
    source: Source,
    batch_size: int = 256,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    workers: int = 0,
    timeout: float = 120.0,
    seed: int = 0,
    indices: Tensor | None = None,
) -> Iterator[Batch]:
    """The images 0 .. n - 1 once, in this order, without random transforms; ``samples`` are indices.

    ``indices`` (M,) int64 selects and orders others. Rank r takes the r-th contiguous part; together the ranks cover
    everything, nothing twice. The last batch may be smaller. ``seed`` matters to synthetic images alone. Raises as
    ``stream``; under on_error=skip an unreadable image is replaced here, too (see ``source.skipped``).
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    chosen = torch.arange(len(source)) if indices is None else indices.cpu()
    low, high = share(0, len(chosen), rank, world_size)

    def plan() -> Iterator[Request]:
        for begin in range(low, high, batch_size):
            part = chosen[begin : min(begin + batch_size, high)]
            yield Request(part, part, False)

    return source.batches(plan(), seed, torch.device(device), workers, timeout)
