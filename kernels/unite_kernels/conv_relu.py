"""Frozen 3x3 convolutions with bias and ReLU, in stages with 2x2 max pooling between them, as in VGG.

    y = relu(conv(x, weight) + bias);   a stage's last y is an output, and its 2x2 maxima are the next stage's input

The weights are constants, so that of backward only the gradient of the input is there, and it needs no activations: a
bit for each y says whether it is positive, a stage's output (which its reader keeps anyway) says the same of itself and
where its maxima are. The gradient of a convolution's input is a convolution with the weight turned over, which
``frozen`` makes once. Each convolution is torch's, without its bias; one kernel in place adds the bias, cuts at zero,
and writes the bits or the maxima.

Shapes: x (B, C, H, W) channels_last, weight (D, C, 3, 3) with D a multiple of 8, y (B, D, H, W), bits uint8 of
y.numel() / 8 in the order of memory, 8 channels each. Bytes per element of y in bfloat16, beside the convolutions:
forward 4 and 1/8 for the bits or 1/2 for the maxima; backward 4 and 1/8, at the end of a stage 6 and 1/2. ReLU, maxima
and their gradients treat NaN as torch does, and of equal maxima the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend as _backend
from .jit import jit, next_power_of_2, tl, triton

LAST = torch.channels_last


class Frozen(NamedTuple):
    """One convolution's constants in the dtype that it runs in."""

    weight: Tensor  # (D, C, 3, 3), channels_last
    bias: Tensor  # (D,)
    turned: Tensor  # (C, D, 3, 3), channels_last: the convolution of the input's gradient


