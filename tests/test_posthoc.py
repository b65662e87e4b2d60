"""Averages that were not kept, from those that were: exact profiles, and a run that kept the same one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import TINY, command

from unite_fast import checkpoint
from unite_fast.base.errors import UserError
from unite_fast.checkpoint import posthoc
from unite_fast.optim import ema


def recursion(entry: float | str, weights: np.ndarray) -> np.ndarray:
    """The average as training updates it, over weights (T + 1, n); after each update (T + 1, n)."""
    found = [weights[0]]
    for t in range(1, len(weights)):
        d = float(ema.decay(entry, torch.tensor(float(t))))
        found.append(found[-1] + (1 - d) * (weights[t] - found[-1]))
    return np.stack(found)


@pytest.mark.parametrize("entry", [0.9, "std0.05", "std0.2"])
def test_a_profile_is_what_the_recursion_unfolds_to(entry):
    weights = np.random.default_rng(0).normal(size=(61, 3)).cumsum(0)
    kept = recursion(entry, weights)
    for t in (0, 1, 2, 37, 60):
        found = ema.profile(entry, t, 60)
        assert found.sum() == pytest.approx(1, abs=1e-12)
        assert np.allclose(found @ weights, kept[t], atol=1e-10)


def test_profiles_tend_to_the_integrals_of_the_paper():
    """Inner products of s^g (g + 1) / t^(g + 1) on [0, t] (arXiv 2312.02696, section 3.2)."""

    def exact(a: tuple[float, int], b: tuple[float, int]) -> float:
        (g, t), (h, u) = a, b
        both = min(t, u)
        return (g + 1) * (h + 1) * (both / t) ** g * (both / u) ** h / ((g + h + 1) * max(t, u))

    g, h = (ema.power_exponent(std) for std in (0.05, 0.1))
    x, y = ema.profile("std0.05", 40_000, 60_000), ema.profile("std0.1", 60_000, 60_000)
    assert float(x @ y) == pytest.approx(exact((g, 40_000), (h, 60_000)), rel=1e-3)
    assert float(x @ x) == pytest.approx(exact((g, 40_000), (g, 40_000)), rel=1e-3)


@pytest.mark.parametrize("target", ["std0.07", "std0.15", "std0.03"])
def test_a_combination_is_near_the_average_that_is_kept_directly(target):
    weights = np.random.default_rng(1).normal(size=(1001, 5)).cumsum(0)
    kept = [(entry, t) for entry in ("std0.05", "std0.1") for t in range(50, 1001, 50)]
    factors, error = ema.combination(kept, target, 1000)
    stored = {entry: recursion(entry, weights) for entry in ("std0.05", "std0.1")}
    found = sum(f * stored[entry][t] for f, (entry, t) in zip(factors, kept, strict=True))
    direct = recursion(target, weights)[1000]
    assert error < 0.03
    assert np.abs(found - direct).max() < 0.01 * np.abs(weights - direct).max()


@pytest.mark.parametrize("target", ["std0.2", "std0.07", "std0.25", 0.98])
def test_weights_that_never_change_stay_what_they_are(target):
    """The factors' sum is 1, and the profile hardly farther than that of the best factors of any sum."""
    kept = [(entry, t) for entry in ("std0.05", "std0.1") for t in range(50, 601, 50)]
    factors, error = ema.combination(kept, target, 600)
    assert factors.sum() == pytest.approx(1, abs=1e-12)
    basis = np.stack([ema.profile(entry, t, 600) for entry, t in kept], axis=1)
    wanted = ema.profile(target, 600, 600)
    free = np.linalg.lstsq(basis, wanted, rcond=1e-12)[0]
    least = np.linalg.norm(basis @ free - wanted) / np.linalg.norm(wanted)
    assert least <= error * (1 + 1e-9)
    assert error < 1.1 * least
    system = np.block([[basis.T @ basis, np.ones((24, 1))], [np.ones((1, 24)), np.zeros((1, 1))]])  # by a multiplier
    direct = np.linalg.solve(system, np.append(basis.T @ wanted, 1))[:24]
    assert np.allclose(basis @ factors, basis @ direct, atol=1e-6 * wanted.max())


