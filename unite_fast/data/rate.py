"""How fast a source delivers: images per second alone, and the share of a run's time that it makes the run wait."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import torch

from unite_fast.data.batch import Batch
from unite_fast.data.source import Source
from unite_fast.data.stream import stream


class Rate(NamedTuple):
    images_per_second: float
    images: int  # delivered while the clock ran
    seconds: float
    first_batch_seconds: float  # start of workers, opening of files: not part of the rate

    def line(self, demand: float = 0.0, thing: str = "image") -> str:
        """One line for people; ``demand`` in samples/s on this rank, where it is known. thing: a sample, in a word."""
        text = f"{self.images_per_second:,.0f} {thing}s/s (first batch after {self.first_batch_seconds:.1f} s)"
        if demand > 0:
            text += f", {self.images_per_second / demand:.1f} times the {demand:,.0f} {thing}s/s that training takes"
        return text


def measure(
    source: Source,
    batch: int = 128,
    seconds: float = 3.0,
    device: torch.device | str = "cpu",
    workers: int = 0,
    timeout: float = 120.0,
    seed: int = 0,
) -> Rate:
    """Training batches of ``batch`` images on ``device`` for about ``seconds`` seconds, with nothing else to do.

    The first batch is not counted, and at least one is after it. Files are as warm in the page cache as they happen
    to be. Raises as ``stream`` does.
    """
    device = torch.device(device)
    batches = stream(source, seed, global_batch=batch, device=device, workers=workers, timeout=timeout)
    started = time.perf_counter()
    try:
        next(batches)
        _finish(device)
        first = time.perf_counter()
        images, now = 0, first
        while images == 0 or now - first < seconds:
            images += len(next(batches).labels)
            _finish(device)
            now = time.perf_counter()
    finally:
        close = getattr(batches, "close", None)
        if close is not None:
            close()
    return Rate(images / (now - first), images, now - first, first - started)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Waits:
    """Batches, and how long the training loop waited for them.

    What is counted is the time of the calling thread inside ``next``. A GPU that still has queued work does not stand
    still during it, so this is an upper bound of what the data cost.
    """

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self._waited, self._since = 0.0, time.perf_counter()

    def __iter__(self) -> Waits:
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self._waited += time.perf_counter() - started

    def share(self) -> float:
        """Waiting time over elapsed time, 0 to 1, since the last call (or since this object was made)."""
        now = time.perf_counter()
        share = self._waited / max(now - self._since, 1e-9)
        self._waited, self._since = 0.0, now
        return min(share, 1.0)
