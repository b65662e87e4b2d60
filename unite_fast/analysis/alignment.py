"""How alike the tokenizing and the denoising pass are, layer by layer (arXiv 2603.22283, Figure 6 left and middle).

CKA comes from sums over samples of features and of their products, so that no kernel of all pairs is ever made; CKNNA
compares pairs, of features that are kept. The sums are of features less a shift near their mean: what varies little
around a large mean would be lost in fourth powers.

Shape letters: n examples, D features, B samples of a tile, K registers, k neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unite_fast.analysis.walk import ROUNDING, Denoised, Kept, Tile
from unite_fast.parallel.distributed import Ranks

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
    "cknna": "Huh et al. 2024 (arXiv 2405.07987, appendix A, equations 16 to 18), of unit features: the sum over pairs "
    "(i, j), of which j is among the k nearest neighbours of i in both sets, of the product of their inner products, "
    "each less its mean over j; divided by the root of the product of such sums of each set with itself. An example is "
    "a sample, the mean over its registers",
    "cosine": "mean over samples and registers of the cosine between the two activations of one register",
}


class PairSums:
    """Sums over examples x, y (D,) each, from which CKA follows in both its forms. float64.

    They are of examples less ``shifts``, which the first of them decide; CKA does not change with it.
    """

    def __init__(self, d: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.count = zeros(1)
        self.shifts = {"x": zeros(d), "y": zeros(d)}
        self.first = {"x": zeros(d), "y": zeros(d)}
        self.squares = {"x": zeros(1), "y": zeros(1)}  # of |x|^2
        self.products = {"xx": zeros(d, d), "xy": zeros(d, d), "yy": zeros(d, d)}
        self.fourth = {"xx": zeros(1), "xy": zeros(1), "yy": zeros(1)}  # of |x|^2 |y|^2
        self.weighted = {name: zeros(d) for name in ("xx", "xy", "yx", "yy")}  # xy: of x |y|^2
        self.begun = False

    def add(self, x: Tensor, y: Tensor) -> None:
        """x, y (n, D)."""
        both = {"x": x.double(), "y": y.double()}
        if not self.begun and len(x):
            self.begun, self.shifts = True, {name: v.mean(0) for name, v in both.items()}
        of = {name: v - self.shifts[name] for name, v in both.items()}
        squares = {name: v.square().sum(1) for name, v in of.items()}
        self.count += len(x)
        for name, v in of.items():
            self.first[name] += v.sum(0)
            self.squares[name] += squares[name].sum()
        for pair in self.products:
            self.products[pair].addmm_(of[pair[0]].T, of[pair[1]])
            self.fourth[pair] += squares[pair[0]] @ squares[pair[1]]
        for pair in self.weighted:
            self.weighted[pair] += squares[pair[1]] @ of[pair[0]]

    def tensors(self) -> list[Tensor]:
        groups = (self.first, self.squares, self.products, self.fourth, self.weighted)
        return [self.count, *(t for group in groups for t in group.values())]

    def moved(self, shifts: dict[str, Tensor]) -> PairSums:
        """The same examples less other shifts: (x - old) = (x - new) less what lies between, multiplied out."""
        n, found = self.count, PairSums(len(self.first["x"]), self.count.device)
        by = {name: self.shifts[name] - shifts[name] for name in shifts}
        length = {name: d @ d for name, d in by.items()}
        found.count, found.shifts, found.begun = n, shifts, True
        for a, d in by.items():
            found.first[a] = self.first[a] + n * d
            found.squares[a] = self.squares[a] + 2 * d @ self.first[a] + n * length[a]
        for pair in self.products:
            a, b = pair
            product, sums = self.products[pair], self.first
            found.products[pair] = product + torch.outer(sums[a], by[b]) + torch.outer(by[a], found.first[b])
            with_a, with_b = self.weighted[b + a] @ by[b], self.weighted[pair] @ by[a]
            found.fourth[pair] = (
                self.fourth[pair] + 2 * (with_a + with_b) + 4 * by[a] @ product @ by[b]
                + length[b] * (self.squares[a] + 2 * by[a] @ sums[a]) + length[a] * found.squares[b]
            )  # fmt: skip
        for pair in self.weighted:
            a, b = pair
            product = self.products[pair] if pair in self.products else self.products[b + a].T
            found.weighted[pair] = (
                self.weighted[pair] + 2 * product @ by[b] + length[b] * self.first[a] + by[a] * found.squares[b]
            )
        return found

    def centred(self) -> PairSums:
        """Of features less their means."""
        return self.moved({name: shift + self.first[name] / self.count for name, shift in self.shifts.items()})

    def _biased(self, pair: str) -> float:
        """|X'Y|^2; of centred features, as the next."""
        return float(self.products[pair].square().sum())

    def _unbiased(self, pair: str) -> float:
        """n (n - 3) times the unbiased estimate of HSIC with linear kernels K = XX', L = YY' of zero diagonals.

        tr(KL) + (1'K1)(1'L1) / ((n - 1)(n - 2)) - 2 (1'KL1) / (n - 2). It does not change when the features are
        centred, where X'1 = 0, so the three are |X'Y|^2 less the sum of |x|^2 |y|^2, the sums of |x|^2 and |y|^2, and
        that of |x|^2 |y|^2.
        """
        n, both, (x, y) = float(self.count), float(self.fourth[pair]), (float(self.squares[name]) for name in pair)
        return self._biased(pair) - both + x * y / ((n - 1) * (n - 2)) - 2 * both / (n - 2)

    def _constant(self, centred: PairSums) -> bool:
        """Whether a set varies by rounding alone."""
        for name, shift in self.shifts.items():
            whole = self.squares[name] + 2 * shift @ self.first[name] + self.count * (shift @ shift)
            if float(centred.squares[name]) <= ROUNDING * float(whole):
                return True
        return False

    def cka(self) -> dict[str, float]:
        """{"cka", "debiased"}; nan without examples and where a set is constant, the second also below 4 examples, or
        where a set alone has no positive estimate."""
        found, centred = {"cka": math.nan, "debiased": math.nan}, self.centred()
        if float(self.count) == 0 or self._constant(centred):
            return found
        for name, hsic in (("cka", centred._biased), ("debiased", centred._unbiased)):
            own = hsic("xx") * hsic("yy") if name == "cka" or float(self.count) > 3 else 0.0
            if own > 0:
                found[name] = hsic("xy") / math.sqrt(own)
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

    def reduce(self, ranks: Ranks) -> None:
        """The shifts become those of rank 0, which has the first tile."""
        for forms in self.sums.values():
            for form, sums in forms.items():
                shifts = {name: shift * float(ranks.is_main) for name, shift in sums.shifts.items()}
                ranks.sum_(list(shifts.values()))
                forms[form] = sums.moved(shifts)
                ranks.sum_(forms[form].tensors())
        ranks.sum_([self.cosines, *self.tokenizing, *self.denoising.values()])

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
