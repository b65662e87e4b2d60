"""The flow's mathematics as pure functions: path, x-prediction to velocity, guidance, time grid.

Time runs from t = 0 (noise) to t = 1 (data): z_t = t z + (1 - t) eps. The network predicts the clean latents x0.

Shape letters: B batch, K registers, C latent dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

EPS = 0.05  # floor of 1 - t in the velocity, in training and sampling


def shift_time(t: Tensor, a: float) -> Tensor:
    """t' = a t / (1 + (a - 1) t): the resolution shift; 0 and 1 stay."""
    return a * t / (1 + (a - 1) * t)


def interpolate(z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """t z + (1 - t) noise; z, noise (B, K, C), t (B,)."""
    t = t[:, None, None]
    return t * z + (1 - t) * noise


def velocity(x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
    """(x0 - z_t) / max(1 - t, 0.05); x0, zt (B, K, C), t (B,) or a scalar tensor."""
    remaining = (1 - t).clamp_min(EPS)
    return (x0 - zt) / (remaining[:, None, None] if t.ndim else remaining)


def inside(t: float, interval: tuple[float, float]) -> bool:
    """Whether guidance acts at time t: low < t < high, and low = 0 includes t = 0."""
    low, high = interval
    return (low < t or (low == 0 and t >= 0)) and t < high


def combine(
    null: Tensor, conditional: Tensor, scale: Tensor | float, order: str, normalise: Callable[[Tensor], Tensor]
) -> Tensor:
    """Classifier-free guidance x0 = null + w (class - null) of raw predictions, normalised in the given order.

    norm_first: normalise each, combine. cfg_first: combine, normalise. both: normalise each, combine, normalise.
    """
    if order == "cfg_first":
        return normalise(null + scale * (conditional - null))
    null, conditional = normalise(null), normalise(conditional)
    x0 = null + scale * (conditional - null)
    return normalise(x0) if order == "both" else x0


def time_grid(points: int, a: float, device: torch.device | str = "cpu") -> Tensor:
    """``points`` times from 0 to 1, evenly spaced and then shifted, float32."""
    return shift_time(torch.linspace(0.0, 1.0, points, device=device), a)
