"""Triton kernels of adaptive layer norm: formulas, shapes and bytes are in ``adaln``.

One forward and one backward kernel serve the three forms (KIND); the sums shared over rows are taken by program in the
backward kernel and over programs in the reduction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import launches
from .jit import jit, next_power_of_2, tl, triton

PLAIN, MID, TAIL = 0, 1, 2  # KIND of a kernel
OPS = ("adaln", "adaln_mid", "adaln_tail")  # in the table of launches
REDUCED = 16  # programs' sums that are added at once


def _launch(kind: int, direction: str, x: Tensor) -> tuple[int, launches.Launch, int]:
    """The block that holds a row, the launch, and how many tiles a program takes: of one sample, whose vectors it loads
    once."""
    batch, tokens, width = x.shape
    launch = launches.launch_of(OPS[kind], direction, width, x.device)
    tiles = triton.cdiv(tokens, launch.rows)
    steps = launches.steps_per_program(batch, tiles, launches.slots_of(launch, x.device))
    return max(32, next_power_of_2(width)), launch, steps


@jit
def _row(p, b, stride, o_d, m_d):
    return tl.load(p + b * stride + o_d, mask=m_d, other=0.0).to(tl.float32)


@jit(do_not_specialize=["steps"])
def _forward_kernel(
    p_x,
    p_branch,
    p_gate,
    p_weight3,
    p_weight,
    p_shift,
    p_scale,
    p_bias,
    p_out,
    p_y,
    p_rstd3,
    p_rstd,
    tokens,
    steps,
    stride_gate,
    stride_shift,
    stride_scale,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    KIND: tl.constexpr,
    BIAS: tl.constexpr,
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
    if BIAS:
        bias = _row(p_bias, 0, 0, o_d, m_d)
    for i in tl.range(0, steps, num_stages=STAGES):
        o_t = (tl.program_id(0) * steps + i) * ROWS + tl.arange(0, ROWS)
        m_t = o_t < tokens
        o_row = b * tokens + o_t
        o = o_row[:, None] * WIDTH + o_d[None, :]
        m = m_t[:, None] & m_d[None, :]
        u = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
        if KIND != 0:
            branch = tl.load(p_branch + o, mask=m, other=0.0).to(tl.float32)
            if BIAS:
                branch += bias[None, :]
            u += gate[None, :] * branch
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


@jit(do_not_specialize=["steps"])
def _backward_kernel(
    p_dout,
    p_dy,
    p_x,
    p_branch,
    p_gate,
    p_weight3,
    p_weight,
    p_scale,
    p_bias,
    p_rstd3,
    p_rstd,
    p_dx,
    p_dbranch,
    p_sums,
    tokens,
    steps,
    stride_gate,
    stride_scale,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    KIND: tl.constexpr,
    BIAS: tl.constexpr,
    SUMS: tl.constexpr,
):
    # A program sums over its rows: dy (dshift), dy xhat (dscale, dweight), dx1 branch and dx1 (dgate, dbias: gate and
    # bias are the same in all of its rows, and come after the loop), dx2 xhat3 (dweight3).
    b = tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < WIDTH
    factor = _row(p_weight, 0, 0, o_d, m_d) * (1.0 + _row(p_scale, b, stride_scale, o_d, m_d))
    sum_dy = tl.zeros((BLOCK,), tl.float32)
    sum_dy_xhat = tl.zeros((BLOCK,), tl.float32)
    if KIND != 0:
        gate = _row(p_gate, b, stride_gate, o_d, m_d)
        sum_du_branch = tl.zeros((BLOCK,), tl.float32)
    if KIND == 2:
        weight3 = _row(p_weight3, 0, 0, o_d, m_d)
        sum_weight3 = tl.zeros((BLOCK,), tl.float32)
    if BIAS:
        sum_du = tl.zeros((BLOCK,), tl.float32)
        if KIND == 2:
            gated_bias = gate * _row(p_bias, 0, 0, o_d, m_d)
    for i in tl.range(0, steps, num_stages=STAGES):  # loads run STAGES - 1 tiles ahead
        o_t = (tl.program_id(0) * steps + i) * ROWS + tl.arange(0, ROWS)
        m_t = o_t < tokens
        o_row = b * tokens + o_t
        o = o_row[:, None] * WIDTH + o_d[None, :]
        m = m_t[:, None] & m_d[None, :]
        u = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
        dy = tl.load(p_dy + o, mask=m, other=0.0).to(tl.float32)
        rstd = tl.load(p_rstd + o_row, mask=m_t, other=0.0)[:, None]
        if KIND != 0:
            branch = tl.load(p_branch + o, mask=m, other=0.0).to(tl.float32)
            dout = tl.load(p_dout + o, mask=m, other=0.0).to(tl.float32)
        if KIND == 2:
            rstd3 = tl.load(p_rstd3 + o_row, mask=m_t, other=0.0)[:, None]
            u += gate[None, :] * branch
            if BIAS:
                u += gated_bias[None, :]
            xhat3 = u * rstd3
            u = (xhat3 * weight3[None, :]).to(p_x.dtype.element_ty).to(tl.float32)
        xhat = u * rstd
        sum_dy += tl.sum(dy, axis=0)
        sum_dy_xhat += tl.sum(dy * xhat, axis=0)
        g = dy * factor[None, :]
        du = rstd * (g - xhat * (tl.sum(g * xhat, axis=1) / WIDTH)[:, None])
        if KIND != 0:
            du += dout
        if KIND == 2:
            sum_weight3 += tl.sum(du * xhat3, axis=0)
            g = du * weight3[None, :]
            du = rstd3 * (g - xhat3 * (tl.sum(g * xhat3, axis=1) / WIDTH)[:, None])
        tl.store(p_dx + o, du.to(p_dx.dtype.element_ty), mask=m)
        if KIND != 0:
            dbranch = gate[None, :] * du
            tl.store(p_dbranch + o, dbranch.to(p_dbranch.dtype.element_ty), mask=m)
            sum_du_branch += tl.sum(du * branch, axis=0)
            if BIAS:
                sum_du += tl.sum(du, axis=0)
    p = p_sums + (b * tl.num_programs(0) + tl.program_id(0)) * (SUMS * WIDTH) + o_d
    tl.store(p, sum_dy, mask=m_d)
    tl.store(p + WIDTH, sum_dy_xhat, mask=m_d)
    if BIAS:
        tl.store(p + (SUMS - 1) * WIDTH, gate * sum_du, mask=m_d)
        sum_du_branch += _row(p_bias, 0, 0, o_d, m_d) * sum_du
    if KIND != 0:
        tl.store(p + 2 * WIDTH, sum_du_branch, mask=m_d)
    if KIND == 2:
        tl.store(p + 3 * WIDTH, sum_weight3, mask=m_d)


@jit
def _reduce_kernel(
    p_sums,
    p_weight,
    p_scale,
    p_dshift,
    p_dscale,
    p_dgate,
    p_dweights,
    parts,
    stride_scale,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    KIND: tl.constexpr,
    BIAS: tl.constexpr,
    SUMS: tl.constexpr,
    WEIGHTS: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    o_d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_d = o_d < WIDTH
    sum_dy = tl.zeros((PARTS, BLOCK), tl.float32)
    sum_dy_xhat = tl.zeros((PARTS, BLOCK), tl.float32)
    sum_gate = tl.zeros((PARTS, BLOCK), tl.float32)
    sum_weight3 = tl.zeros((PARTS, BLOCK), tl.float32)
    sum_bias = tl.zeros((PARTS, BLOCK), tl.float32)
    for first in tl.range(0, parts, PARTS):
        o_part = first + tl.arange(0, PARTS)
        m = (o_part < parts)[:, None] & m_d[None, :]
        p = p_sums + (b * parts + o_part)[:, None] * (SUMS * WIDTH) + o_d[None, :]
        sum_dy += tl.load(p, mask=m, other=0.0)
        sum_dy_xhat += tl.load(p + WIDTH, mask=m, other=0.0)
        if KIND != 0:
            sum_gate += tl.load(p + 2 * WIDTH, mask=m, other=0.0)
        if KIND == 2:
            sum_weight3 += tl.load(p + 3 * WIDTH, mask=m, other=0.0)
        if BIAS:
            sum_bias += tl.load(p + (SUMS - 1) * WIDTH, mask=m, other=0.0)
    o = b * WIDTH + o_d
    tl.store(p_dshift + o, tl.sum(sum_dy, axis=0).to(p_dshift.dtype.element_ty), mask=m_d)
    dy_xhat = tl.sum(sum_dy_xhat, axis=0)
    dscale = dy_xhat * _row(p_weight, 0, 0, o_d, m_d)
    tl.store(p_dscale + o, dscale.to(p_dscale.dtype.element_ty), mask=m_d)
    o_weight = b * (WEIGHTS * WIDTH) + o_d
    tl.store(p_dweights + o_weight, dy_xhat * (1.0 + _row(p_scale, b, stride_scale, o_d, m_d)), mask=m_d)
    if KIND != 0:
        tl.store(p_dgate + o, tl.sum(sum_gate, axis=0).to(p_dgate.dtype.element_ty), mask=m_d)
    if KIND == 2:
        tl.store(p_dweights + o_weight + WIDTH, tl.sum(sum_weight3, axis=0), mask=m_d)
    if BIAS:
        tl.store(p_dweights + o_weight + (WEIGHTS - 1) * WIDTH, tl.sum(sum_bias, axis=0), mask=m_d)


def run_forward(kind: int, x: Tensor, branch, gate, weight3, weight, shift, scale, bias, eps):
    """(out, y, rstd3, rstd), absent ones None."""
    batch, tokens, width = x.shape
    block, launch, steps = _launch(kind, "forward", x)
    out, y = (None, torch.empty_like(x)) if kind == PLAIN else (torch.empty_like(x), torch.empty_like(branch))
    rstd = x.new_empty(batch, tokens, dtype=torch.float32)
    rstd3 = torch.empty_like(rstd) if kind == TAIL else None
    with torch.cuda.device_of(x):
        _forward_kernel[(triton.cdiv(tokens, steps * launch.rows), batch)](
            *(x, branch, gate, weight3, weight, shift, scale, bias, out, y, rstd3, rstd, tokens, steps),
            *(0 if gate is None else gate.stride(0), shift.stride(0), scale.stride(0), eps),
            *(width, block, launch.rows, launch.stages, kind, bias is not None),
            num_warps=launch.warps,
        )
    return out, y, rstd3, rstd


def run_backward(kind: int, dout, dy, x, branch, gate, weight3, weight, scale, bias, rstd3, rstd):
    """(dx, dbranch, dgate, dweight3, dweight, dshift, dscale, dbias), absent ones None; dbias is then empty."""
    batch, tokens, width = x.shape
    block, launch, steps = _launch(kind, "backward", x)
    biased = bias is not None
    sums, weights = 2 + kind + biased, 1 + kind // 2 + biased
    parts = triton.cdiv(tokens, steps * launch.rows)
    partial = x.new_empty(batch, parts, sums, width, dtype=torch.float32)
    dweights = x.new_empty(batch, weights, width, dtype=torch.float32)
    dx, dbranch = torch.empty_like(x), None if kind == PLAIN else torch.empty_like(branch)
    dshift, dscale = scale.new_empty(batch, width), scale.new_empty(batch, width)
    dgate = None if kind == PLAIN else gate.new_empty(batch, width)
    reduce_block = min(block, 64)
    with torch.cuda.device_of(x):
        _backward_kernel[(parts, batch)](
            *(dout, dy, x, branch, gate, weight3, weight, scale, bias, rstd3, rstd, dx, dbranch, partial, tokens),
            *(steps, 0 if gate is None else gate.stride(0), scale.stride(0)),
            *(width, block, launch.rows, launch.stages, kind, biased, sums),
            num_warps=launch.warps,
        )
        _reduce_kernel[(triton.cdiv(width, reduce_block), batch)](
            *(partial, weight, scale, dshift, dscale, dgate, dweights, parts, scale.stride(0)),
            *(width, reduce_block, REDUCED, kind, biased, sums, weights),
            num_warps=4,
        )
    dweights = dweights.sum(0)
    dweight3 = dweights[1].to(weight3.dtype, copy=True) if kind == TAIL else None
    dbias = dweights[-1].to(bias.dtype, copy=True) if biased else x.new_empty(0, dtype=torch.float32)
    return dx, dbranch, dgate, dweight3, dweights[0].to(weight.dtype, copy=True), dshift, dscale, dbias
