"""The order of samples: a function of (seed, sample position), whatever the world size or batch.

Position p = 0, 1, 2, ... counts the images of the whole run. It belongs to epoch p // n, and its image is
permutation(seed, epoch)[p % n]. No epoch drops a remainder; a batch may hold the end of one epoch and the start
of the next. To resume at the same place, one integer is enough: the number of images seen.

Where batches are to hold samples of a kind (molecules of similar sizes), the samples of every WINDOW batches, counted
from position 0, are sorted by kind before they are cut into batches, and these batches come in a random order. The
order then depends on the batch over all ranks, too: one that is changed when a run resumes begins other windows.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import torch
from torch import Tensor

CACHED_EPOCHS = 2  # a batch usually spans at most two
WINDOW = 16  # batches


def permutation(n: int, seed: int, epoch: int | str) -> Tensor:
    """A permutation of range(n), int64 (n,), on the CPU. (seed, epoch) are hashed, so neighbours share nothing."""
    digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randperm(n, generator=generator)


class Order:
    """Maps sample positions to indices of a source with ``n`` samples.

    kinds (n,) int64, None where any samples may share a batch, which is of ``batch`` samples over all ranks.
    """

    def __init__(self, n: int, seed: int, kinds: Tensor | None = None, batch: int = 1) -> None:
        self.n, self.seed, self.kinds, self.batch = n, seed, kinds, batch
        self._window: tuple[int, Tensor] | None = None  # the last one
        self._cache: OrderedDict[int, Tensor] = OrderedDict()

    def _epoch(self, epoch: int) -> Tensor:
        if epoch not in self._cache:
            self._cache[epoch] = permutation(self.n, self.seed, epoch)
            while len(self._cache) > CACHED_EPOCHS:
                self._cache.popitem(last=False)
        return self._cache[epoch]

    def indices(self, start: int, stop: int) -> Tensor:
        """Indices of positions start .. stop - 1, int64 (stop - start,)."""
        if self.kinds is None:
            return self._shuffled(start, stop)
        length, parts = WINDOW * self.batch, []
        while start < stop:
            window, offset = divmod(start, length)
            part = self._sorted(window, self.kinds)[offset : offset + stop - start]
            parts.append(part)
            start += len(part)
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def _sorted(self, window: int, kinds: Tensor) -> Tensor:
        """The indices of a window, int64 (WINDOW batch,)."""
        if self._window is None or self._window[0] != window:
            found = self._shuffled(window * WINDOW * self.batch, (window + 1) * WINDOW * self.batch)
            batches = found[kinds[found].argsort(stable=True)].reshape(WINDOW, self.batch)
            self._window = window, batches[permutation(WINDOW, self.seed, f"window {window}")].flatten()
        return self._window[1]

    def _shuffled(self, start: int, stop: int) -> Tensor:
        parts = []
        while start < stop:
            epoch, offset = divmod(start, self.n)
            count = min(stop - start, self.n - offset)
            parts.append(self._epoch(epoch)[offset : offset + count])
            start += count
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def share(start: int, count: int, rank: int, world_size: int) -> tuple[int, int]:
    """The contiguous part [low, high) of positions [start, start + count) that ``rank`` takes; the parts tile it."""
    return start + count * rank // world_size, start + count * (rank + 1) // world_size
