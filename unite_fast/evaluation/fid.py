"""FID, Inception score, KID and precision/recall, over any number of processes.

FID and the Inception score need sums alone: they are kept in float64 and added over processes, so no process ever holds
the features of all images. KID and precision/recall compare images pairwise; only when they are asked for are the
features kept. Definitions are torch-fidelity's: images enter by their index, and the index decides the part of the
Inception score, so the scores do not depend on how the images were spread over processes.

    FID  = |m1 - m2|^2 + tr(C1 + C2) - 2 sum sqrt(eigenvalues(C1 C2))      (Heusel et al., 2017)
    IS   = mean over parts of exp(mean KL(p(y|x) || p(y)))                 (Salimans et al., 2016)

Shape letters: B batch, N images, F features, L logits, P parts.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unite_fast.base.errors import UserError
from unite_fast.parallel.distributed import Ranks

PARTS = 10
log = logging.getLogger("unite_fast.evaluation")
SEED = 2020  # torch-fidelity's


@dataclass(frozen=True)
class Statistics:
    """The Gaussian of a set of features: mean (F,), covariance (F, F), float64; ``features`` (N, F) if kept."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int
    features: np.ndarray | None = None


class Accumulator:
    """Sums over images, each added once with its index in 0 .. count - 1."""

    def __init__(
        self, count: int, sizes: tuple[int, int], device: torch.device | str = "cpu", keep: bool = False
    ) -> None:
        """count: N, over all processes. sizes: (F, L). keep: also hold the features, for KID and precision/recall."""
        f, classes = sizes
        self.count = count
        order = np.random.RandomState(SEED).permutation(count)
        bounds = [k * count // PARTS for k in range(PARTS + 1)]
        part = np.empty(count, dtype=np.int64)
        for k in range(PARTS):
            part[order[bounds[k] : bounds[k + 1]]] = k
        self.part = torch.from_numpy(part).to(device)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.sums = {
            "seen": zeros(1),
            "features": zeros(f),
            "products": zeros(f, f),
            "images": zeros(PARTS),
            "probabilities": zeros(PARTS, classes),
            "negative_entropy": zeros(PARTS),
        }
        self.features = torch.zeros(count, f, device=device) if keep else None

    def add(self, indices: Tensor, features: Tensor, logits: Tensor) -> None:
        """indices (B,) int64, features (B, F), logits (B, L). Raises UserError for features that are not finite."""
        if not bool(torch.isfinite(features).all()):
            raise UserError("the feature extractor gives values that are not finite; are its weights whole?")
        x, s = features.double(), self.sums
        s["seen"] += len(x)
        s["features"] += x.sum(0)
        s["products"].addmm_(x.T, x)
        part = self.part[indices.to(self.part.device)]
        log_p = logits.double().log_softmax(1)
        p = log_p.exp()
        s["images"].index_add_(0, part, torch.ones_like(p[:, 0]))
        s["probabilities"].index_add_(0, part, p)
        s["negative_entropy"].index_add_(0, part, (p * log_p).sum(1))
        if self.features is not None:
            self.features[indices.to(self.features.device)] = features.float()

    def state(self) -> dict[str, Tensor]:
        """Everything that was added, to go on from later (``restore``). Each process has its own."""
        return self.sums if self.features is None else self.sums | {"kept": self.features}

    def restore(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    def reduce(self, ranks: Ranks) -> None:
        """Adds the processes' sums, once, after the last image. Every process then has the whole."""
        ranks.sum_(list(self.state().values()))
        if int(self.sums["seen"]) != self.count:
            raise RuntimeError(f"{int(self.sums['seen'])} images were added, expected {self.count}")

    def statistics(self) -> Statistics:
        """Mean and unbiased covariance. Raises UserError for fewer than two images."""
        if self.count < 2:
            raise UserError(f"statistics need at least 2 images, got {self.count}")
        mean = self.sums["features"] / self.count
        centred = self.sums["products"] - self.count * torch.outer(mean, mean)
        kept = None if self.features is None else self.features.cpu().numpy()
        return Statistics(mean.cpu().numpy(), (centred / (self.count - 1)).cpu().numpy(), self.count, kept)

    def inception_score(self) -> tuple[float, float]:
        """(mean, standard deviation) over the parts; KL = mean(sum p log p) - sum q log q with q = mean p."""
        n = self.sums["images"].clamp_min(1)
        q = self.sums["probabilities"] / n[:, None]
        scores = (self.sums["negative_entropy"] / n - torch.special.xlogy(q, q).sum(1)).exp()
        return float(scores.mean()), float(scores.std(correction=0))


@functools.cache
def _say_few(count: int, features: int) -> None:
    """Once for each pair of numbers."""
    log.warning(
        "%d images are no more than the %d features: that dominates the distance; compare it with others of so many "
        "images alone", count, features,
    )  # fmt: skip


def frechet(a: Statistics, b: Statistics) -> float:
    """FID. Raises UserError when the two are of different features."""
    if a.mean.shape != b.mean.shape:
        raise UserError(
            f"the reference statistics have {len(b.mean)} features, the images {len(a.mean)}: "
            "they were made with another network or layer"
        )
    for count in sorted({a.count, b.count}):
        if 0 < count <= len(a.mean):
            _say_few(count, len(a.mean))
    difference = a.mean - b.mean
    eigenvalues = np.linalg.eigvals(a.covariance @ b.covariance).astype(np.complex128)
    cross = np.sqrt(eigenvalues).sum().real
    return float(difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)


def pairwise(made: Statistics, real: Statistics, subset: int = 1000, neighbours: int = 3) -> dict[str, float]:
    """KID (mean, deviation over 100 subsets), precision and recall by torch-fidelity's functions, of kept features."""
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    if made.features is None or real.features is None:
        raise UserError("KID and precision/recall need reference statistics with features; make them with --features")
    a, b = torch.from_numpy(made.features), torch.from_numpy(real.features)
    if subset > min(len(a), len(b)):
        raise UserError(f"KID subsets of {subset} images, but there are {len(a)} and {len(b)}; lower --kid-subset")
    kid: dict[str, Any] = kid_features_to_metric(a, b, kid_subset_size=subset, rng_seed=SEED, verbose=False)
    prc: dict[str, Any] = prc_features_to_metric(a, b, prc_neighborhood=neighbours, save_cpu_ram=True, verbose=False)
    names = {"kernel_inception_distance_mean": "kid", "kernel_inception_distance_std": "kid_std"}
    return {names[k]: v for k, v in kid.items()} | {k: prc[k] for k in ("precision", "recall")}


def scores(accumulator: Accumulator, reference: Statistics | None, pairs: bool = False, subset: int = 1000) -> dict:
    """{"fid", "is", "is_std"} and, with ``pairs``, KID and precision/recall, after ``reduce``."""
    made = accumulator.statistics()
    mean, deviation = accumulator.inception_score()
    found = {} if reference is None else {"fid": frechet(made, reference)}
    found |= {"is": mean, "is_std": deviation}
    return found | pairwise(made, reference, subset) if pairs and reference is not None else found
