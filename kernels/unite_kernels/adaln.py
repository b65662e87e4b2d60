"""Adaptive layer norm: RMSNorm and modulation, with or without the residual operations before them.

    norm(u) = u / sqrt(mean(u^2) + eps), mod(u) = u (1 + scale) + shift
    adaln        y  = mod(norm(x) weight)
    adaln_mid    x1 = x + gate branch;                    y = mod(norm(x1) weight)
    adaln_tail   x2 = norm(x + gate branch) weight3;      y = mod(norm(x2) weight1)

Shapes: x, branch (B, T, D); gate, shift, scale (B, D), rows may be apart; weights (D,). The residual (x, x1, x2) may
be float32 beside a bfloat16 branch; y has the branch's dtype (x's in adaln). Statistics and sums are float32.

Bytes per token, r = bytes of a residual element, 2-byte branch: adaln forward (r + 2) D, backward (2 r + 2) D; mid and
tail forward (2 r + 4) D, backward (3 r + 6) D: the tail recomputes x1 and x2 from its inputs. Gradients shared over
rows are summed by program, then over programs in a fixed order: no atomics, so runs repeat.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import backend as _backend
from .jit import jit, next_power_of_2, tl, triton

WIDEST = 2048
PLAIN, MID, TAIL = 0, 1, 2  # KIND of a kernel


def _norm(u: Tensor, weight: Tensor, eps: float) -> Tensor:
    u = u.float()
    return u * torch.rsqrt(u.square().mean(-1, keepdim=True) + eps) * weight.float()


def _modulate(u: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (u * (1.0 + scale.float()[:, None]) + shift.float()[:, None]).to(dtype)


def adaln_eager(x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return _modulate(_norm(x, weight, eps), shift, scale, x.dtype)


def adaln_mid_eager(x, branch, gate, weight, shift, scale, eps) -> tuple[Tensor, Tensor]:
    x1 = (x.float() + gate.float()[:, None] * branch.float()).to(x.dtype)
    return x1, _modulate(_norm(x1, weight, eps), shift, scale, branch.dtype)


def adaln_tail_eager(x, branch, gate, weight3, weight1, shift, scale, eps) -> tuple[Tensor, Tensor]:
    x2 = _norm(x.float() + gate.float()[:, None] * branch.float(), weight3, eps).to(x.dtype)
    return x2, _modulate(_norm(x2, weight1, eps), shift, scale, branch.dtype)


@dataclass(frozen=True)
class Launch:
    rows: int  # forward: rows of one tile
    warps: int
    backward_warps: int


# By block width. Unmeasured defaults, chosen so that a thread holds 8 elements of a row (one 128-bit bfloat16 access).
LAUNCHES = {512: Launch(4, 2, 2), 1024: Launch(2, 4, 4), 2048: Launch(1, 8, 8)}
# Rows of one program, which loads the per-sample vectors once; halved for small batches until PROGRAMS exist.
PROGRAM_ROWS = 64
PROGRAMS = 528  # four per multiprocessor of an H200


def _launch(width: int) -> tuple[int, Launch]:
    block = max(32, next_power_of_2(width))
    return block, LAUNCHES[max(512, block)]


def _program_rows(batch: int, tokens: int) -> int:
    rows = PROGRAM_ROWS
    while rows > 8 and batch * -(-tokens // rows) < PROGRAMS:
        rows //= 2
    return rows


@jit
def _row(p, b, stride, o_d, m_d):
    return tl.load(p + b * stride + o_d, mask=m_d, other=0.0).to(tl.float32)


@jit
def _forward_kernel(
    p_x, p_branch, p_gate, p_weight3, p_weight, p_shift, p_scale, p_out, p_y, p_rstd3, p_rstd,
    tokens, stride_gate, stride_shift, stride_scale, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, KIND: tl.constexpr, STEPS: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < WIDTH
    factor = _row(p_weight, 0, 0, o_d, m_d) * (1.0 + _row(p_scale, b, stride_scale, o_d, m_d))
    shift = _row(p_shift, b, stride_shift, o_d, m_d)
    if KIND != 0:
        gate = _row(p_gate, b, stride_gate, o_d, m_d)
    if KIND == 2:
        weight3 = _row(p_weight3, 0, 0, o_d, m_d)
    for i in tl.range(0, STEPS):
        o_t = (tl.program_id(0) * STEPS + i) * ROWS + tl.arange(0, ROWS)
        m_t = o_t < tokens
        o_row = b * tokens + o_t
        o = o_row[:, None] * WIDTH + o_d[None, :]
        m = m_t[:, None] & m_d[None, :]
        u = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
        if KIND != 0:
            u += gate[None, :] * tl.load(p_branch + o, mask=m, other=0.0).to(tl.float32)
        if KIND == 2:
            rstd3 = tl.rsqrt(tl.sum(u * u, axis=1) / WIDTH + eps)
            tl.store(p_rstd3 + o_row, rstd3, mask=m_t)
            u = u * rstd3[:, None] * weight3[None, :]
        if KIND != 0:
            out = u.to(p_out.dtype.element_ty)
            tl.store(p_out + o, out, mask=m)
            u = out.to(tl.float32)  # the norm sees what the next layer sees, as in the eager form
        rstd = tl.rsqrt(tl.sum(u * u, axis=1) / WIDTH + eps)
        tl.store(p_rstd + o_row, rstd, mask=m_t)
        y = u * rstd[:, None] * factor[None, :] + shift[None, :]
        tl.store(p_y + o, y.to(p_y.dtype.element_ty), mask=m)


@jit
def _backward_kernel(
    p_dout, p_dy, p_x, p_branch, p_gate, p_weight3, p_weight, p_scale, p_rstd3, p_rstd, p_dx, p_dbranch, p_sums,
    tokens, stride_gate, stride_scale,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, KIND: tl.constexpr, SUMS: tl.constexpr,
):
    # A program sums over its rows: dy (dshift), dy xhat (dscale, dweight), dx1 branch (dgate), dx2 xhat3 (dweight3).
    b = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * ROWS
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < WIDTH
    factor = _row(p_weight, 0, 0, o_d, m_d) * (1.0 + _row(p_scale, b, stride_scale, o_d, m_d))
    sum_dy = tl.zeros((BLOCK,), tl.float32)
    sum_dy_xhat = tl.zeros((BLOCK,), tl.float32)
    if KIND != 0:
        gate = _row(p_gate, b, stride_gate, o_d, m_d)
        sum_gate = tl.zeros((BLOCK,), tl.float32)
    if KIND == 2:
        weight3 = _row(p_weight3, 0, 0, o_d, m_d)
        sum_weight3 = tl.zeros((BLOCK,), tl.float32)
    for i in tl.range(0, ROWS):
        m_t = first + i < tokens
        o_row = b * tokens + first + i
        m = m_d & m_t
        o = o_row * WIDTH + o_d
        u = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
        dy = tl.load(p_dy + o, mask=m, other=0.0).to(tl.float32)
        rstd = tl.load(p_rstd + o_row, mask=m_t, other=0.0)
        if KIND != 0:
            branch = tl.load(p_branch + o, mask=m, other=0.0).to(tl.float32)
            dout = tl.load(p_dout + o, mask=m, other=0.0).to(tl.float32)
        if KIND == 2:
            rstd3 = tl.load(p_rstd3 + o_row, mask=m_t, other=0.0)
            xhat3 = (u + gate * branch) * rstd3
            u = (xhat3 * weight3).to(p_x.dtype.element_ty).to(tl.float32)
        xhat = u * rstd
        sum_dy += dy
        sum_dy_xhat += dy * xhat
        g = dy * factor
        du = rstd * (g - xhat * (tl.sum(g * xhat, axis=0) / WIDTH))
        if KIND != 0:
            du += dout
        if KIND == 2:
            sum_weight3 += du * xhat3
            g = du * weight3
            du = rstd3 * (g - xhat3 * (tl.sum(g * xhat3, axis=0) / WIDTH))
        tl.store(p_dx + o, du.to(p_dx.dtype.element_ty), mask=m)
        if KIND != 0:
            tl.store(p_dbranch + o, (gate * du).to(p_dbranch.dtype.element_ty), mask=m)
            sum_gate += du * branch
    p = p_sums + (b * tl.num_programs(0) + tl.program_id(0)) * (SUMS * WIDTH) + o_d
    tl.store(p, sum_dy, mask=m_d)
    tl.store(p + WIDTH, sum_dy_xhat, mask=m_d)
    if KIND != 0:
        tl.store(p + 2 * WIDTH, sum_gate, mask=m_d)
    if KIND == 2:
        tl.store(p + 3 * WIDTH, sum_weight3, mask=m_d)


@jit
def _reduce_kernel(
    p_sums, p_weight, p_scale, p_dshift, p_dscale, p_dgate, p_dweights, parts, stride_scale,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, KIND: tl.constexpr, SUMS: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    o_d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o_part = tl.arange(0, PARTS)
    m_d = o_d < WIDTH
    m = (o_part < parts)[:, None] & m_d[None, :]
    p = p_sums + (b * parts + o_part)[:, None] * (SUMS * WIDTH) + o_d[None, :]
    o = b * WIDTH + o_d
    dshift = tl.sum(tl.load(p, mask=m, other=0.0), axis=0)
    tl.store(p_dshift + o, dshift.to(p_dshift.dtype.element_ty), mask=m_d)
    dy_xhat = tl.sum(tl.load(p + WIDTH, mask=m, other=0.0), axis=0)
    dscale = dy_xhat * _row(p_weight, 0, 0, o_d, m_d)
    tl.store(p_dscale + o, dscale.to(p_dscale.dtype.element_ty), mask=m_d)
    o_weight = b * ((1 + KIND // 2) * WIDTH) + o_d
    tl.store(p_dweights + o_weight, dy_xhat * (1.0 + _row(p_scale, b, stride_scale, o_d, m_d)), mask=m_d)
    if KIND != 0:
        dgate = tl.sum(tl.load(p + 2 * WIDTH, mask=m, other=0.0), axis=0)
        tl.store(p_dgate + o, dgate.to(p_dgate.dtype.element_ty), mask=m_d)
    if KIND == 2:
        tl.store(p_dweights + o_weight + WIDTH, tl.sum(tl.load(p + 3 * WIDTH, mask=m, other=0.0), axis=0), mask=m_d)


def _run_forward(kind: int, x, branch, gate, weight3, weight, shift, scale, eps):
    batch, tokens, width = x.shape
    block, launch = _launch(width)
    out, y = (None, torch.empty_like(x)) if kind == PLAIN else (torch.empty_like(x), torch.empty_like(branch))
    rstd = x.new_empty(batch, tokens, dtype=torch.float32)
    rstd3 = torch.empty_like(rstd) if kind == TAIL else None
    rows = _program_rows(batch, tokens)
    with torch.cuda.device_of(x):
        _forward_kernel[(triton.cdiv(tokens, rows), batch)](
            *(x, branch, gate, weight3, weight, shift, scale, out, y, rstd3, rstd, tokens),
            *(0 if gate is None else gate.stride(0), shift.stride(0), scale.stride(0), eps),
            *(width, block, launch.rows, kind, rows // launch.rows),
            num_warps=launch.warps,
        )
    return out, y, rstd3, rstd


def _run_backward(kind: int, dout, dy, x, branch, gate, weight3, weight, scale, rstd3, rstd):
    """(dx, dbranch, dgate, dweight3, dweight, dshift, dscale), absent ones None."""
    batch, tokens, width = x.shape
    block, launch = _launch(width)
    rows, sums = _program_rows(batch, tokens), 2 + kind
    parts = triton.cdiv(tokens, rows)
    partial = x.new_empty(batch, parts, sums, width, dtype=torch.float32)
    dweights = x.new_empty(batch, 1 + kind // 2, width, dtype=torch.float32)
    dx, dbranch = torch.empty_like(x), None if kind == PLAIN else torch.empty_like(branch)
    dshift, dscale = scale.new_empty(batch, width), scale.new_empty(batch, width)
    dgate = None if kind == PLAIN else gate.new_empty(batch, width)
    reduce_block = min(block, 128)
    with torch.cuda.device_of(x):
        _backward_kernel[(parts, batch)](
            *(dout, dy, x, branch, gate, weight3, weight, scale, rstd3, rstd, dx, dbranch, partial, tokens),
            *(0 if gate is None else gate.stride(0), scale.stride(0), width, block, rows, kind, sums),
            num_warps=launch.backward_warps,
        )
        _reduce_kernel[(triton.cdiv(width, reduce_block), batch)](
            *(partial, weight, scale, dshift, dscale, dgate, dweights, parts, scale.stride(0)),
            *(width, reduce_block, next_power_of_2(parts), kind, sums),
            num_warps=4,
        )
    dweights = dweights.sum(0)
    dweight3 = dweights[1].to(weight3.dtype, copy=True) if kind == TAIL else None
    return dx, dbranch, dgate, dweight3, dweights[0].to(weight.dtype, copy=True), dshift, dscale


def _rstd(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.float32)


@torch.library.custom_op("unite_kernels::adaln_fwd", mutates_args=())
def _adaln_fwd(
    x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "cpp":
        return _backend.cpu_op("adaln_fwd")(x, weight, shift, scale, eps)
    _out, y, _rstd3, rstd = _run_forward(PLAIN, x, None, None, None, weight, shift, scale, eps)
    return y, rstd


@_adaln_fwd.register_fake
def _(x, weight, shift, scale, eps, backend):
    return torch.empty_like(x), _rstd(x)


@torch.library.custom_op("unite_kernels::adaln_bwd", mutates_args=())
def _adaln_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor, rstd: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dy = dy.contiguous()
    if backend == "cpp":
        return _backend.cpu_op("adaln_bwd")(dy, x, weight, scale, rstd)
    grads = _run_backward(PLAIN, None, dy, x, None, None, None, weight, scale, None, rstd)
    return grads[0], *grads[4:]


@_adaln_bwd.register_fake
def _(dy, x, weight, scale, rstd, backend):
    return torch.empty_like(x), torch.empty_like(weight), _like(scale), _like(scale)


def _like(rows: Tensor) -> Tensor:
    return rows.new_empty(rows.shape)


@torch.library.custom_op("unite_kernels::adaln_mid_fwd", mutates_args=())
def _adaln_mid_fwd(
    x: Tensor, branch: Tensor, gate: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "cpp":
        return _backend.cpu_op("adaln_mid_fwd")(x, branch, gate, weight, shift, scale, eps)
    x1, y, _rstd3, rstd = _run_forward(MID, x, branch, gate, None, weight, shift, scale, eps)
    return x1, y, rstd


@_adaln_mid_fwd.register_fake
def _(x, branch, gate, weight, shift, scale, eps, backend):
    return torch.empty_like(x), torch.empty_like(branch), _rstd(x)


@torch.library.custom_op("unite_kernels::adaln_mid_bwd", mutates_args=())
def _adaln_mid_bwd(
    dx1: Tensor, dy: Tensor, x1: Tensor, branch: Tensor, gate: Tensor, weight: Tensor, scale: Tensor, rstd: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx1, dy = dx1.contiguous(), dy.contiguous()
    if backend == "cpp":
        return _backend.cpu_op("adaln_mid_bwd")(dx1, dy, x1, branch, gate, weight, scale, rstd)
    grads = _run_backward(MID, dx1, dy, x1, branch, gate, None, weight, scale, None, rstd)
    return *grads[:3], *grads[4:]


@_adaln_mid_bwd.register_fake
def _(dx1, dy, x1, branch, gate, weight, scale, rstd, backend):
    big = torch.empty_like(x1), torch.empty_like(branch)
    return *big, _like(gate), torch.empty_like(weight), _like(scale), _like(scale)


@torch.library.custom_op("unite_kernels::adaln_tail_fwd", mutates_args=())
def _adaln_tail_fwd(
    x: Tensor, branch: Tensor, gate: Tensor, weight3: Tensor, weight1: Tensor, shift: Tensor, scale: Tensor,
    eps: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if backend == "cpp":
        return _backend.cpu_op("adaln_tail_fwd")(x, branch, gate, weight3, weight1, shift, scale, eps)
    return _run_forward(TAIL, x, branch, gate, weight3, weight1, shift, scale, eps)


@_adaln_tail_fwd.register_fake
def _(x, branch, gate, weight3, weight1, shift, scale, eps, backend):
    return torch.empty_like(x), torch.empty_like(branch), _rstd(x), _rstd(x)


@torch.library.custom_op("unite_kernels::adaln_tail_bwd", mutates_args=())
def _adaln_tail_bwd(
    dx2: Tensor, dy: Tensor, x: Tensor, branch: Tensor, gate: Tensor, weight3: Tensor, weight1: Tensor,
    scale: Tensor, rstd3: Tensor, rstd1: Tensor, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx2, dy = dx2.contiguous(), dy.contiguous()
    if backend == "cpp":
        return _backend.cpu_op("adaln_tail_bwd")(
            dx2, dy, x, branch, gate, weight3, weight1, scale, rstd3, rstd1
        )
    return _run_backward(TAIL, dx2, dy, x, branch, gate, weight3, weight1, scale, rstd3, rstd1)


@_adaln_tail_bwd.register_fake
def _(dx2, dy, x, branch, gate, weight3, weight1, scale, rstd3, rstd1, backend):
    big = torch.empty_like(x), torch.empty_like(branch)
    return *big, _like(gate), torch.empty_like(weight3), torch.empty_like(weight1), _like(scale), _like(scale)


def _adaln_setup(ctx, inputs, output):
    x, weight, _shift, scale, _eps, ctx.backend = inputs
    ctx.save_for_backward(x, weight, scale, output[1])


def _adaln_backward(ctx, dy, _drstd):
    return *_adaln_bwd(dy, *ctx.saved_tensors, ctx.backend), None, None


def _adaln_mid_setup(ctx, inputs, output):
    _x, branch, gate, weight, _shift, scale, _eps, ctx.backend = inputs
    ctx.save_for_backward(output[0], branch, gate, weight, scale, output[2])


def _adaln_mid_backward(ctx, dx1, dy, _drstd):
    return *_adaln_mid_bwd(dx1, dy, *ctx.saved_tensors, ctx.backend), None, None


def _adaln_tail_setup(ctx, inputs, output):
    x, branch, gate, weight3, weight1, _shift, scale, _eps, ctx.backend = inputs
    ctx.save_for_backward(x, branch, gate, weight3, weight1, scale, *output[2:])


def _adaln_tail_backward(ctx, dx2, dy, _drstd3, _drstd1):
    return *_adaln_tail_bwd(dx2, dy, *ctx.saved_tensors, ctx.backend), None, None


_adaln_fwd.register_autograd(_adaln_backward, setup_context=_adaln_setup)
_adaln_mid_fwd.register_autograd(_adaln_mid_backward, setup_context=_adaln_mid_setup)
_adaln_tail_fwd.register_autograd(_adaln_tail_backward, setup_context=_adaln_tail_setup)


def _check(x: Tensor, branch: Tensor | None, weights: tuple[Tensor, ...], shift, scale, gate=None) -> None:
    _backend.check_float("x", x)
    if x.ndim != 3 or not 0 < x.shape[2] <= WIDEST:
        raise ValueError(f"x must have shape (batch, tokens, width up to {WIDEST}), not {tuple(x.shape)}")
    _backend.check_contiguous("x", x)
    if branch is not None:
        _backend.check_float("branch", branch)
        _backend.check_shape("branch", branch, x.shape)
        _backend.check_contiguous("branch", branch)
    for weight in weights:
        _backend.check_float("weight", weight)
        _backend.check_shape("weight", weight, x.shape[2:])
        _backend.check_contiguous("weight", weight)
    for name, rows in (("shift", shift), ("scale", scale), ("gate", gate)):
        if rows is not None:
            _backend.check_float(name, rows)
            _backend.check_shape(name, rows, (x.shape[0], x.shape[2]))
            _backend.check_rows(name, rows)
    if shift.dtype != scale.dtype:
        raise TypeError(f"shift and scale must have one dtype, not {shift.dtype} and {scale.dtype}")


def adaln(
    x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, backend: str = "fused"
) -> Tensor:
    """y (B, T, D) = norm(x) weight (1 + scale) + shift."""
    backend = _backend.resolve(backend, x, weight, shift, scale)
    _check(x, None, (weight,), shift, scale)
    if backend == "eager":
        return adaln_eager(x, weight, shift, scale, eps)
    return _adaln_fwd(x, weight, shift, scale, eps, backend)[0]


def adaln_mid(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    weight: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    backend: str = "fused",
) -> tuple[Tensor, Tensor]:
    """x1 = x + gate branch, y = norm(x1) weight (1 + scale) + shift; both (B, T, D)."""
    backend = _backend.resolve(backend, x, branch, gate, weight, shift, scale)
    _check(x, branch, (weight,), shift, scale, gate)
    if backend == "eager":
        return adaln_mid_eager(x, branch, gate, weight, shift, scale, eps)
    return _adaln_mid_fwd(x, branch, gate, weight, shift, scale, eps, backend)[:2]


def adaln_tail(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    weight3: Tensor,
    weight1: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    backend: str = "fused",
) -> tuple[Tensor, Tensor]:
    """x2 = norm(x + gate branch) weight3, y = norm(x2) weight1 (1 + scale) + shift; both (B, T, D)."""
    backend = _backend.resolve(backend, x, branch, gate, weight3, weight1, shift, scale)
    _check(x, branch, (weight3, weight1), shift, scale, gate)
    if backend == "eager":
        return adaln_tail_eager(x, branch, gate, weight3, weight1, shift, scale, eps)
    return _adaln_tail_fwd(x, branch, gate, weight3, weight1, shift, scale, eps, backend)[:2]
