"""How alike the tokenizing and the denoising pass are, layer by layer (arXiv 2603.22283, Figure 6 left and middle).

CKA comes from sums over samples of features and of their products, so that no kernel of all pairs is ever made; CKNNA
compares pairs, of features that are kept.

Shape letters: n examples, D features, B samples of a tile, K registers, k neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unite_fast.analysis.walk import Denoised, Kept, Tile

TIMES = (0.1, 0.5, 0.9)
NEIGHBOURS = 10
PAIRED = 2000
DEFINITION = {
    "activations": "outputs of the encoder's blocks at the registers that are there, after norm3; tokenizing a sample "
    "against denoising its latents z_t = t z + (1 - t) eps, both with the null class",
    "cka": "linear CKA (Kornblith et al. 2019, section 3): |X'Y|^2 / (|X'X| |Y'Y|) of centred features, Frobenius "
    "norms",
    "debiased": "the same with the unbiased estimate of HSIC (Song et al. 2012, equation 5) in all three places",
    "registers": "an example is a register of a sample (n = samples times registers)",
    "mean": "an example is a sample, the mean over its registers",
    "cknna": "Huh et al. 2024 (arXiv 2405.07987, appendix A): inner products of unit features, centred by rows, over "
    "pairs that are among each other's k nearest neighbours in both, relative to each with itself; mean over registers",
    "cosine": "mean over samples and registers of the cosine between the two activations of one register",
}


class PairSums:
    """Sums over examples x, y (D,) each, from which CKA follows in both its forms. float64."""

    def __init__(self, d: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.count = zeros(1)
        self.x, self.y = zeros(d), zeros(d)
        self.products = {"xx": zeros(d, d), "xy": zeros(d, d), "yy": zeros(d, d)}
        self.squares = zeros(2)  # of |x|^2, |y|^2
        self.fourth = {"xx": zeros(1), "xy": zeros(1), "yy": zeros(1)}  # of |x|^4, |x|^2 |y|^2, |y|^4
        self.weighted = {name: zeros(d) for name in ("xx", "xy", "yx", "yy")}  # xy: of x |y|^2

    def add(self, x: Tensor, y: Tensor) -> None:
        """x, y (n, D)."""
        x, y = x.double(), y.double()
        a, b = x.square().sum(1), y.square().sum(1)
        of = {"x": (x, a), "y": (y, b)}
        self.count += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.squares += torch.stack([a.sum(), b.sum()])
        for pair in self.products:
            (left, s), (right, r) = of[pair[0]], of[pair[1]]
            self.products[pair].addmm_(left.T, right)
            self.fourth[pair] += s @ r
        for pair in self.weighted:
            self.weighted[pair] += of[pair[1]][1] @ of[pair[0]][0]

    def tensors(self) -> list[Tensor]:
        groups = (self.products, self.fourth, self.weighted)
        return [self.count, self.x, self.y, self.squares, *(t for group in groups for t in group.values())]

    def _centred(self, pair: str) -> tuple[Tensor, list[Tensor], Tensor]:
        """Of features less their means: X'Y, the sums of |x|^2 and of |y|^2, and that of |x|^2 |y|^2."""
        n, sums = self.count, {"x": self.x, "y": self.y}
        means = [sums[name] / n for name in pair]
        lengths = [mean @ mean for mean in means]
        squares = [self.squares["xy".index(name)] for name in pair]
        product = self.products[pair]
        # |x - m|^2 = |x|^2 - 2 x'm + |m|^2, multiplied out
        of_x, of_y = self.weighted[pair] @ means[0], self.weighted[pair[::-1]] @ means[1]
        both = self.fourth[pair].sum() - 2 * (of_x + of_y) + 4 * means[0] @ product @ means[1]
        both = both + lengths[1] * squares[0] + lengths[0] * squares[1] - 3 * n.sum() * lengths[0] * lengths[1]
        own = [square - n.sum() * length for square, length in zip(squares, lengths, strict=True)]
        return product - n * torch.outer(*means), own, both

    def biased(self, pair: str) -> float:
        """|X'Y|^2 of centred features."""
        return float(self._centred(pair)[0].square().sum())

    def unbiased(self, pair: str) -> float:
        """n (n - 3) times the unbiased estimate of HSIC with linear kernels K = XX', L = YY' of zero diagonals.

        tr(KL) + (1'K1)(1'L1) / ((n - 1)(n - 2)) - 2 (1'KL1) / (n - 2). It does not change when the features are
        centred, where X'1 = 0, so the three are |X'Y|^2 less the sum of |x|^2 |y|^2, the sums of |x|^2 and |y|^2, and
        that of |x|^2 |y|^2.
        """
        n = float(self.count)
        product, own, both = self._centred(pair)
        return float(product.square().sum() - both + own[0] * own[1] / ((n - 1) * (n - 2)) - 2 * both / (n - 2))

    def cka(self) -> dict[str, float]:
        """{"cka", "debiased"}; the second is nan below 4 examples, or where a set alone has no positive estimate."""
        forms = {"cka": self.biased, "debiased": self.unbiased}
        found = {}
        for name, hsic in forms.items():
            own = hsic("xx") * hsic("yy") if name == "cka" or float(self.count) > 3 else 0.0
            found[name] = hsic("xy") / math.sqrt(own) if own > 0 else math.nan
        return found


