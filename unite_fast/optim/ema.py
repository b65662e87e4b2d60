"""Several moving averages of the weights, kept at once beside the main one (``optim.ema_decay``).

    fixed           e += (1 - d)(p - e)
    warmed up       of the main one with optim.ema_warmup: d at most (1 + t) / (10 + t) at update t, so that the initial
                    weights are forgotten at once; after 10 / (1 - d) updates it is the fixed one
    power function  d = (1 - 1/t)^(g + 1) at update t: the average that weighs the weights of update s by s^g. Its
                    width, as a part of the training so far, stays what it is however long the run lasts: it is given
                    by the standard deviation of that profile relative to t (Karras et al. 2024, arXiv 2312.02696,
                    section 3.1). The first update replaces the initial weights.

An average is a sum of the weights after each update, so one that was not kept follows from several that were, at
several times, as far as the sum of their profiles can take the shape of its own (section 3.2 there).

Names, in checkpoints and wherever weights are chosen: "ema" (the main one), "ema_0.9999", "ema_std0.05"; wherever they
are chosen also "posthoc_std0.07" (``checkpoint.posthoc``).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from unite_fast.config import OptimConfig


def names(config: OptimConfig) -> list[str]:
    """Of all averages that a run keeps: "ema" and those of ``optim.ema_extra``."""
    return ["ema", *(name(entry) for entry in config.ema_extra)]


def name(entry: float | str) -> str:
    """Of one entry of ``optim.ema_extra``."""
    return f"ema_{entry}" if isinstance(entry, str) else f"ema_{entry:.12g}"


def warmed(decay: float, updates: Tensor) -> Tensor:
    """The decay at update number ``updates`` (0-d, on the device) of a main average that warms up: 0-d float64."""
    t = updates.double()
    return ((1.0 + t) / (10.0 + t)).clamp_max(decay)


def power_exponent(std: float) -> float:
    """g of the power function s^g on (0, 1] whose relative standard deviation is ``std``, below 0.289 (g = 0).

    std^2 = (g + 1) / ((g + 2)^2 (g + 3)), which falls as g grows.
    """
    low, high = 0.0, 1.0 / std
    for _ in range(100):
        middle = (low + high) / 2
        wide = (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > std * std
        low, high = (middle, high) if wide else (low, middle)
    return (low + high) / 2


def decay(entry: float | str, updates: Tensor) -> float | Tensor:
    """The decay at update number ``updates`` (0-d, on the device): a float, or a 0-d float64 tensor if it changes."""
    if not isinstance(entry, str):
        return entry
    exponent = power_exponent(float(entry.removeprefix("std"))) + 1.0
    return (1.0 - 1.0 / updates.double().clamp_min(1.0)) ** exponent


def profile(entry: float | str, updates: int, until: int) -> np.ndarray:
    """How much of the weights after each update 0 .. until an average holds after ``updates``: float64, sum 1.

    What the recursion unfolds to: of a power function (s^(g + 1) - (s - 1)^(g + 1)) / updates^(g + 1).
    """
    found, s = np.zeros(until + 1), np.arange(updates + 1, dtype=np.float64)
    if isinstance(entry, str):
        exponent = power_exponent(float(entry.removeprefix("std"))) + 1.0
        found[1 : updates + 1] = np.diff((s / max(updates, 1)) ** exponent)
        found[0] = float(updates == 0)
    else:
        found[: updates + 1] = (1.0 - entry) * entry ** (updates - s)
        found[0] = entry**updates
    return found


def combination(kept: Sequence[tuple[float | str, int]], entry: float | str, updates: int) -> tuple[np.ndarray, float]:
    """(factors of the ``kept`` averages, relative error) whose sum is nearest to ``entry`` after ``updates``.

    kept: entries and after how many updates each was. Least squares on profiles, where arXiv 2312.02696 has their
    integrals, among factors whose sum is 1, so that what never changes stays what it is. The error is that of the
    profile, relative to its norm.
    """
    wanted = profile(entry, updates, updates)
    basis = np.stack([profile(of, at, updates) for of, at in kept], axis=1)
    n = len(kept)
    even = np.full(n, 1 / n)
    # Steps that leave the sum alone: an orthonormal basis of what is orthogonal to a vector of ones.
    steps = np.linalg.qr(np.eye(n)[:, : n - 1] - 1 / n)[0]
    factors = even + steps @ np.linalg.lstsq(basis @ steps, wanted - basis @ even, rcond=1e-12)[0]
    factors += (1 - factors.sum()) / n
    return factors, float(np.linalg.norm(basis @ factors - wanted) / np.linalg.norm(wanted))
