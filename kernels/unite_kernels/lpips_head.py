"""The head of LPIPS: distance of two stacks of feature maps.

    u = f / (sqrt(sum_c f^2) + 1e-10);   distance[b] = sum over maps of mean over positions of sum_c w_c (u0 - u1)^2

Shapes: features (B, C, H, W), one pair per map, best in channels_last (other layouts are copied); weights (C,) per map;
distance (B,) float32. Bytes per feature element in bfloat16: forward 4 (both maps read once), backward 6 or, with
gradients of both, 8: the norms are computed again from the row at hand. Sums are float32, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backend as _backend
from . import launches
from .jit import jit, next_power_of_2, tl, triton

EPS = 1e-10
WIDEST = 2048


def lpips_head_eager(first: Sequence[Tensor], second: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    def unit(f: Tensor) -> Tensor:
        f = f.float()
        return f / (f.square().sum(1, keepdim=True).sqrt() + EPS)

    total = 0.0
    for f0, f1, weight in zip(first, second, weights, strict=True):
        total = total + ((unit(f0) - unit(f1)).square() * weight.float()[:, None, None]).sum(1).mean((1, 2))
    return total


@jit
def _unit(p, o, m):
    f = tl.load(p + o, mask=m, other=0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(f * f, axis=1))
    return f, norm, 1.0 / (norm + 1e-10)


@jit(do_not_specialize=["steps"])
def _forward_kernel(
    p_f0,
    p_f1,
    p_weight,
    p_sums,
    steps,
    positions,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    o_c = tl.arange(0, BLOCK)
    m_c = o_c < CHANNELS
    weight = tl.load(p_weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for i in tl.range(0, steps):
        o_p = (tl.program_id(0) * steps + i) * ROWS + tl.arange(0, ROWS)
        o = (b * positions + o_p)[:, None] * CHANNELS + o_c[None, :]
        m = (o_p < positions)[:, None] & m_c[None, :]
        f0, _norm0, inverse0 = _unit(p_f0, o, m)
        f1, _norm1, inverse1 = _unit(p_f1, o, m)
        d = f0 * inverse0[:, None] - f1 * inverse1[:, None]
        total += tl.sum(d * d * weight[None, :], axis=1)
    tl.store(p_sums + b * tl.num_programs(0) + tl.program_id(0), tl.sum(total, axis=0) / positions)


@jit
def _gradient(f, norm, inverse, du):
    # u = f / (norm + eps): the second term is 0 for a row of zeros, where the eager gradient is NaN.
    across = tl.where(norm > 0.0, tl.sum(du * f, axis=1) * inverse * inverse / tl.where(norm > 0.0, norm, 1.0), 0.0)
    return du * inverse[:, None] - f * across[:, None]


@jit
def _backward_kernel(
    p_dout,
    p_f0,
    p_f1,
    p_weight,
    p_df0,
    p_df1,
    positions,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    o_c = tl.arange(0, BLOCK)
    m_c = o_c < CHANNELS
    o_p = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o = (b * positions + o_p)[:, None] * CHANNELS + o_c[None, :]
    m = (o_p < positions)[:, None] & m_c[None, :]
    weight = tl.load(p_weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    f0, norm0, inverse0 = _unit(p_f0, o, m)
    f1, norm1, inverse1 = _unit(p_f1, o, m)
    d = f0 * inverse0[:, None] - f1 * inverse1[:, None]
    du = d * (weight * (2.0 * tl.load(p_dout + b) / positions))[None, :]
    if FIRST:
        tl.store(p_df0 + o, _gradient(f0, norm0, inverse0, du).to(p_df0.dtype.element_ty), mask=m)
    if SECOND:
        tl.store(p_df1 + o, _gradient(f1, norm1, inverse1, -du).to(p_df1.dtype.element_ty), mask=m)


def _tile(f: Tensor, direction: str) -> tuple[launches.Launch, tuple[int, int, int, int]]:
    """The launch, and (positions, channels, the block that holds them, positions of a tile)."""
    channels = f.shape[1]
    launch = launches.launch_of("lpips_head", direction, channels, f.device)
    return launch, (f.shape[2] * f.shape[3], channels, next_power_of_2(channels), launch.rows)


@torch.library.custom_op("unite_kernels::lpips_head_fwd", mutates_args=())
def _lpips_head_fwd(f0: Tensor, f1: Tensor, weight: Tensor, backend: str) -> Tensor:
    if backend == "cpp":
        return _backend.cpu_op("lpips_head_fwd")(_positions(f0), _positions(f1), weight)
    launch, sizes = _tile(f0, "forward")
    f0, f1 = (f.contiguous(memory_format=torch.channels_last) for f in (f0, f1))
    tiles = triton.cdiv(sizes[0], launch.rows)
    steps = launches.steps_per_program(len(f0), tiles, launches.slots_of(launch, f0.device))
    programs = triton.cdiv(tiles, steps)
    sums = f0.new_empty(len(f0), programs, dtype=torch.float32)
    with torch.cuda.device_of(f0):
        _forward_kernel[(programs, len(f0))](f0, f1, weight, sums, steps, *sizes, num_warps=launch.warps)
    return sums.sum(1)


@_lpips_head_fwd.register_fake
def _(f0, f1, weight, backend):
    return f0.new_empty(len(f0), dtype=torch.float32)


@torch.library.custom_op("unite_kernels::lpips_head_bwd", mutates_args=())
def _lpips_head_bwd(
    dout: Tensor, f0: Tensor, f1: Tensor, weight: Tensor, first: bool, second: bool, backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "cpp":
        maps = _positions(f0), _positions(f1)
        found = _backend.cpu_op("lpips_head_bwd")(dout.contiguous(), *maps, weight, first, second)
        b, c, h, w = f0.shape
        return tuple(df.view(b, h, w, c).permute(0, 3, 1, 2) if df.numel() else df for df in found)
    launch, sizes = _tile(f0, "backward")
    f0, f1 = (f.contiguous(memory_format=torch.channels_last) for f in (f0, f1))
    df0, df1 = _gradient_of(f0, first), _gradient_of(f1, second)
    with torch.cuda.device_of(f0):
        _backward_kernel[(triton.cdiv(sizes[0], launch.rows), len(f0))](
            *(dout.contiguous(), f0, f1, weight, df0, df1, *sizes, first, second), num_warps=launch.warps
        )
    return df0, df1


def _positions(f: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H W, C), contiguous."""
    return f.permute(0, 2, 3, 1).flatten(1, 2).contiguous()


