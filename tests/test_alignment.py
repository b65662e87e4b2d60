"""CKA, CKNNA and cosine: streamed sums against direct formulas in float64 and other libraries."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from ranks import on_ranks
from torch import Tensor

from unite_fast.analysis import alignment, plots
from unite_fast.analysis.walk import Denoised, Tile
from unite_fast.parallel.distributed import Ranks

ONE = Ranks(0, 1, torch.device("cpu"))
FORMS = ("cka", "debiased")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def features(n: int, d: int) -> tuple[Tensor, Tensor]:
    x = drawn(n, d) + 3
    return x, 0.5 * x @ drawn(d, d, seed=1) + drawn(n, d, seed=2) - 1


def kernels_hsic(k: Tensor, l: Tensor) -> float:  # noqa: E741
    """Biased HSIC of two kernels (Gretton et al. 2005), up to its factor."""
    h = torch.eye(len(k), dtype=k.dtype) - 1 / len(k)
    return float(torch.trace(k @ h @ l @ h))


def kernels_unbiased(k: Tensor, l: Tensor) -> float:  # noqa: E741
    """Song et al. 2012, equation 5, from the kernels."""
    n = len(k)
    k, l = k - k.diag().diag(), l - l.diag().diag()  # noqa: E741
    one = torch.ones(n, dtype=k.dtype)
    middle = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
    return float(torch.trace(k @ l) + middle - 2 / (n - 2) * one @ k @ l @ one) / (n * (n - 3))


@pytest.mark.parametrize("cut", [[31], [1, 13, 17]])
def test_cka_of_sums_is_that_of_kernels(cut):
    x, y = features(31, 6)
    sums = alignment.PairSums(6, torch.device("cpu"))
    for a, b in zip(x.split(cut), y.split(cut), strict=True):
        sums.add(a, b)
    k, l = x @ x.T, y @ y.T  # noqa: E741
    for name, hsic in (("cka", kernels_hsic), ("debiased", kernels_unbiased)):
        expected = hsic(k, l) / math.sqrt(hsic(k, k) * hsic(l, l))
        assert sums.cka()[name] == pytest.approx(expected, rel=1e-10), name


def test_cka_of_few_examples_and_of_the_same():
    x, y = features(3, 2)
    sums = alignment.PairSums(2, torch.device("cpu"))
    sums.add(x, y)
    assert math.isnan(sums.cka()["debiased"])
    own = alignment.PairSums(2, torch.device("cpu"))
    own.add(y, y @ torch.tensor([[0.0, 2.0], [-2.0, 0.0]], dtype=torch.float64))  # turned and scaled
    assert own.cka()["cka"] == pytest.approx(1)


def test_debiased_cka_of_independent_features_is_near_zero():
    sums = alignment.PairSums(40, torch.device("cpu"))
    sums.add(drawn(60, 40), drawn(60, 40, seed=5))
    assert sums.cka()["cka"] > 0.3
    assert abs(sums.cka()["debiased"]) < 0.05


def test_cknna_is_the_sum_over_mutual_neighbours():
    """With scikit-learn's neighbours, pair by pair."""
    from sklearn.neighbors import NearestNeighbors

    x, y = (v / v.norm(dim=1, keepdim=True) for v in features(23, 5))
    near = [
        NearestNeighbors(n_neighbors=4, metric="cosine", algorithm="brute").fit(v.numpy()).kneighbors()[1].tolist()
        for v in (x, y)
    ]

    def align(p: Tensor, q: Tensor, of_p: list, of_q: list) -> float:
        k, l = p @ p.T, q @ q.T  # noqa: E741
        return sum(
            float((k[i, j] - k[i].mean()) * (l[i, j] - l[i].mean()))
            for i in range(23)
            for j in set(of_p[i]) & set(of_q[i])
        )

    expected = align(x, y, *near) / math.sqrt(align(x, x, near[0], near[0]) * align(y, y, near[1], near[1]))
    for block in (7, 100):
        assert alignment.cknna(x, y, 4, block) == pytest.approx(expected, rel=1e-10)


def direct(x: Tensor, y: Tensor) -> dict[str, float]:
    """Both forms of CKA of x, y (n, D), from their kernels."""
    x, y = (v.double() - v.double().mean(0) for v in (x, y))  # unbiased HSIC does not see it; rounding does
    k, l = x @ x.T, y @ y.T  # noqa: E741
    forms = zip(FORMS, (kernels_hsic, kernels_unbiased), strict=True)
    return {name: hsic(k, l) / math.sqrt(hsic(k, k) * hsic(l, l)) for name, hsic in forms}


