"""Samples from noise: the probability-flow ODE from t = 0 to 1, with classifier-free guidance.

Shape letters: B batch, K registers, C latent dim, Q channels, S image size.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from unite_fast import flow
from unite_fast.base.errors import UserError
from unite_fast.config import SampleConfig, choices
from unite_fast.efficiency import execution
from unite_fast.flow import solvers
from unite_fast.flow.field import GuidedField, Replays, there
from unite_fast.model.unite import UNITE
from unite_kernels import philox

SOLVERS, ORDERS = choices(SampleConfig, "solver"), choices(SampleConfig, "cfg_order")
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
    return Replays(device) if wanted else None


def _dopri5(field: GuidedField, z: Tensor, grid: Tensor) -> Tensor:
    from torchdiffeq import odeint

    result: Any = odeint(field, z, grid, rtol=RTOL, atol=ATOL, method="dopri5")
    return result[-1]


def _solve(field: GuidedField, state: Tensor, how: SampleConfig, time_shift: float) -> Tensor:
    """The latents (B, K, C) at t = 1."""
    if how.solver == "dopri5":
        return _dopri5(field, state, flow.time_grid(how.steps, time_shift, state.device))
    exp3 = how.solver == "exp3"
    times = solvers.phi_grid(how.steps + 1) if exp3 else flow.time_grid(how.steps + 1, time_shift).tolist()
    return solvers.solve(how.solver, field.at, state, times, None if how.cfg_scale == 1 else how.cfg_interval)


def _finish(field: GuidedField, z: Tensor, how: SampleConfig) -> Tensor:
    """What is decoded of the latents (B, K, C) at t = 1 (``sample.last``)."""
    return field.at(1.0, z, guided=False) if how.last == "prediction" else z


def check(how: SampleConfig, guided_by_model: bool = False) -> None:
    """Raises UserError when sampling options make no sense."""
    if how.solver not in SOLVERS:
        raise UserError(f"unknown solver '{how.solver}'; choose one of {', '.join(SOLVERS)}")
    if how.cfg_order not in ORDERS:
        raise UserError(f"unknown guidance order '{how.cfg_order}'; choose one of {', '.join(ORDERS)}")
    if how.steps < 1 or (how.solver == "dopri5" and how.steps < 2):
        raise UserError(f"too few steps: {how.steps}")
    if guided_by_model and how.cfg_order == "cfg_first":
        raise UserError(
            "cfg_first combines before the LayerNorm, of which two models have two; take norm_first or both"
        )
    interval = how.cfg_interval
    if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
        raise UserError(f"guidance interval {list(interval)} must be two numbers with 0 <= low < high <= 1")
    if not (math.isfinite(how.cfg_scale) and how.cfg_scale >= 0):
        raise UserError(f"guidance scale {how.cfg_scale} must be a finite number of at least 0")
    if how.solver in solvers.MULTISTEP and how.cfg_scale != 1:
        solvers.jumps(how.steps, interval)


@torch.no_grad()
def sample(
    model: UNITE,
    labels: Tensor,
    how: SampleConfig | None = None,
    *,
    noise: Tensor | None = None,
    seeds: Sequence[int] | Tensor | None = None,
    sizes: Tensor | None = None,
    return_latents: bool = False,
    counts: dict[str, float] | None = None,
    replays: Replays | None = None,
    guide: UNITE | None = None,
    **options: Any,
) -> Any:
    """Images (B, Q, S, S) float32 in [0, 1] for labels int64 (B,); with ``return_latents`` also the latents (B, K, C).

    Of another modality, what its ``finished`` returns.

    how: solver, steps and guidance, by default those of a run that says nothing; ``options`` are its fields by name,
    as in ``sample(model, labels, solver="heun", steps=50, cfg_scale=3.4)``, and count above it.
    noise: initial state (B, K, C); else it is drawn from ``seeds``, one integer per image (0, 1, ... by default).
    sizes: int64 (B,), of samples of variable size; drawn by the modality from ``seeds`` by default.
    steps: intervals of the time grid of a fixed-step solver (heun: two evaluations each, the others one); for dopri5
    the number of grid points, which does not change the result. dopri5 (torchdiffeq, rtol 1e-3, atol 1e-6) chooses
    its steps for the batch as a whole, so an image depends slightly on its batch mates; with the other solvers it
    depends on them in rounding alone, and not at all through ``sample_tiles``.
    counts: a dictionary to which "solutions" (1), "evaluations" (NFE), "passes" (network passes per image) are added.
    replays: runs the evaluations as CUDA graphs; kept by the caller between calls.
    guide: in the null class's place, a weaker model of the same latents in evaluation mode (``sampling.guide``).
    Raises UserError on options that make no sense.
    """
    how = dataclasses.replace(how or SampleConfig(), **options)
    check(how, guided_by_model=guide is not None)
    device = next(model.parameters()).device
    labels = labels.to(device)
    if noise is None:
        noise = initial_noise(model, range(len(labels)) if seeds is None else seeds, device)
    if noise.shape != (len(labels), *model.latent_shape):
        raise UserError(f"noise has shape {tuple(noise.shape)}, expected {(len(labels), *model.latent_shape)}")
    if sizes is None:
        drawn_from = torch.arange(len(labels)) if seeds is None else torch.as_tensor(seeds, dtype=torch.int64)
        sizes = model.modality.draw_sizes(model, drawn_from, labels)
    sizes = None if sizes is None else sizes.to(device)
    field = GuidedField(model, labels, how.cfg_scale, how.cfg_interval, how.cfg_order, replays, sizes, guide)
    training = model.training
    model.eval()
    try:
        latents = _solve(field, there(noise.to(device), sizes), how, model.time_shift)
        latents = _finish(field, latents, how)
        images = model.modality.finished(model, model.decode(latents, sizes), labels, sizes)
    finally:
        model.train(training)
    if counts is not None:
        for name, value in (("solutions", 1), ("evaluations", field.evaluations), ("passes", field.passes)):
            counts[name] = counts.get(name, 0) + value
    return (images, latents) if return_latents else images


def sample_tiles(
    model: UNITE, seeds: Sequence[int], labels: Sequence[int], how: SampleConfig | None = None, **options: Any
) -> Any:
    """What ``sample`` returns for ``seeds`` with ``labels``; equal bits for a seed whatever it is asked together with.

    The network always runs at one batch shape, TILE, and a seed always has the same place in it, seed modulo TILE:
    the same kernels then do the same sums. Seeds of one tile, k TILE to (k + 1) TILE - 1, share a pass; a tile that
    is asked for in part costs as much as a whole one. Its other places run the seeds that belong there, with classes
    in turn, so with equal labels even dopri5 gives equal bits. ``how``, ``options``: as of ``sample``.
    """
    members: dict[int, dict[int, int]] = {}
    for place, seed in enumerate(seeds):
        members.setdefault(seed // TILE, {})[seed] = place
    result: list[Any] = [None] * len(seeds)
    for tile, wanted in members.items():
        own = range(tile * TILE, (tile + 1) * TILE)
        classes = [labels[wanted[s]] if s in wanted else s % max(1, model.config.num_classes) for s in own]
        images = sample(model, torch.tensor(classes), how, seeds=own, **options)
        for seed, place in wanted.items():
            result[place] = tree_map(operator.itemgetter(seed % TILE), images)
    return tree_map(lambda *several: torch.stack(several), *result)
