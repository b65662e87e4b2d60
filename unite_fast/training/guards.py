"""Numbers that have gone wrong: skipped steps counted on the device, and ranks that no longer hold the same model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from unite_fast.parallel.distributed import Ranks

REMEMBERED = 256  # of the skipped steps, the last ones


class SkipCounter:
    """Counts the steps that were skipped because the gradient was not finite. Nothing leaves the device until
    ``drain``."""

    def __init__(self, device: torch.device) -> None:
        self.run = torch.zeros((), dtype=torch.int64, device=device)  # skipped in a row, up to now
        self.longest = torch.zeros_like(self.run)  # since the last drain
        self.total = torch.zeros_like(self.run)  # since the last drain
        self.positions = torch.zeros(REMEMBERED, dtype=torch.int64, device=device)
        self.history: list[int] = []  # positions of the run's skipped steps, as far as drained

    def record(self, skip: Tensor, position: Tensor) -> None:
        """skip: 0-d bool. position: the number of images seen before the step, 0-d int64. Changes tensors in place."""
        self.run.copy_(torch.where(skip, self.run + 1, 0))
        self.longest.copy_(torch.maximum(self.longest, self.run))
        slot = (self.total % REMEMBERED)[None]
        self.positions.index_copy_(0, slot, torch.where(skip, position, self.positions[slot]))
        self.total += skip

    def drain(self) -> tuple[int, list[int]]:
        """(the longest run of skipped steps since the last drain, positions of the last skipped steps of all)."""
        counters = torch.cat([self.longest[None], self.total[None], self.positions]).tolist()
        self.longest.copy_(self.run)
        self.total.zero_()
        self.history = (self.history + sorted(counters[2 : 2 + min(counters[1], REMEMBERED)]))[-REMEMBERED:]
        return counters[0], self.history


def first_nonfinite(tensors: Mapping[str, Tensor]) -> str:
    """The name of the first tensor with a NaN or an infinity, or an empty string. One host sync."""
    floating = {name: t for name, t in tensors.items() if t.is_floating_point() and t.numel()}
    if not floating:
        return ""
    largest = torch.stack([n.double() for n in torch._foreach_norm(list(floating.values()), float("inf"))])
    bad = (~torch.isfinite(largest)).nonzero()
    return list(floating)[int(bad[0])] if len(bad) else ""


def checksums(tensors: Mapping[str, Tensor]) -> Tensor:
    """Two integers (n, 2) per tensor that change with any bit: the sums of its words and of their squares."""
    rows = []
    for tensor in tensors.values():
        flat = tensor.detach().contiguous().view(-1)
        words = flat.view(torch.int32 if flat.element_size() >= 4 else torch.uint8).long()
        rows.append(torch.stack([words.sum(), (words * words).sum()]))
    return torch.stack(rows)


def first_difference(tensors: Mapping[str, Tensor], ranks: Ranks, group: dist.ProcessGroup | None = None) -> str:
    """The first of ``tensors`` (equal names on all ranks) that differs within ``group``, or an empty string.

    group: the ranks that should hold the same; None: all of them.
    """
    if ranks.world_size == 1:
        return ""
    low = checksums(tensors)
    high = low.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN, group=group)
    dist.all_reduce(high, dist.ReduceOp.MAX, group=group)
    differing = (low != high).any(dim=1).nonzero()
    return list(tensors)[int(differing[0])] if len(differing) else ""
