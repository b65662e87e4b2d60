"""Several moving averages of the weights, kept at once beside the main one (``optim.ema_decay``).

    fixed           e += (1 - d)(p - e)
    power function  d = (1 - 1/t)^(g + 1) at update t: the average that weighs the weights of update s by s^g. Its
                    width, as a part of the training so far, stays what it is however long the run lasts: it is given
                    by the standard deviation of that profile relative to t (Karras et al. 2024, arXiv 2312.02696,
                    section 3.1). The first update replaces the initial weights.

Names, in checkpoints and wherever weights are chosen: "ema" (the main one), "ema_0.9999", "ema_std0.05".
"""

from __future__ import annotations

from torch import Tensor

from unite_fast.config import OptimConfig


def names(config: OptimConfig) -> list[str]:
    """Of all averages that a run keeps: "ema" and those of ``optim.ema_extra``."""
    return ["ema", *(name(entry) for entry in config.ema_extra)]


def name(entry: float | str) -> str:
    """Of one entry of ``optim.ema_extra``."""
    return f"ema_{entry}" if isinstance(entry, str) else f"ema_{entry:.12g}"


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
