"""The losses of a flow step.

A method of training (consistency, shortcut, ...) is one function here, NAME_loss, its NAME in ``config/keys.py``: it
gets the network, not a finished prediction, and may call it as often as it likes.

Shape letters: B batch, K registers, C latent dim.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from unite_fast.config import ObjectiveConfig, choices
from unite_fast.flow import velocity

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]  # (zt (B, K, C), t (B,), labels (B,)) -> clean latents (B, K, C)

# (denoise, z, zt, t, labels, weight) -> float32 0-d. z clean, zt noised latents (B, K, C), times t (B,), labels (B,)
# after the drop; weight: of each register's error in the mean, (B, K, 1), or None where all count alike.
FlowLoss = Callable[[Denoise, Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]


def mean(error: Tensor, weight: Tensor | None) -> Tensor:
    """Of an error (B, K, C)."""
    return error.mean() if weight is None else (error * weight).mean()


def velocity_loss(
    denoise: Denoise, z: Tensor, zt: Tensor, t: Tensor, labels: Tensor, weight: Tensor | None = None
) -> Tensor:
    """Mean squared difference of the velocities (the official code's loss)."""
    x0 = denoise(zt, t, labels).float()
    return mean((velocity(z.float(), zt, t) - velocity(x0, zt, t)).square(), weight)


def x0_loss(denoise: Denoise, z: Tensor, zt: Tensor, t: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared error of the clean latents (arXiv 2603.22283, section 3.2)."""
    return mean((z.float() - denoise(zt, t, labels).float()).square(), weight)


# By ``objective.flow_loss``: the function NAME_loss.
LOSSES: dict[str, FlowLoss] = {name: globals()[f"{name}_loss"] for name in choices(ObjectiveConfig, "flow_loss")}