def test_a_large_mean_costs_nothing():
    """Ten thousand times the deviation: in fourth powers of the features nothing of them is left."""
    x, y = features(64, 5)
    sums = alignment.PairSums(5, ONE.device)
    for a, b in zip((x + 1e4).split(32), (y - 1e4).split(32), strict=True):
        sums.add(a, b)
    for name, value in direct(x, y).items():
        assert sums.cka()[name] == pytest.approx(value, rel=1e-6), name


@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_of_what_is_constant_there_is_no_alignment(noise):
    """Not -1 of 0/0; and not that of its rounding."""
    x, y = features(40, 5)
    sums = alignment.PairSums(5, ONE.device)
    for part in (slice(0, 13), slice(13, 40)):
        sums.add(x[part], 3.7 + noise * y[part])
    assert all(math.isnan(value) for value in sums.cka().values())
    empty = alignment.PairSums(5, ONE.device)
    empty.add(x[:0], y[:0])
    assert all(math.isnan(value) for value in empty.cka().values())


def of_shares(ranks: Ranks) -> list[float]:
    """Each process has other examples, around another mean; the last one has none."""
    x, y = features(60, 4)
    x = x + 100 * (torch.arange(60) // 20)[:, None]
    sums = alignment.Alignment(torch.arange(0), 1, 4, ranks.device, (0.5,))
    share = range(3)[ranks.rank : 2 : 2] if ranks.world_size > 1 else range(2)
    for part in share:
        rows = slice(part * 20, part * 20 + 20)
        sums.sums[0.5, 0]["registers"].add(x[rows], y[rows])
    sums.reduce(ranks)
    return list(sums.sums[0.5, 0]["registers"].cka().values())


def test_processes_agree_on_a_shift():
    alone, x, y = of_shares(ONE), *features(60, 4)
    x = x + 100 * (torch.arange(60) // 20)[:, None]
    assert alone == pytest.approx(list(direct(x[:40], y[:40]).values()), rel=1e-9)
    for found in on_ranks(3, of_shares):
        assert found == pytest.approx(alone, rel=1e-9)


def test_each_time_and_block_has_its_own_row():
    """Absent registers hold numbers, too. Three times, two blocks; each of their numbers by its direct formula."""
    times, n, k, d, sizes = (0.1, 0.5, 0.9), 40, 3, 6, torch.arange(40) % 3 + 1
    there = torch.arange(k) < sizes[:, None]
    base = [drawn(n, k, d, seed=i) + 2 for i in range(2)]
    seen = {t: [x * t + drawn(n, k, d, seed=10 * i + int(10 * t)) for i, x in enumerate(base)] for t in times}
    found = alignment.Alignment(torch.arange(n), 2, d, ONE.device, times, k=5, paired=n)
    model = SimpleNamespace()
    for rows in (slice(0, 32), slice(32, 40)):
        latents, samples = torch.zeros(len(sizes[rows]), k, 2), torch.arange(n)[rows]
        tile = Tile(model, {}, samples, samples, sizes[rows], latents, [x[rows].float() for x in base])  # pyright: ignore
        found.begin(tile)
        for t in reversed(times):
            found.add(tile, Denoised(t, latents, [y[rows].float() for y in seen[t]]))
    result = found.result()
    assert result["times"] == list(times)
    for row, t in enumerate(times):
        for block, (x, y) in enumerate(zip(base, seen[t], strict=True)):
            x, y = x.float().double(), y.float().double()
            means = [torch.stack([v[i, : sizes[i]].mean(0) for i in range(n)]) for v in (x, y)]
            for form, pair in (("registers", (x[there], y[there])), ("mean", means)):
                for name, value in direct(*pair).items():
                    assert result[f"{name}_{form}"][row][block] == pytest.approx(value, rel=1e-9), (name, form, t)
            assert result["cknna"][row][block] == pytest.approx(alignment.cknna(means[0], means[1], 5), rel=1e-9)
            dots = [float(a @ b / a.norm() / b.norm()) for a, b in zip(x[there], y[there], strict=True)]
            assert result["cosine"][row][block] == pytest.approx(sum(dots) / len(dots), rel=1e-9)


def test_pictures_of_a_measure_have_one_range(tmp_path, monkeypatch):
    drawn_figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn_figures.append(figure))
    of = {"times": [0.1, 0.9], "debiased_mean": [[0.9, 0.95], [-0.4, None]], "cosine": [[0.8, 0.9], [0.7, 0.6]]}
    plots.alignment(tmp_path / "a.png", {"a": of, "b": of | {"cosine": [[0.1, 0.2], [0.3, 0.4]]}})
    panels = {axes.get_title(): axes.get_ylim() for axes in drawn_figures[0].axes}
    for title, lowest in (("CKA of samples, debiased", -0.4), ("cosine", 0.1)):
        early, late = (panels[f"{title}, t = {t}"] for t in (0.1, 0.9))
        assert early == late
        assert early[0] < lowest < early[1]