def _gradient_of(f: Tensor, wanted: bool) -> Tensor:
    return torch.empty_like(f, memory_format=torch.channels_last) if wanted else f.new_empty(0)


@_lpips_head_bwd.register_fake
def _(dout, f0, f1, weight, first, second, backend):
    return _gradient_of(f0, first), _gradient_of(f1, second)


def _setup(ctx, inputs, output):
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dout):
    first, second, *_ = ctx.needs_input_grad
    df0, df1 = _lpips_head_bwd(dout, *ctx.saved_tensors, first, second, ctx.backend)
    return df0 if first else None, df1 if second else None, None, None


_lpips_head_fwd.register_autograd(_backward, setup_context=_setup)


def lpips_head(
    first: Sequence[Tensor], second: Sequence[Tensor], weights: Sequence[Tensor], backend: str = "fused"
) -> Tensor:
    """Distance (B,) float32 of two lists of features (B, C, H, W); gradients of the features, not of the weights."""
    if not len(first) == len(second) == len(weights) > 0:
        raise ValueError(f"expected equally many maps and weights, not {len(first)}, {len(second)}, {len(weights)}")
    backend = _backend.resolve(backend, *first, *second, *weights)
    for f0, f1, weight in zip(first, second, weights, strict=True):
        _backend.check_float("features", f0)
        if f0.ndim != 4 or f0.shape[1] > WIDEST:
            raise ValueError(f"features must have shape (B, up to {WIDEST} channels, H, W), not {tuple(f0.shape)}")
        _backend.check_shape("second features", f1, f0.shape)
        if f1.dtype != f0.dtype:
            raise TypeError(f"a pair of features must have one dtype, not {f0.dtype} and {f1.dtype}")
        _backend.check_shape("weight", weight, (f0.shape[1],))
        _backend.check_contiguous("weight", weight)
        if weight.requires_grad:
            raise ValueError("the weights of LPIPS are frozen: the head has no gradient of them")
    if backend == "eager":
        return lpips_head_eager(first, second, weights)
    return torch.stack([_lpips_head_fwd(*maps, backend) for maps in zip(first, second, weights, strict=True)]).sum(0)
