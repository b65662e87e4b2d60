"""Images from noise: the probability-flow ODE from t = 0 to 1, with classifier-free guidance.

Shape letters: B batch, K registers, C latent dim, Q channels, S image size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unite_fast import flow
from unite_fast.base.errors import UserError
from unite_fast.config import SampleConfig
from unite_fast.efficiency import execution
from unite_fast.flow import solvers
from unite_fast.flow.field import GuidedField, Replays
from unite_fast.model.unite import UNITE
from unite_kernels import philox

SOLVERS = ("dopri5", *solvers.FIXED)
ORDERS = ("norm_first", "cfg_first", "both")
SAMPLE_STREAM = 1 << 16  # of the initial noise; training uses streams below
RTOL, ATOL = 1e-3, 1e-6
TILE = 32  # images per forward pass when bits must not depend on the request


def initial_noise(model: UNITE, seeds: Sequence[int] | Tensor, device: torch.device | str) -> Tensor:
    """Standard normal (B, K, C) float32: image i's noise is a function of seeds[i] alone."""
    samples = torch.as_tensor(seeds, dtype=torch.int64, device=device)
    return philox.normal(0, SAMPLE_STREAM, samples, model.latent_shape)


def compile_blocks(model: UNITE) -> None:
    """Compiles the transformer blocks in place, for sampling; see ``efficiency/compiling.py``.

    Six graphs with guidance, three without: of the encoder's blocks before and among the class tokens and of its last
    one, at each batch size; one of the decoder's. Rounding changes; equal seeds still give equal bits, since the
    network runs at one shape.
    """
    execution.compile_stacks(model, inference=True)


def open_replays(wanted: bool, device: torch.device) -> Replays | None:
    """CUDA graphs for ``sample`` if they are wanted. Raises UserError without a GPU."""
    if wanted and device.type != "cuda":
        raise UserError(f"--graph needs a GPU, this is {device}; leave it out")
    return Replays(capture=True) if wanted else None


def _dopri5(field: GuidedField, z: Tensor, grid: Tensor) -> Tensor:
    from torchdiffeq import odeint

    result: Any = odeint(field, z, grid, rtol=RTOL, atol=ATOL, method="dopri5")
    return result[-1]


def check(solver: str, steps: int, interval: Sequence[float], order: str, scale: float) -> None:
    """Raises UserError when sampling options make no sense."""
    if solver not in SOLVERS:
        raise UserError(f"unknown solver '{solver}'; choose one of {', '.join(SOLVERS)}")
    if order not in ORDERS:
        raise UserError(f"unknown guidance order '{order}'; choose one of {', '.join(ORDERS)}")
    if steps < 1 or (solver == "dopri5" and steps < 2):
        raise UserError(f"too few steps: {steps}")
    if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
        raise UserError(f"guidance interval {list(interval)} must be two numbers with 0 <= low < high <= 1")
    if solver in solvers.MULTISTEP and scale != 1:
        solvers.jumps(steps, interval)


@torch.no_grad()
def sample(
    model: UNITE,
    labels: Tensor,
    noise: Tensor | None = None,
    solver: str = SampleConfig.solver,
    steps: int = SampleConfig.steps,
    cfg_scale: float = SampleConfig.cfg_scale,
    cfg_interval: tuple[float, float] = SampleConfig.cfg_interval,
    cfg_order: str = SampleConfig.cfg_order,
    return_latents: bool = False,
    seeds: Sequence[int] | Tensor | None = None,
    counts: dict[str, int] | None = None,
    replays: Replays | None = None,
) -> Any:
    """Images (B, Q, S, S) float32 in [0, 1] for labels int64 (B,); with ``return_latents`` also the latents (B, K, C).

    noise: initial state (B, K, C); else it is drawn from ``seeds``, one integer per image (0, 1, ... by default).
    steps: intervals of the time grid of a fixed-step solver (heun: two evaluations each, the others one); for dopri5
    the number of grid points, which does not change the result. dopri5 (torchdiffeq, rtol 1e-3, atol 1e-6) chooses
    its steps for the batch as a whole, so an image depends slightly on its batch mates; with the other solvers it
    depends on them in rounding alone, and not at all through ``sample_tiles``.
    counts: a dictionary to which "solutions" (1), "evaluations" (NFE), "passes" (network passes per image) are added.
    replays: runs the evaluations on static buffers, as CUDA graphs where it captures; kept by the caller between calls.
    Raises UserError on options that make no sense.
    """
    check(solver, steps, cfg_interval, cfg_order, cfg_scale)
    device = next(model.parameters()).device
    labels = labels.to(device)
    if noise is None:
        noise = initial_noise(model, range(len(labels)) if seeds is None else seeds, device)
    if noise.shape != (len(labels), *model.latent_shape):
        raise UserError(f"noise has shape {tuple(noise.shape)}, expected {(len(labels), *model.latent_shape)}")
    field = GuidedField(model, labels, cfg_scale, cfg_interval, cfg_order, replays)
    training = model.training
    model.eval()
    try:
        state = noise.to(device)
        if solver == "dopri5":
            latents = _dopri5(field, state, flow.time_grid(steps, model.time_shift, device))
        else:
            exp3 = solver == "exp3"
            times = solvers.phi_grid(steps + 1) if exp3 else flow.time_grid(steps + 1, model.time_shift).tolist()
            latents = solvers.solve(solver, field.at, state, times, None if cfg_scale == 1 else cfg_interval)
        images = model.modality.finished(model.decode(latents))
    finally:
        model.train(training)
    if counts is not None:
        for name, value in (("solutions", 1), ("evaluations", field.evaluations), ("passes", field.passes)):
            counts[name] = counts.get(name, 0) + value
    return (images, latents) if return_latents else images


def sample_tiles(model: UNITE, seeds: Sequence[int], labels: Sequence[int], **options: Any) -> Tensor:
    """Images (B, Q, S, S) for ``seeds`` with ``labels``; equal bits for a seed whatever it is asked together with.

    The network always runs at one batch shape, TILE, and a seed always has the same place in it, seed modulo TILE:
    the same kernels then do the same sums. Seeds of one tile, k TILE to (k + 1) TILE - 1, share a pass; a tile that
    is asked for in part costs as much as a whole one. Its other places run the seeds that belong there, with classes
    in turn, so with equal labels even dopri5 gives equal bits. ``options``: those of ``sample``.
    """
    members: dict[int, dict[int, int]] = {}
    for place, seed in enumerate(seeds):
        members.setdefault(seed // TILE, {})[seed] = place
    result: list[Tensor | None] = [None] * len(seeds)
    for tile, wanted in members.items():
        own = range(tile * TILE, (tile + 1) * TILE)
        classes = [labels[wanted[s]] if s in wanted else s % model.config.num_classes for s in own]
        images = sample(model, torch.tensor(classes), seeds=own, **options)
        for seed, place in wanted.items():
            result[place] = images[seed % TILE]
    return torch.stack([image for image in result if image is not None])
