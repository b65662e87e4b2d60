"""Triton kernels of QK-norm and RoPE: formulas, shapes and bytes are in ``qk_norm_rope``.

A program takes a tile of tokens and heads of one part, of several samples in turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import launches
from .jit import jit, next_power_of_2, tl, triton


@jit
def _pairs(x, TOKENS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr):
    return tl.split(tl.reshape(x, (TOKENS, HEADS, DIM // 2, 2)))


@jit
def _weight_pairs(p_first, p_second, part, DIM: tl.constexpr, HEAD_DIM: tl.constexpr, NORMED: tl.constexpr):
    o = tl.arange(0, DIM)
    weight = tl.load(p_first + o, mask=o < HEAD_DIM, other=0.0).to(tl.float32)
    if NORMED == 2:
        weight = tl.where(part == 0, weight, tl.load(p_second + o, mask=o < HEAD_DIM, other=0.0).to(tl.float32))
    even, odd = tl.split(tl.reshape(weight, (DIM // 2, 2)))
    return even[None, None, :], odd[None, None, :]


@jit
def _angles(p_cos, p_sin, o_token, m_token, prefix, DIM: tl.constexpr, HEAD_DIM: tl.constexpr):
    o_i = tl.arange(0, DIM // 2)
    position = o_token - prefix
    o = position[:, None] * (HEAD_DIM // 2) + o_i[None, :]
    m = (m_token & (position >= 0))[:, None] & (o_i < HEAD_DIM // 2)[None, :]
    return tl.load(p_cos + o, mask=m, other=1.0)[:, None, :], tl.load(p_sin + o, mask=m, other=0.0)[:, None, :]


@jit(do_not_specialize=["samples"])
def _forward_kernel(
    p_x,
    p_first_weight,
    p_second_weight,
    p_cos,
    p_sin,
    p_out,
    p_rstd,
    batch,
    tokens,
    samples,
    prefix,
    eps,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    NORMED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
):
    GROUPS: tl.constexpr = (HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    part = tl.program_id(0) // GROUPS
    o_head = (tl.program_id(0) % GROUPS) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    o_d = tl.arange(0, DIM)
    o_token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    m_token = o_token < tokens
    cos, sin = _angles(p_cos, p_sin, o_token, m_token, prefix, DIM, HEAD_DIM)
    weight_even, weight_odd = _weight_pairs(p_first_weight, p_second_weight, part, DIM, HEAD_DIM, NORMED)
    o_column = o_head[None, :, None] * HEAD_DIM + o_d[None, None, :]
    for i in tl.range(0, samples, num_stages=STAGES):
        b = tl.program_id(2).to(tl.int64) * samples + i
        m_rows = (m_token & (b < batch))[:, None] & (o_head < HEADS)[None, :]
        m = m_rows[:, :, None] & (o_d < HEAD_DIM)[None, None, :]
        o_row = b * tokens + o_token
        o = o_row[:, None, None] * (PARTS * HEADS * HEAD_DIM) + part * (HEADS * HEAD_DIM) + o_column
        x = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x * x, axis=2) / HEAD_DIM + eps)
        o_row += part.to(tl.int64) * batch * tokens  # parts lie apart in what is written
        tl.store(p_rstd + o_row[:, None] * HEADS + o_head[None, :], rstd, mask=m_rows)
        even, odd = _pairs(x * rstd[:, :, None], TOKENS, BLOCK_HEADS, DIM)
        even, odd = even * weight_even, odd * weight_odd
        out = tl.join(even * cos - odd * sin, odd * cos + even * sin)
        out = tl.reshape(out, (TOKENS, BLOCK_HEADS, DIM))
        o = o_row[:, None, None] * (HEADS * HEAD_DIM) + o_column
        tl.store(p_out + o, out.to(p_out.dtype.element_ty), mask=m)


@jit(do_not_specialize=["samples"])
def _backward_kernel(
    p_first_grad,
    p_second_grad,
    p_rest_grad,
    p_x,
    p_first_weight,
    p_second_weight,
    p_cos,
    p_sin,
    p_rstd,
    p_dx,
    p_weight_sums,
    p_bias_sums,
    batch,
    tokens,
    samples,
    prefix,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    NORMED: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
):
    GROUPS: tl.constexpr = (HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    part = tl.program_id(0) // GROUPS
    o_head = (tl.program_id(0) % GROUPS) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    o_d, o_i = tl.arange(0, DIM), tl.arange(0, DIM // 2)
    o_token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    m_token = o_token < tokens
    m_head, m_d = o_head < HEADS, o_d < HEAD_DIM
    o_column = o_head[None, :, None] * HEAD_DIM + o_d[None, None, :]
    program = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    # Sums over samples stay where their products are; tokens and heads are added after the loop.
    sum_dx = tl.zeros((TOKENS, BLOCK_HEADS, DIM), tl.float32)
    if part < NORMED:
        weight_even, weight_odd = _weight_pairs(p_first_weight, p_second_weight, part, DIM, HEAD_DIM, NORMED)
        cos, sin = _angles(p_cos, p_sin, o_token, m_token, prefix, DIM, HEAD_DIM)
        sum_even = tl.zeros((TOKENS, BLOCK_HEADS, DIM // 2), tl.float32)
        sum_odd = tl.zeros((TOKENS, BLOCK_HEADS, DIM // 2), tl.float32)
        p_grad = p_first_grad
        if NORMED == 2:
            p_grad = tl.where(part == 0, p_first_grad, p_second_grad)
        for i in tl.range(0, samples, num_stages=STAGES):
            b = tl.program_id(2).to(tl.int64) * samples + i
            m_rows = (m_token & (b < batch))[:, None] & m_head[None, :]
            m = m_rows[:, :, None] & m_d[None, None, :]
            o_row = b * tokens + o_token
            o = o_row[:, None, None] * (PARTS * HEADS * HEAD_DIM) + part * (HEADS * HEAD_DIM) + o_column
            grad = tl.load(p_grad + o_row[:, None, None] * (HEADS * HEAD_DIM) + o_column, mask=m, other=0.0)
            x = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
            o_rstd = (o_row + part.to(tl.int64) * batch * tokens)[:, None] * HEADS + o_head[None, :]
            rstd = tl.load(p_rstd + o_rstd, mask=m_rows, other=0.0)[:, :, None]
            even, odd = _pairs(x * rstd, TOKENS, BLOCK_HEADS, DIM)
            grad_even, grad_odd = _pairs(grad.to(tl.float32), TOKENS, BLOCK_HEADS, DIM)
            dn_even, dn_odd = grad_even * cos + grad_odd * sin, grad_odd * cos - grad_even * sin
            sum_even += dn_even * even
            sum_odd += dn_odd * odd
            g_even, g_odd = dn_even * weight_even, dn_odd * weight_odd
            mean = (tl.sum(g_even * even + g_odd * odd, axis=2) / HEAD_DIM)[:, :, None]
            dx = tl.reshape(tl.join(g_even - even * mean, g_odd - odd * mean), (TOKENS, BLOCK_HEADS, DIM)) * rstd
            tl.store(p_dx + o, dx.to(p_dx.dtype.element_ty), mask=m)
            if BIAS:
                sum_dx += dx
        p = p_weight_sums + (program * (NORMED * GROUPS) + tl.program_id(0)) * HEAD_DIM + 2 * o_i
        tl.store(p, tl.sum(tl.sum(sum_even, axis=0), axis=0), mask=o_i < HEAD_DIM // 2)
        tl.store(p + 1, tl.sum(tl.sum(sum_odd, axis=0), axis=0), mask=o_i < HEAD_DIM // 2)
    else:
        for i in tl.range(0, samples, num_stages=STAGES):
            b = tl.program_id(2).to(tl.int64) * samples + i
            m = ((m_token & (b < batch))[:, None] & m_head[None, :])[:, :, None] & m_d[None, None, :]
            o_row = b * tokens + o_token
            grad = tl.load(p_rest_grad + o_row[:, None, None] * (HEADS * HEAD_DIM) + o_column, mask=m, other=0.0)
            o = o_row[:, None, None] * (PARTS * HEADS * HEAD_DIM) + part * (HEADS * HEAD_DIM) + o_column
            tl.store(p_dx + o, grad, mask=m)
            if BIAS:
                sum_dx += grad.to(tl.float32)
    if BIAS:
        o = program * (PARTS * HEADS * HEAD_DIM) + part * (HEADS * HEAD_DIM) + o_head[:, None] * HEAD_DIM + o_d[None, :]
        tl.store(p_bias_sums + o, tl.sum(sum_dx, axis=0), mask=m_head[:, None] & m_d[None, :])


def _launch(direction: str, x: Tensor, heads: int, head_dim: int, parts: int) -> tuple[launches.Launch, tuple, int]:
    """The launch, its grid for ``parts`` parts, and the samples of one program."""
    batch, tokens, _ = x.shape
    launch = launches.launch_of("qk_norm_rope", direction, heads * head_dim, x.device)
    grid = parts * triton.cdiv(heads, launch.columns), triton.cdiv(tokens, launch.rows)
    samples = launches.steps_per_program(grid[0] * grid[1], batch, launches.slots_of(launch, x.device))
    return launch, (*grid, triton.cdiv(batch, samples)), samples


def run_forward(x: Tensor, weights: Sequence[Tensor], cos, sin, heads: int, prefix: int, eps: float):
    """(out, rstd): the normalised parts in one tensor (N, B, T, heads head_dim)."""
    (batch, tokens, width), head_dim, normed = x.shape, weights[0].numel(), len(weights)
    launch, grid, samples = _launch("forward", x, heads, head_dim, normed)
    out = x.new_empty(normed, batch, tokens, heads * head_dim)
    rstd = x.new_empty(normed, batch, tokens, heads, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _forward_kernel[grid](
            *(x, weights[0], weights[-1], cos, sin, out, rstd, batch, tokens, samples, prefix, eps),
            *(heads, head_dim, width // (heads * head_dim), normed),
            *(launch.columns, next_power_of_2(head_dim), launch.rows, launch.stages),
            num_warps=launch.warps,
        )
    return out, rstd


def run_backward(grads: Sequence[Tensor], x, weights: Sequence[Tensor], cos, sin, rstd, heads, prefix, biased: bool):
    """(dx, dweights (N, head_dim) and dbias (P heads head_dim) in float32; dbias empty unless ``biased``)."""
    (batch, tokens, width), head_dim, normed = x.shape, weights[0].numel(), len(weights)
    launch, grid, samples = _launch("backward", x, heads, head_dim, len(grads))
    programs, dx = grid[1] * grid[2], torch.empty_like(x)
    weight_sums = x.new_empty(programs, normed, grid[0] // len(grads), head_dim, dtype=torch.float32)
    bias_sums = x.new_empty(programs if biased else 0, width, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _backward_kernel[grid](
            *(grads[0], grads[normed - 1], grads[-1], x, weights[0], weights[-1], cos, sin, rstd),
            *(dx, weight_sums, bias_sums, batch, tokens, samples, prefix),
            *(heads, head_dim, len(grads), normed, biased),
            *(launch.columns, next_power_of_2(head_dim), launch.rows, launch.stages),
            num_warps=launch.warps,
        )
    return dx, weight_sums.sum((0, 2)), bias_sums.sum(0) if biased else x.new_empty(0, dtype=torch.float32)
