"""Images from noise: the probability-flow ODE from t = 0 to 1, with classifier-free guidance.

Shape letters: B batch, K registers, C latent dim, Q channels, S image size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unite_fast import flow
from unite_fast.config import UserError
from unite_fast.model.unite import UNITE
from unite_kernels import philox

SOLVERS = ("dopri5", "heun", "euler")
ORDERS = ("norm_first", "cfg_first", "both")
SAMPLE_STREAM = 1 << 16  # of the initial noise; training uses streams below
RTOL, ATOL = 1e-3, 1e-6


def initial_noise(model: UNITE, seeds: Sequence[int] | Tensor, device: torch.device | str) -> Tensor:
    """Standard normal (B, K, C) float32: image i's noise is a function of seeds[i] alone."""
    samples = torch.as_tensor(seeds, dtype=torch.int64, device=device)
    return philox.normal(0, SAMPLE_STREAM, samples, model.latent_shape)


class GuidedField:
    """The ODE's velocity v(t, z) for given labels; counts its evaluations in ``evaluations`` (NFE)."""

    def __init__(self, model: UNITE, labels: Tensor, scale: float, interval: tuple[float, float], order: str) -> None:
        self.model, self.labels, self.order = model, labels, order
        self.scale, self.interval = scale, interval
        self.null = torch.full_like(labels, model.null_class)
        self.evaluations = 0

    def __call__(self, t: Tensor, z: Tensor) -> Tensor:
        """t scalar tensor, z (B, K, C) -> (B, K, C). Outside the interval, or at scale 1, the class alone is asked."""
        self.evaluations += 1
        return flow.velocity(self.predict(t, z), z, t)

    def predict(self, t: Tensor, z: Tensor) -> Tensor:
        """The guided x0 prediction (B, K, C)."""
        times = t.expand(len(z)).to(torch.float32)
        if self.scale == 1 or not flow.inside(float(t), self.interval):
            return self.model.denoise(z, times, self.labels).to(z.dtype)
        both = torch.cat([z, z]), torch.cat([times, times]), torch.cat([self.null, self.labels])
        null, conditional = self.model.denoise_raw(*both).chunk(2)
        return flow.combine(null, conditional, self.scale, self.order, self.model.normalise).to(z.dtype)


def _dopri5(field: GuidedField, z: Tensor, grid: Tensor) -> Tensor:
    from torchdiffeq import odeint

    result: Any = odeint(field, z, grid, rtol=RTOL, atol=ATOL, method="dopri5")
    return result[-1]


def _euler(field: GuidedField, z: Tensor, grid: Tensor) -> Tensor:
    for t, t_next in itertools.pairwise(grid):
        z = z + (t_next - t) * field(t, z)
    return z


def _heun(field: GuidedField, z: Tensor, grid: Tensor) -> Tensor:
    for t, t_next in itertools.pairwise(grid):
        h = t_next - t
        v = field(t, z)
        z = z + h / 2 * (v + field(t_next, z + h * v))
    return z


def check(solver: str, steps: int, interval: Sequence[float], order: str) -> None:
    """Raises UserError when sampling options make no sense."""
    if solver not in SOLVERS:
        raise UserError(f"unknown solver '{solver}'; choose one of {', '.join(SOLVERS)}")
    if order not in ORDERS:
        raise UserError(f"unknown guidance order '{order}'; choose one of {', '.join(ORDERS)}")
    if steps < 1 or (solver == "dopri5" and steps < 2):
        raise UserError(f"too few steps: {steps}")
    if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
        raise UserError(f"guidance interval {list(interval)} must be two numbers with 0 <= low < high <= 1")


@torch.no_grad()
def sample(
    model: UNITE,
    labels: Tensor,
    noise: Tensor | None = None,
    solver: str = "dopri5",
    steps: int = 50,
    cfg_scale: float = 1.0,
    cfg_interval: tuple[float, float] = (0.0, 1.0),
    cfg_order: str = "norm_first",
    return_latents: bool = False,
    seeds: Sequence[int] | Tensor | None = None,
) -> Any:
    """Images (B, Q, S, S) float32 in [0, 1] for labels int64 (B,); with ``return_latents`` also the latents (B, K, C).

    noise: initial state (B, K, C); else it is drawn from ``seeds``, one integer per image (0, 1, ... by default).
    steps: intervals of the shifted time grid for heun (two evaluations each) and euler; for dopri5 the number of
    grid points, which does not change the result. dopri5 (torchdiffeq, rtol 1e-3, atol 1e-6) chooses its steps for
    the batch as a whole, so an image depends slightly on its batch mates; with the other solvers it does not.
    Raises UserError on options that make no sense.
    """
    check(solver, steps, cfg_interval, cfg_order)
    device = next(model.parameters()).device
    labels = labels.to(device)
    if noise is None:
        noise = initial_noise(model, range(len(labels)) if seeds is None else seeds, device)
    if noise.shape != (len(labels), *model.latent_shape):
        raise UserError(f"noise has shape {tuple(noise.shape)}, expected {(len(labels), *model.latent_shape)}")
    field = GuidedField(model, labels, cfg_scale, cfg_interval, cfg_order)
    solve = {"dopri5": _dopri5, "heun": _heun, "euler": _euler}[solver]
    grid = flow.time_grid(steps if solver == "dopri5" else steps + 1, model.time_shift, device)
    training = model.training
    model.eval()
    latents = solve(field, noise.to(device), grid)
    images = model.decode(latents).float().clamp(0, 1)
    model.train(training)
    return (images, latents) if return_latents else images
