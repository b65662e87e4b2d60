"""Means of device-side metrics between two log lines: the step's only wait for the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unite_fast.parallel.distributed import Ranks

SKIPPED = "skipped"  # the metric that is 1 in a step whose other metrics do not count


class Means:
    """Running means of device scalars. Nothing leaves the device until ``drain`` or ``sums``."""

    def __init__(self, names: tuple[str, ...], ranks: Ranks) -> None:
        self.names, self.ranks = names, ranks
        self.total = torch.zeros(len(names), dtype=torch.float64, device=ranks.device)
        self.count = 0

    def add(self, metrics: dict[str, Tensor]) -> None:
        self.total += torch.stack([metrics[name].detach() for name in self.names])
        self.count += 1

    def sums(self) -> dict[str, float]:
        """The sums so far, averaged over ranks (all of them must call), and their count: what a checkpoint keeps."""
        self.ranks.average_([self.total])
        values: dict[str, float] = dict(zip(self.names, self.total.tolist(), strict=True)) if self.count else {}
        return values | {"count": float(self.count)}

    def restore(self, sums: dict[str, float]) -> None:
        """Continues from ``sums()``."""
        self.count = int(sums.get("count", 0))
        self.total.copy_(torch.tensor([sums.get(name, 0.0) for name in self.names], dtype=torch.float64))

    def drain(self) -> dict[str, float]:
        """The means since the last drain, over ranks and over steps that were not skipped; NaN when all were.

        "skipped" is their number. The step's only host sync.
        """
        sums = self.sums()
        skipped = sums.pop(SKIPPED, 0.0)
        count = sums.pop("count") - skipped
        self.total.zero_()
        self.count = 0
        return {name: value / count if count else math.nan for name, value in sums.items()} | {SKIPPED: skipped}