def frozen(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Frozen:
    """Of a (D, C, 3, 3) weight and a (D,) bias; gradients of neither will be taken. Raises ValueError."""
    if weight.ndim != 4 or weight.shape[2:] != (3, 3) or weight.shape[0] % 8:
        raise ValueError(f"weight must have shape (a multiple of 8, C, 3, 3), not {tuple(weight.shape)}")
    _backend.check_shape("bias", bias, weight.shape[:1])
    weight = weight.detach().to(dtype)
    turned = weight.flip(2, 3).transpose(0, 1)
    return Frozen(weight.contiguous(memory_format=LAST), bias.detach().to(dtype), turned.contiguous(memory_format=LAST))


@dataclass(frozen=True)
class Launch:
    groups: int  # of 8 channels, in a tile
    windows: int  # of 2 x 2 elements, in a tile of up to ``channels`` channels
    channels: int
    warps: int


# Unmeasured default: 16 elements per thread in two 128-bit accesses; windows: 8 for each of its four corners.
LAUNCH = Launch(groups=256, windows=16, channels=64, warps=4)


@jit
def _positive(y):
    return (y <= 0.0) == 0  # also NaN


@jit
def _finished(y, p_bias, o_c, m_c, BIAS: tl.constexpr):
    if BIAS:
        y = y + tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
        y = tl.where(y < 0.0, 0.0, y)
    return y


@jit
def _finish_kernel(p_y, p_bias, p_bits, groups, C: tl.constexpr, GROUPS: tl.constexpr, BIAS: tl.constexpr,
                   BITS: tl.constexpr):  # fmt: skip
    o_g = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    o = o_g[:, None] * 8 + tl.arange(0, 8)[None, :]
    m = (o_g < groups)[:, None] & (o >= 0)
    y = tl.load(p_y + o, mask=m, other=0.0).to(tl.float32)
    y = _finished(y, p_bias, o % C, m, BIAS)
    if BIAS:
        tl.store(p_y + o, y.to(p_y.dtype.element_ty), mask=m)
    if BITS:
        # As stored: what is rounded to zero passes no gradient.
        bits = tl.where(_positive(y.to(p_y.dtype.element_ty).to(tl.float32)), 1 << tl.arange(0, 8)[None, :], 0)
        tl.store(p_bits + o_g, tl.sum(bits, axis=1).to(tl.uint8), mask=o_g < groups)


@jit
def _mask_kernel(p_dy, p_bits, groups, GROUPS: tl.constexpr):
    o_g = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    o = o_g[:, None] * 8 + tl.arange(0, 8)[None, :]
    m = (o_g < groups)[:, None] & (o >= 0)
    bits = tl.load(p_bits + o_g, mask=o_g < groups, other=0).to(tl.int32)
    on = ((bits[:, None] >> tl.arange(0, 8)[None, :]) & 1) == 1
    dy = tl.load(p_dy + o, mask=m, other=0.0)
    tl.store(p_dy + o, tl.where(on, dy, 0.0), mask=m)


@jit
def _window(windows, height, width, C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Of this program's 2x2 windows: the sample, row and column of each, its channels, and which of them are there."""
    o_w = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    down, across = (height + 1) // 2, (width + 1) // 2
    sample, row, column = o_w // (down * across), o_w // across % down, o_w % across
    o_c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return sample, row, column, o_c[None, :], (o_w < windows)[:, None] & (o_c < C)[None, :]


@jit
def _corner(sample, row, column, o_c, m, height, width, C: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr):
    i, j = 2 * row + DOWN, 2 * column + ACROSS
    return ((sample * height + i) * width + j)[:, None] * C + o_c, m & ((i < height) & (j < width))[:, None]


@jit
def _pooled(sample, row, column, o_c, m, height, width, C: tl.constexpr):
    down, across = height // 2, width // 2
    return ((sample * down + row) * across + column)[:, None] * C + o_c, m & ((row < down) & (column < across))[:, None]


@jit
def _finish_corner(p_y, p_bias, o, m, o_c, BIAS: tl.constexpr):
    y = _finished(tl.load(p_y + o, mask=m, other=0.0).to(tl.float32), p_bias, o_c, m, BIAS)
    y = y.to(p_y.dtype.element_ty)
    if BIAS:
        tl.store(p_y + o, y, mask=m)
    return y.to(tl.float32)


@jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@jit
def _pool_kernel(p_y, p_bias, p_pooled, windows, height, width, C: tl.constexpr, ROWS: tl.constexpr,
                 BLOCK: tl.constexpr, BIAS: tl.constexpr):  # fmt: skip
    b, i, j, o_c, m = _window(windows, height, width, C, ROWS, BLOCK)
    o0, m0 = _corner(b, i, j, o_c, m, height, width, C, 0, 0)
    o1, m1 = _corner(b, i, j, o_c, m, height, width, C, 0, 1)
    o2, m2 = _corner(b, i, j, o_c, m, height, width, C, 1, 0)
    o3, m3 = _corner(b, i, j, o_c, m, height, width, C, 1, 1)
    y0 = _finish_corner(p_y, p_bias, o0, m0, o_c, BIAS)
    y1 = _finish_corner(p_y, p_bias, o1, m1, o_c, BIAS)
    y2 = _finish_corner(p_y, p_bias, o2, m2, o_c, BIAS)
    y3 = _finish_corner(p_y, p_bias, o3, m3, o_c, BIAS)
    o, m = _pooled(b, i, j, o_c, m, height, width, C)
    tl.store(p_pooled + o, _larger(_larger(y0, y1), _larger(y2, y3)).to(p_pooled.dtype.element_ty), mask=m)


@jit
def _share(p_y, p_map, p_dy, o, m, y, dpooled, taken):
    """The gradient of one corner; taken: it has its window's maximum."""
    d = tl.load(p_map + o, mask=m, other=0.0).to(tl.float32) + tl.where(taken, dpooled, 0.0)
    tl.store(p_dy + o, tl.where(_positive(y), d, 0.0).to(p_dy.dtype.element_ty), mask=m)


@jit
def _pool_backward_kernel(p_y, p_map, p_dpooled, p_dy, windows, height, width, C: tl.constexpr, ROWS: tl.constexpr,
                          BLOCK: tl.constexpr, POOLED: tl.constexpr):  # fmt: skip
    b, i, j, o_c, m = _window(windows, height, width, C, ROWS, BLOCK)
    o0, m0 = _corner(b, i, j, o_c, m, height, width, C, 0, 0)
    o1, m1 = _corner(b, i, j, o_c, m, height, width, C, 0, 1)
    o2, m2 = _corner(b, i, j, o_c, m, height, width, C, 1, 0)
    o3, m3 = _corner(b, i, j, o_c, m, height, width, C, 1, 1)
    y0 = tl.load(p_y + o0, mask=m0, other=0.0).to(tl.float32)
    y1 = tl.load(p_y + o1, mask=m1, other=0.0).to(tl.float32)
    y2 = tl.load(p_y + o2, mask=m2, other=0.0).to(tl.float32)
    y3 = tl.load(p_y + o3, mask=m3, other=0.0).to(tl.float32)
    dpooled = tl.zeros(y0.shape, tl.float32)
    if POOLED:
        o, m = _pooled(b, i, j, o_c, m, height, width, C)
        dpooled = tl.load(p_dpooled + o, mask=m, other=0.0).to(tl.float32)
    most = tl.maximum(tl.maximum(y0, y1), tl.maximum(y2, y3))
    first = y0 == most
    second = (y1 == most) & (y0 < most)
    third = (y2 == most) & (y0 < most) & (y1 < most)
    fourth = (y0 < most) & (y1 < most) & (y2 < most)
    _share(p_y, p_map, p_dy, o0, m0, y0, dpooled, first)
    _share(p_y, p_map, p_dy, o1, m1, y1, dpooled, second)
    _share(p_y, p_map, p_dy, o2, m2, y2, dpooled, third)
    _share(p_y, p_map, p_dy, o3, m3, y3, dpooled, fourth)


PACK = 0x0102040810204080  # eight bytes of 0 or 1, times this: their bits in the highest byte


def pack(on: Tensor) -> Tensor:
    """(n,) bool -> (n / 8,) uint8, the first element in the lowest bit."""
    words = on.view(torch.uint8).view(torch.int64)
    return ((words * PACK) >> 56).to(torch.uint8)  # the low byte of the arithmetic shift


def unpack(bits: Tensor) -> Tensor:
    """The inverse of ``pack``."""
    table = (torch.arange(256, device=bits.device)[:, None] >> torch.arange(8, device=bits.device)) & 1
    return table.to(torch.uint8).view(torch.int64).flatten()[bits.int()].view(torch.bool)


def _flat(y: Tensor) -> Tensor:
    """The elements in the order of memory."""
    return y.permute(0, 2, 3, 1).reshape(-1)


def _launch_windows(y: Tensor) -> tuple[tuple[int, int], tuple[int, ...]]:
    """The grid over an image's 2x2 windows, and the sizes that follow the pointers."""
    images, channels, height, width = y.shape
    windows = images * ((height + 1) // 2) * ((width + 1) // 2)
    block = min(LAUNCH.channels, next_power_of_2(channels))
    grid = triton.cdiv(windows, LAUNCH.windows), triton.cdiv(channels, block)
    return grid, (windows, height, width, channels, LAUNCH.windows, block)


@torch.library.custom_op("unite_kernels::relu_finish", mutates_args=("y",))
def _relu_finish(y: Tensor, bias: Tensor | None, keep: bool, backend: str) -> Tensor:
    """y: relu(y + bias), as it is without a bias. Returns its bits if ``keep``."""
    bits = y.new_empty(y.numel() // 8 if keep else 0, dtype=torch.uint8)
    if backend != "triton":
        if bias is not None:
            y.add_(bias[:, None, None]).relu_()
        return bits.copy_(pack(~(_flat(y) <= 0))) if keep else bits
    groups = y.numel() // 8
    with torch.cuda.device_of(y):
        _finish_kernel[(triton.cdiv(groups, LAUNCH.groups),)](
            y, bias, bits, groups, y.shape[1], LAUNCH.groups, bias is not None, keep, num_warps=LAUNCH.warps
        )
    return bits


@_relu_finish.register_fake
def _(y, bias, keep, backend):
    return y.new_empty(y.numel() // 8 if keep else 0, dtype=torch.uint8)


def _new_pooled(y: Tensor) -> Tensor:
    size = (*y.shape[:2], y.shape[2] // 2, y.shape[3] // 2)
    return torch.empty(size, dtype=y.dtype, device=y.device, memory_format=LAST)


@torch.library.custom_op("unite_kernels::relu_pool_fwd", mutates_args=("y",))
def _relu_pool_fwd(y: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """As ``relu_finish``; returns the maxima of y's 2x2 windows."""
    pooled = _new_pooled(y)
    if backend != "triton":
        if bias is not None:
            y.add_(bias[:, None, None]).relu_()
        return pooled.copy_(F.max_pool2d(y, 2))
    grid, sizes = _launch_windows(y)
    with torch.cuda.device_of(y):
        _pool_kernel[grid](y, bias, pooled, *sizes, bias is not None, num_warps=LAUNCH.warps)
    return pooled


@_relu_pool_fwd.register_fake
def _(y, bias, backend):
    return _new_pooled(y)


@torch.library.custom_op("unite_kernels::relu_mask", mutates_args=("dy",))
def _relu_mask(dy: Tensor, bits: Tensor, backend: str) -> None:
    """dy: 0 where the bit is."""
    if backend != "triton":
        _flat(dy).masked_fill_(~unpack(bits), 0)
        return
    with torch.cuda.device_of(dy):
        _mask_kernel[(triton.cdiv(len(bits), LAUNCH.groups),)](
            dy, bits, len(bits), LAUNCH.groups, num_warps=LAUNCH.warps
        )


@_relu_mask.register_fake
def _(dy, bits, backend):
    return None


@torch.library.custom_op("unite_kernels::relu_pool_bwd", mutates_args=())
def _relu_pool_bwd(y: Tensor, dmap: Tensor, dpooled: Tensor | None, backend: str) -> Tensor:
    """Before ReLU, of a y that had the gradient ``dmap`` by itself and ``dpooled`` by its maxima."""
    dmap = dmap.contiguous(memory_format=LAST)
    dy = torch.empty_like(y)
    if backend != "triton":
        dy.copy_(dmap)
        if dpooled is not None:
            place = F.max_pool2d(y, 2, return_indices=True)[1]
            dy += torch.ops.aten.max_pool2d_with_indices_backward(
                dpooled, y, [2, 2], [2, 2], [0, 0], [1, 1], False, place
            )
        return dy.masked_fill_(y <= 0, 0)
    grid, sizes = _launch_windows(y)
    with torch.cuda.device_of(y):
        _pool_backward_kernel[grid](y, dmap, dpooled, dy, *sizes, dpooled is not None, num_warps=LAUNCH.warps)
    return dy


@_relu_pool_bwd.register_fake
def _(y, dmap, dpooled, backend):
    return torch.empty_like(y)


class _Stages(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stages: Sequence[Sequence[Frozen]], backend: str) -> tuple[Tensor, ...]:
        keep, triton_runs = ctx.needs_input_grad[0], backend == "triton"
        maps, kept = [], []
        for number, stage in enumerate(stages):
            for place, layer in enumerate(stage):
                # A CPU's convolution takes the bias with it.
                y = F.conv2d(x, layer.weight, None if triton_runs else layer.bias, padding=1)
                y = y.contiguous(memory_format=LAST)  # as it is, but for a library that chose otherwise
                bias = layer.bias if triton_runs else None
                if not triton_runs:
                    y.relu_()
                if place < len(stage) - 1:
                    if keep or triton_runs:
                        kept.append(_relu_finish(y, bias, keep, backend))
                    x = y
                elif number < len(stages) - 1:
                    x = _relu_pool_fwd(y, bias, backend)
                elif triton_runs:
                    _relu_finish(y, bias, False, backend)
            maps.append(y)
        if keep:
            ctx.save_for_backward(*maps, *kept)
        ctx.stages, ctx.backend = stages, backend
        return tuple(maps)

    @staticmethod
    def backward(ctx: Any, *dmaps: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        maps, kept = ctx.saved_tensors[: len(dmaps)], list(ctx.saved_tensors[len(dmaps) :])
        d: Tensor | None = None
        for stage, y, dmap in zip(reversed(ctx.stages), reversed(maps), reversed(dmaps), strict=True):
            d = _relu_pool_bwd(y, dmap, d, ctx.backend)
            for place in range(len(stage) - 1, -1, -1):
                d = F.conv2d(d, stage[place].turned, padding=1).contiguous(memory_format=LAST)
                if place:
                    _relu_mask(d, kept.pop(), ctx.backend)
        return d, None, None


def conv_relu_stages(x: Tensor, stages: Sequence[Sequence[Frozen]], backend: str = "fused") -> list[Tensor]:
    """The stages' outputs, channels_last; differentiable in x (B, C, H, W) alone.

    x has the constants' dtype and an even side for every pooling that should lose no row. There is no C++ form: "fused"
    on CPU tensors is the eager one, which computes and keeps the same.
    """
    if not stages or not all(stages):
        raise ValueError("expected at least one stage of at least one convolution")
    if backend == "cpp":
        raise ValueError("conv_relu_stages has no backend 'cpp': choose eager, triton or fused")
    if backend == "fused" and _backend.fused(x.device) == "cpp":
        backend = "eager"
    first = stages[0][0]
    backend = _backend.resolve(backend, x, first.weight)
    if x.ndim != 4 or x.shape[1] != first.weight.shape[1]:
        raise ValueError(f"x must have shape (B, {first.weight.shape[1]}, H, W), not {tuple(x.shape)}")
    if min(x.shape[2:]) >> (len(stages) - 1) == 0:
        raise ValueError(f"{len(stages) - 1} poolings leave nothing of {x.shape[2]} x {x.shape[3]} positions")
    if x.dtype != first.weight.dtype:
        raise TypeError(f"x must be {first.weight.dtype}, as the weights are, not {x.dtype}")
    return list(_Stages.apply(x.contiguous(memory_format=LAST), stages, backend))
