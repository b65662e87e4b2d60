"""What latents say of classes to a reader that learns nothing but a linear map, and to one that learns nothing.

Latents are those of tokenization. The linear probe is a ridge regression on the labels' indicators (+1, -1), which sums
over the training samples decide; the other one asks the nearest training samples.

Shape letters: n samples, F features, Y classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unite_fast.analysis.walk import Denoised, Kept, Tile
from unite_fast.parallel.distributed import Ranks

RIDGE = 1e-3  # times the number of samples: added to the covariance of standardised features
NEIGHBOURS = 10
KEPT = 10_000
DEFINITION = {
    "linear": "share of held-out samples whose class has the largest output of a ridge regression on indicators +1 and "
    "-1, fitted to training samples; features standardised by the training set's mean and deviation, ridge 1e-3 n",
    "knn": "share of held-out samples whose class most of the k = 10 nearest training samples have, by cosine of "
    "features less the training set's mean",
    "flat": "all latents of a sample, one after another",
    "mean": "mean over its registers",
    "chance": "share of held-out samples of the training set's most frequent class",
}


def features(tile: Tile) -> dict[str, Tensor]:
    """{"flat": (B, K C), "mean": (B, C)} float64."""
    return {"flat": tile.latents.double().flatten(1), "mean": tile.mean(tile.latents)}


class Sums:
    """Training samples of one kind of features, for the linear probe."""

    def __init__(self, size: int, classes: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.first, self.products, self.of_class = zeros(size), zeros(size, size), zeros(classes, size)
        self.counts = zeros(classes)

    def add(self, x: Tensor, labels: Tensor) -> None:
        """x (n, F), labels (n,)."""
        self.first += x.sum(0)
        self.products.addmm_(x.T, x)
        self.of_class.index_add_(0, labels, x)
        self.counts += torch.bincount(labels, minlength=len(self.counts))

    def tensors(self) -> list[Tensor]:
        return [self.first, self.products, self.of_class, self.counts]

    def fit(self, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
        """(weights (F, Y), biases (Y,)) on features as they are."""
        n = self.counts.sum()
        mean = self.first / n
        covariance = self.products / n - torch.outer(mean, mean)
        scale = covariance.diagonal().clamp_min(0).sqrt()
        scale = torch.where(scale > 1e-9, scale, torch.ones_like(scale))
        # Mean over samples of (x - mean) times the indicator 2 [y = c] - 1, whose constant drops out.
        cross = 2 * (self.of_class - self.counts[:, None] * mean).T / n / scale[:, None]
        correlation = covariance / torch.outer(scale, scale)
        ridged = correlation + ridge * torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
        weights = torch.linalg.solve(ridged, cross) / scale[:, None]
        return weights, 2 * self.counts / n - 1 - mean @ weights


class Training:
    """Adds up the training samples; keeps some for the neighbours."""

    times: Sequence[float] = ()

    def __init__(self, places: Tensor, shape: tuple[int, int], classes: int, device: torch.device) -> None:
        """shape: (K, C) of latents."""
        sizes = {"flat": shape[0] * shape[1], "mean": shape[1]}
        self.sums = {name: Sums(size, classes, device) for name, size in sizes.items()}
        self.kept = Kept(places, KEPT)
        zeros = {"dtype": torch.float64, "device": device}
        self.tables = {name: torch.zeros(len(self.kept), size, **zeros) for name, size in sizes.items()}
        self.labels = torch.zeros(len(self.kept), **zeros)

    def begin(self, tile: Tile) -> None:
        for name, x in features(tile).items():
            self.sums[name].add(x, tile.labels)
            self.kept.put(self.tables[name], tile, x)
        self.kept.put(self.labels, tile, tile.labels)

    def add(self, tile: Tile, denoised: Denoised) -> None: ...

    def reduce(self, ranks: Ranks) -> None:
        ranks.sum_([self.labels, *self.tables.values(), *(t for sums in self.sums.values() for t in sums.tensors())])

    def result(self) -> dict[str, Any]:
        return {"samples": int(self.sums["mean"].counts.sum()), "neighbours_of": len(self.kept)}


def _unit(x: Tensor, mean: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x - mean, dim=1)


def majority(votes: Tensor, classes: int) -> Tensor:
    """(n,): the class that most of votes (n, k) have, nearest first; among equals the smallest, as scikit-learn."""
    counts = torch.zeros(len(votes), classes, dtype=torch.int64, device=votes.device)
    return counts.scatter_add_(1, votes, torch.ones_like(votes)).argmax(1)


class HeldOut:
    """Asks both probes about held-out samples."""

    times: Sequence[float] = ()

    def __init__(self, training: Training, k: int = NEIGHBOURS) -> None:
        self.k = min(k, len(training.kept))
        self.fitted = {name: sums.fit() for name, sums in training.sums.items()}
        self.means = {name: sums.first / sums.counts.sum() for name, sums in training.sums.items()}
        self.near = {name: _unit(x, self.means[name]) for name, x in training.tables.items()}
        self.labels = training.labels.long()
        counts = training.sums["mean"].counts
        self.frequent, self.classes = int(counts.argmax()), len(counts)
        self.right = torch.zeros(2, len(self.near), dtype=torch.float64, device=self.labels.device)
        self.counts = torch.zeros(2, dtype=torch.float64, device=self.labels.device)  # samples, of the frequent class

    def begin(self, tile: Tile) -> None:
        for i, (name, x) in enumerate(features(tile).items()):
            weights, bias = self.fitted[name]
            linear = (x @ weights + bias).argmax(1)
            near = (_unit(x, self.means[name]) @ self.near[name].T).topk(self.k, dim=1).indices
            voted = majority(self.labels[near], self.classes)
            self.right[:, i] += torch.stack([(found == tile.labels).sum() for found in (linear, voted)])
        self.counts[0] += len(tile.labels)
        self.counts[1] += (tile.labels == self.frequent).sum()

    def add(self, tile: Tile, denoised: Denoised) -> None: ...

    def reduce(self, ranks: Ranks) -> None:
        ranks.sum_([self.right, self.counts])

    def result(self) -> dict[str, Any]:
        """{"held_out", "chance", "linear": {"flat", "mean"}, "knn": ...}, shares."""
        n = float(self.counts[0])
        found: dict[str, Any] = {"held_out": int(n), "chance": float(self.counts[1]) / n, "k": self.k}
        for row, name in zip(self.right, ("linear", "knn"), strict=True):
            found[name] = {kind: float(value) / n for kind, value in zip(self.near, row, strict=True)}
        return found