def test_an_average_that_was_kept_is_taken_as_it_is():
    factors, error = ema.combination([("std0.1", 100), ("std0.05", 200), (0.9, 200), ("std0.1", 200)], "std0.1", 200)
    assert np.allclose(factors, [0, 0, 0, 1], atol=1e-9)
    assert error < 1e-9
    assert ema.combination([("std0.1", 100)], 0.9, 100)[0].tolist() == [1.0]


def test_a_run_gives_the_average_that_another_kept(tmp_path, monkeypatch):
    """Of one run, which has kept all three: as if it had kept two of them, or the wanted one alone."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    words = ("--config", tmp_path / "tiny.yaml", "train.max_steps=20", "train.checkpoint_every=2", "optim.lr=6e-3",
             "train.keep_every=2", "optim.warmup_epochs=0.02", "optim.ema_extra=[std0.1,std0.15,std0.2]",
             "efficiency.kernels=fused", "model.num_latents=4")  # fmt: skip
    said = command("train.py", *words, f"run_dir={tmp_path / 'run'}")
    assert said.returncode == 0, said.stderr
    combine = posthoc.combined

    def of(*names: str) -> dict[str, torch.Tensor]:
        def as_if(checkpoints: list[posthoc.Kept], weights: str) -> dict[str, torch.Tensor]:
            assert [c.updates for c in checkpoints] == list(range(2, 21, 2))
            kept = [c._replace(averages={n: c.averages[n] for n in names}) for c in checkpoints]
            return combine(kept, weights)

        monkeypatch.setattr(posthoc, "combined", as_if)
        return checkpoint.load_weights(tmp_path / "run", "posthoc_std0.15")[0]

    direct, _ = checkpoint.load_weights(tmp_path / "run", "ema_std0.15")
    raw, _ = checkpoint.load_weights(tmp_path / "run", "model")
    found = of("ema_std0.1", "ema_std0.2")
    assert found.keys() == direct.keys()
    far = sum(float((raw[n] - direct[n]).square().sum()) for n in direct) ** 0.5
    near = sum(float((found[n] - direct[n]).square().sum()) for n in direct) ** 0.5
    assert near < 0.05 * far
    assert all(torch.allclose(tensor, direct[n], atol=1e-6) for n, tensor in of("ema_std0.15").items())
    with pytest.raises(UserError, match=r"come no nearer to it than \d+%; keep more"):
        of("ema")


def test_a_main_average_that_warms_up_is_none_of_a_fixed_decay(tmp_path):
    """Its decays differ, so it takes no part: alone it makes nothing, beside others it changes nothing."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    words = ("--config", tmp_path / "tiny.yaml", "train.max_steps=3", "optim.ema_decay=0.9", "optim.ema_warmup=true",
             "optim.ema_extra=[std0.15]", "model.num_latents=4")  # fmt: skip
    said = command("train.py", *words, f"run_dir={tmp_path / 'run'}")
    assert said.returncode == 0, said.stderr
    with pytest.raises(UserError, match=r"posthoc_0\.9: 1 averages in 1 checkpoints .* come no nearer"):
        checkpoint.load_weights(tmp_path / "run", "posthoc_0.9")
    found, _ = checkpoint.load_weights(tmp_path / "run", "posthoc_std0.15")
    direct, _ = checkpoint.load_weights(tmp_path / "run", "ema_std0.15")
    assert all(torch.allclose(tensor, direct[n], atol=1e-6) for n, tensor in found.items())


def test_names():
    assert posthoc.entry_of("ema_std0.05") is None
    assert posthoc.entry_of("posthoc_std0.07") == "std0.07"
    assert posthoc.entry_of("posthoc_0.999") == 0.999
    assert posthoc.entry_of("posthoc_std.28") == "std.28"
    for wrong in ("posthoc", "posthoc_std0.5", "posthoc_std0.288", "posthoc_1.5", "posthoc_std", "posthoc_0.0"):
        with pytest.raises(UserError, match=r"posthoc_std0\.01 to"):
            posthoc.entry_of(wrong)
