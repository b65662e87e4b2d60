"""SwiGLU with the bias of the linear layer before it.

    u = x + bias;  y = silu(u[:F]) u[F:],  silu(a) = a / (1 + exp(-a))

Shapes: x (..., 2 F), bias (2 F,) or none, y (..., F). Bytes per row in bfloat16: forward 6 F, backward 10 F (dy and x
read, dx written); the sums of the bias gradient add 8 F / rows-per-program, twice. Sums are float32, in a fixed order.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend as _backend
from . import launches
from .jit import jit, next_power_of_2, tl, triton


def swiglu_eager(x: Tensor, bias: Tensor | None = None) -> Tensor:
    u = x.float() if bias is None else x.float() + bias.float()
    a, b = u.chunk(2, dim=-1)
    return (F.silu(a) * b).to(x.dtype)


def _launch(direction: str, x: Tensor) -> tuple[launches.Launch, tuple[int, int], tuple[int, int, int]]:
    """The launch, its grid, and (tiles of a program, which loads the bias once, rows, F)."""
    width, rows = x.shape[-1] // 2, x.numel() // x.shape[-1]
    launch = launches.launch_of("swiglu", direction, width, x.device)
    launch = replace(launch, columns=min(launch.columns, next_power_of_2(width)))
    columns, tiles = triton.cdiv(width, launch.columns), triton.cdiv(rows, launch.rows)
    steps = launches.steps_per_program(columns, tiles, launches.slots_of(launch, x.device))
    return launch, (triton.cdiv(tiles, steps), columns), (steps, rows, width)


@jit
def _bias_halves(p_bias, o_f, m_f, WIDTH: tl.constexpr, BIAS: tl.constexpr):
    a, b = tl.zeros(o_f.shape, tl.float32), tl.zeros(o_f.shape, tl.float32)
    if BIAS:
        a = tl.load(p_bias + o_f, mask=m_f, other=0.0).to(tl.float32)
        b = tl.load(p_bias + WIDTH + o_f, mask=m_f, other=0.0).to(tl.float32)
    return a[None, :], b[None, :]


@jit
def _halves(p, m, bias_a, bias_b, WIDTH: tl.constexpr):
    a = tl.load(p, mask=m, other=0.0).to(tl.float32) + bias_a
    b = tl.load(p + WIDTH, mask=m, other=0.0).to(tl.float32) + bias_b
    return a, b


@jit(do_not_specialize=["steps"])
def _forward_kernel(
    p_x,
    p_bias,
    p_y,
    steps,
    rows,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    BIAS: tl.constexpr,
):
    o_f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_f = o_f < WIDTH
    bias_a, bias_b = _bias_halves(p_bias, o_f, m_f, WIDTH, BIAS)
    for i in tl.range(0, steps, num_stages=STAGES):
        o_row = (tl.program_id(0).to(tl.int64) * steps + i) * ROWS + tl.arange(0, ROWS)
        m = (o_row < rows)[:, None] & m_f[None, :]
        a, b = _halves(p_x + o_row[:, None] * (2 * WIDTH) + o_f[None, :], m, bias_a, bias_b, WIDTH)
        y = a / (1.0 + tl.exp(-a)) * b
        tl.store(p_y + o_row[:, None] * WIDTH + o_f[None, :], y.to(p_y.dtype.element_ty), mask=m)


@jit(do_not_specialize=["steps"])
def _backward_kernel(
    p_dy,
    p_x,
    p_bias,
    p_dx,
    p_sums,
    steps,
    rows,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    BIAS: tl.constexpr,
):
    o_f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_f = o_f < WIDTH
    bias_a, bias_b = _bias_halves(p_bias, o_f, m_f, WIDTH, BIAS)
    sum_a = tl.zeros((ROWS, BLOCK), tl.float32)  # over rows after the loop: no exchange between threads within it
    sum_b = tl.zeros((ROWS, BLOCK), tl.float32)
    for i in tl.range(0, steps, num_stages=STAGES):
        o_row = (tl.program_id(0).to(tl.int64) * steps + i) * ROWS + tl.arange(0, ROWS)
        m = (o_row < rows)[:, None] & m_f[None, :]
        a, b = _halves(p_x + o_row[:, None] * (2 * WIDTH) + o_f[None, :], m, bias_a, bias_b, WIDTH)
        dy = tl.load(p_dy + o_row[:, None] * WIDTH + o_f[None, :], mask=m, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-a))
        da = dy * b * sigmoid * (1.0 + a * (1.0 - sigmoid))
        db = dy * a * sigmoid
        p = p_dx + o_row[:, None] * (2 * WIDTH) + o_f[None, :]
        tl.store(p, da.to(p_dx.dtype.element_ty), mask=m)
        tl.store(p + WIDTH, db.to(p_dx.dtype.element_ty), mask=m)
        if BIAS:
            sum_a += da
            sum_b += db
    if BIAS:
        p = p_sums + tl.program_id(0).to(tl.int64) * (2 * WIDTH) + o_f
        tl.store(p, tl.sum(sum_a, axis=0), mask=m_f)
        tl.store(p + WIDTH, tl.sum(sum_b, axis=0), mask=m_f)


def _half_shape(x: Tensor) -> list[int]:
    return [*x.shape[:-1], x.shape[-1] // 2]


@torch.library.custom_op("unite_kernels::swiglu_fwd", mutates_args=())
def _swiglu_fwd(x: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    if backend == "cpp":
        return _backend.cpu_op("swiglu_fwd")(x, bias)
    y = x.new_empty(_half_shape(x))
    launch, grid, sizes = _launch("forward", x)
    with torch.cuda.device_of(x):
        _forward_kernel[grid](
            *(x, bias, y, *sizes, launch.columns, launch.rows, launch.stages, bias is not None), num_warps=launch.warps
        )
    return y


@_swiglu_fwd.register_fake
def _(x, bias, backend):
    return x.new_empty(_half_shape(x))


@torch.library.custom_op("unite_kernels::swiglu_bwd", mutates_args=())
def _swiglu_bwd(dy: Tensor, x: Tensor, bias: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    dy = dy.contiguous()
    if backend == "cpp":
        return _backend.cpu_op("swiglu_bwd")(dy, x, bias)
    dx = torch.empty_like(x)
    launch, grid, sizes = _launch("backward", x)
    sums = None if bias is None else x.new_empty(grid[0], x.shape[-1], dtype=torch.float32)
    with torch.cuda.device_of(x):
        _backward_kernel[grid](
            *(dy, x, bias, dx, sums, *sizes, launch.columns, launch.rows, launch.stages, bias is not None),
            num_warps=launch.warps,
        )
    return dx, x.new_empty(0) if bias is None else sums.sum(0).to(bias.dtype)


@_swiglu_bwd.register_fake
def _(dy, x, bias, backend):
    return torch.empty_like(x), x.new_empty(0) if bias is None else torch.empty_like(bias)


_run_backward = _backend.direct(_swiglu_bwd)


def _setup(ctx, inputs, output):
    x, bias, ctx.backend = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx, dy):
    x, bias = ctx.saved_tensors
    dx, dbias = _run_backward(dy, x, bias, ctx.backend)
    return dx, None if bias is None else dbias, None


_run = _backend.differentiable(_swiglu_fwd, _setup, _backward)


def swiglu(x: Tensor, bias: Tensor | None = None, backend: str = "fused") -> Tensor:
    """silu(first half) * second half of x + bias. x (..., 2 F) contiguous, bias (2 F,) or None; y (..., F)."""
    backend = _backend.resolve(backend, x, bias)
    _backend.check_float("x", x)
    if x.ndim < 1 or x.shape[-1] % 2 or x.shape[-1] == 0:
        raise ValueError(f"the last dimension of x must be two equal halves, but its shape is {tuple(x.shape)}")
    _backend.check_contiguous("x", x)
    if bias is not None:
        _backend.check_float("bias", bias)
        _backend.check_shape("bias", bias, x.shape[-1:])
        _backend.check_contiguous("bias", bias)
    return swiglu_eager(x, bias) if backend == "eager" else _run(x, bias, backend)
