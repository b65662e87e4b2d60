"""The order of samples: a function of (seed, sample position), whatever the world size or batch.

Position p = 0, 1, 2, ... counts the images of the whole run. It belongs to epoch p // n, and its image is
permutation(seed, epoch)[p % n]. No epoch drops a remainder; a batch may hold the end of one epoch and the start
of the next. To resume at the same place, one integer is enough: the number of images seen.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import torch
from torch import Tensor

CACHED_EPOCHS = 2  # a batch usually spans at most two


def permutation(n: int, seed: int, epoch: int) -> Tensor:
    """A permutation of range(n), int64 (n,), on the CPU. (seed, epoch) are hashed, so neighbours share nothing."""
    digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randperm(n, generator=generator)


class Order:
    """Maps sample positions to indices of a source with ``n`` samples."""

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed = n, seed
        self._cache: OrderedDict[int, Tensor] = OrderedDict()

    def _epoch(self, epoch: int) -> Tensor:
        if epoch not in self._cache:
            self._cache[epoch] = permutation(self.n, self.seed, epoch)
            while len(self._cache) > CACHED_EPOCHS:
                self._cache.popitem(last=False)
        return self._cache[epoch]

    def indices(self, start: int, stop: int) -> Tensor:
        """Indices of positions start .. stop - 1, int64 (stop - start,)."""
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