def _row_centred(x: Tensor, rows: slice) -> Tensor:
    """Inner products of some rows of x (n, D) with all, less each row's mean."""
    inner = x[rows] @ x.T
    return inner - inner.mean(1, keepdim=True)


def _neighbours(x: Tensor, rows: slice, k: int) -> Tensor:
    """bool (rows, n): the k others with the largest inner products."""
    inner = x[rows] @ x.T
    own = torch.arange(len(x), device=x.device)[rows]
    inner[torch.arange(len(own), device=x.device), own] = -math.inf
    mask = torch.zeros_like(inner, dtype=torch.bool)
    return mask.scatter_(1, inner.topk(k, dim=1).indices, True)


def cknna(x: Tensor, y: Tensor, k: int = NEIGHBOURS, block: int = 512) -> float:
    """CKNNA of features x, y (n, D), n > k, in blocks of rows; float64. nan where a set agrees with itself nowhere."""
    x, y = (torch.nn.functional.normalize(v.double(), dim=1) for v in (x, y))
    sums = torch.zeros(3, dtype=torch.float64, device=x.device)
    for start in range(0, len(x), block):
        rows = slice(start, start + block)
        a, b = _row_centred(x, rows), _row_centred(y, rows)
        near_a, near_b = _neighbours(x, rows, k), _neighbours(y, rows, k)
        sums += torch.stack([(a * b)[near_a & near_b].sum(), a[near_a].square().sum(), b[near_b].square().sum()])
    both, own = float(sums[0]), float(sums[1] * sums[2])
    return both / math.sqrt(own) if own > 0 else math.nan


class Alignment:
    """Of all blocks, at each of ``times``. places: of the samples in the source, of which some are kept for CKNNA."""

    def __init__(
        self,
        places: Tensor,
        blocks: int,
        width: int,
        device: torch.device,
        times: Sequence[float] = TIMES,
        k: int = NEIGHBOURS,
        paired: int = PAIRED,
    ) -> None:
        self.times, self.blocks, self.k = tuple(times), blocks, k
        self.kept = Kept(places, paired)
        self.sums = {
            (t, i): {"registers": PairSums(width, device), "mean": PairSums(width, device)}
            for t in self.times
            for i in range(blocks)
        }
        self.cosines = torch.zeros(len(self.times), blocks, 2, dtype=torch.float64, device=device)  # sum, count
        table = torch.zeros(len(self.kept), width, dtype=torch.float64, device=device)
        self.tokenizing = [table.clone() for _ in range(blocks)]
        self.denoising = {key: table.clone() for key in self.sums}

    def begin(self, tile: Tile) -> None:
        for own, layer in zip(self.tokenizing, tile.layers, strict=True):
            self.kept.put(own, tile, tile.mean(layer))

    def add(self, tile: Tile, denoised: Denoised) -> None:
        taken = tile.taken
        for i, (x, y) in enumerate(zip(tile.layers, denoised.layers, strict=True)):
            sums = self.sums[denoised.t, i]
            means = tile.mean(x), tile.mean(y)
            sums["registers"].add(x[taken], y[taken])
            sums["mean"].add(*means)
            self.kept.put(self.denoising[denoised.t, i], tile, means[1])
            cosine = torch.nn.functional.cosine_similarity(x[taken].double(), y[taken].double(), dim=1)
            row = torch.stack([cosine.sum(), torch.ones_like(cosine).sum()])
            self.cosines[self.times.index(denoised.t), i] += row

    def tensors(self) -> list[Tensor]:
        sums = [t for forms in self.sums.values() for form in forms.values() for t in form.tensors()]
        return [self.cosines, *sums, *self.tokenizing, *self.denoising.values()]

    def result(self) -> dict[str, Any]:
        """{"times", "examples", and by measure a list per time of a number per block}."""
        first = self.sums[self.times[0], 0]
        examples = {name: int(sums.count) for name, sums in first.items()}
        examples["cknna"] = len(self.kept)
        found: dict[str, Any] = {"times": list(self.times), "examples": examples, "k": self.k}
        for form in ("registers", "mean"):
            each = [[self.sums[t, i][form].cka() for i in range(self.blocks)] for t in self.times]
            found |= {f"{name}_{form}": [[of[name] for of in row] for row in each] for name in ("cka", "debiased")}
        if len(self.kept) > self.k:
            found["cknna"] = [
                [cknna(self.tokenizing[i], self.denoising[t, i], self.k) for i in range(self.blocks)]
                for t in self.times
            ]
        found["cosine"] = (self.cosines[..., 0] / self.cosines[..., 1].clamp_min(1)).tolist()
        return found
