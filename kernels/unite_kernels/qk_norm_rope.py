"""RMSNorm of each query and key head, then rotary position embedding, on packed queries and keys.

    x = qk + bias;  n = x / sqrt(mean(x^2) + eps) weight           per head; own weight for q and k, (head_dim,)
    out[2i], out[2i+1] = n[2i] c - n[2i+1] s, n[2i+1] c + n[2i] s  c, s = cos[p, i], sin[p, i], p = token - prefix

The first ``prefix`` tokens are not rotated. Shapes: qk (B, T, 2 heads head_dim), rows q, then k, each head-major; bias
(2 heads head_dim,), that of the linear layer before, or none; cos, sin (P, head_dim / 2) float32 with P >= T - prefix;
rstd (B, T, 2, heads) float32.

Bytes per token in bfloat16, D = heads head_dim: forward 8 D, backward 12 D, and 8 heads for rstd. A program takes the
same tokens of several samples, so that it reads the bias and their rows of the tables once, and writes one sum of the
bias gradient for all of them: 24 D bytes in the backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backend as _backend
from . import launches
from .jit import jit, next_power_of_2, tl, triton


def qk_norm_rope_eager(
    qk: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    bias: Tensor | None,
    heads: int,
    prefix: int,
    eps: float,
) -> Tensor:
    batch, tokens, width = qk.shape
    biased = qk if bias is None else qk.float() + bias.float()
    q, k = biased.reshape(batch, tokens, 2, heads, width // (2 * heads)).unbind(2)
    cos, sin = (table[: tokens - prefix, None].float() for table in (cos, sin))

    def rotate(x: Tensor, weight: Tensor) -> Tensor:
        x = x.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()
        even, odd = x[:, prefix:, :, 0::2], x[:, prefix:, :, 1::2]
        turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
        return torch.cat((x[:, :prefix], turned), dim=1).to(qk.dtype)

    return torch.stack((rotate(q, q_weight), rotate(k, k_weight)), dim=2).reshape(qk.shape)


def _launch(direction: str, qk: Tensor) -> tuple[launches.Launch, tuple[int, int], int]:
    """The launch, its grid, and the samples of one program, which loads weights, tables and bias once."""
    batch, tokens, width = qk.shape
    launch = launches.launch_of("qk_norm_rope", direction, width // 2, qk.device)
    tiles = triton.cdiv(tokens, launch.rows)
    samples = launches.steps_per_program(tiles, batch, launches.slots_of(launch, qk.device))
    return launch, (tiles, triton.cdiv(batch, samples)), samples


@jit
def _pairs(x, TOKENS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr):
    return tl.split(tl.reshape(x, (TOKENS, HEADS, DIM // 2, 2)))


@jit
def _weight_pairs(p, DIM: tl.constexpr, HEAD_DIM: tl.constexpr):
    o = tl.arange(0, DIM)
    weight = tl.load(p + o, mask=o < HEAD_DIM, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(weight, (DIM // 2, 2)))
    return even[None, None, :], odd[None, None, :]


@jit
def _angles(p_cos, p_sin, o_token, m_token, prefix, DIM: tl.constexpr, HEAD_DIM: tl.constexpr):
    o_i = tl.arange(0, DIM // 2)
    position = o_token - prefix
    o = position[:, None] * (HEAD_DIM // 2) + o_i[None, :]
    m = (m_token & (position >= 0))[:, None] & (o_i < HEAD_DIM // 2)[None, :]
    return tl.load(p_cos + o, mask=m, other=1.0)[:, None, :], tl.load(p_sin + o, mask=m, other=0.0)[:, None, :]


@jit
def _bias_tile(
    p_bias,
    part,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BIAS: tl.constexpr,
):
    bias = tl.zeros((1, BLOCK_HEADS, DIM), tl.float32)
    if BIAS:
        o_head, o_d = tl.arange(0, BLOCK_HEADS), tl.arange(0, DIM)
        o = part * (HEADS * HEAD_DIM) + o_head[None, :, None] * HEAD_DIM + o_d[None, None, :]
        m = (o_head < HEADS)[None, :, None] & (o_d < HEAD_DIM)[None, None, :]
        bias = tl.load(p_bias + o, mask=m, other=0.0).to(tl.float32)
    return bias


@jit(do_not_specialize=["samples"])
def _forward_kernel(
    p_qk,
    p_q_weight,
    p_k_weight,
    p_cos,
    p_sin,
    p_bias,
    p_out,
    p_rstd,
    batch,
    tokens,
    samples,
    prefix,
    eps,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    BIAS: tl.constexpr,
):
    o_head, o_d = tl.arange(0, BLOCK_HEADS), tl.arange(0, DIM)
    o_token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    m_token = o_token < tokens
    cos, sin = _angles(p_cos, p_sin, o_token, m_token, prefix, DIM, HEAD_DIM)
    for part in tl.static_range(2):
        weight_even, weight_odd = _weight_pairs(p_q_weight if part == 0 else p_k_weight, DIM, HEAD_DIM)
        bias = _bias_tile(p_bias, part, HEADS, HEAD_DIM, BLOCK_HEADS, DIM, BIAS)
        for i in tl.range(0, samples):
            b = tl.program_id(1).to(tl.int64) * samples + i
            m_rows = (m_token & (b < batch))[:, None] & (o_head < HEADS)[None, :]
            m = m_rows[:, :, None] & (o_d < HEAD_DIM)[None, None, :]
            o_row = b * tokens + o_token
            o = o_row[:, None, None] * (2 * HEADS * HEAD_DIM) + o_head[None, :, None] * HEAD_DIM
            o += part * (HEADS * HEAD_DIM) + o_d[None, None, :]
            x = tl.load(p_qk + o, mask=m, other=0.0).to(tl.float32) + bias
            rstd = tl.rsqrt(tl.sum(x * x, axis=2) / HEAD_DIM + eps)
            o_rstd = (o_row[:, None] * 2 + part) * HEADS + o_head[None, :]
            tl.store(p_rstd + o_rstd, rstd, mask=m_rows)
            even, odd = _pairs(x * rstd[:, :, None], TOKENS, BLOCK_HEADS, DIM)
            even, odd = even * weight_even, odd * weight_odd
            out = tl.join(even * cos - odd * sin, odd * cos + even * sin)
            out = tl.reshape(out, (TOKENS, BLOCK_HEADS, DIM))
            tl.store(p_out + o, out.to(p_out.dtype.element_ty), mask=m)


@jit(do_not_specialize=["samples"])
def _backward_kernel(
    p_dout,
    p_qk,
    p_q_weight,
    p_k_weight,
    p_cos,
    p_sin,
    p_bias,
    p_rstd,
    p_dqk,
    p_sums,
    p_bias_sums,
    batch,
    tokens,
    samples,
    prefix,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    BIAS: tl.constexpr,
):
    o_head, o_d, o_i = tl.arange(0, BLOCK_HEADS), tl.arange(0, DIM), tl.arange(0, DIM // 2)
    o_token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    m_token = o_token < tokens
    program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    for part in tl.static_range(2):
        weight_even, weight_odd = _weight_pairs(p_q_weight if part == 0 else p_k_weight, DIM, HEAD_DIM)
        sum_even = tl.zeros((DIM // 2,), tl.float32)
        sum_odd = tl.zeros((DIM // 2,), tl.float32)
        sum_dx = tl.zeros((BLOCK_HEADS, DIM), tl.float32)
        bias = _bias_tile(p_bias, part, HEADS, HEAD_DIM, BLOCK_HEADS, DIM, BIAS)
        cos, sin = _angles(p_cos, p_sin, o_token, m_token, prefix, DIM, HEAD_DIM)
        for i in tl.range(0, samples):
            b = tl.program_id(1).to(tl.int64) * samples + i
            m_rows = (m_token & (b < batch))[:, None] & (o_head < HEADS)[None, :]
            m = m_rows[:, :, None] & (o_d < HEAD_DIM)[None, None, :]
            o_row = b * tokens + o_token
            o = o_row[:, None, None] * (2 * HEADS * HEAD_DIM) + o_head[None, :, None] * HEAD_DIM
            o += part * (HEADS * HEAD_DIM) + o_d[None, None, :]
            dout = tl.load(p_dout + o, mask=m, other=0.0).to(tl.float32)
            x = tl.load(p_qk + o, mask=m, other=0.0).to(tl.float32) + bias
            o_rstd = (o_row[:, None] * 2 + part) * HEADS + o_head[None, :]
            rstd = tl.load(p_rstd + o_rstd, mask=m_rows, other=0.0)[:, :, None]
            even, odd = _pairs(x * rstd, TOKENS, BLOCK_HEADS, DIM)
            dout_even, dout_odd = _pairs(dout, TOKENS, BLOCK_HEADS, DIM)
            dn_even, dn_odd = dout_even * cos + dout_odd * sin, dout_odd * cos - dout_even * sin
            sum_even += tl.sum(tl.sum(dn_even * even, axis=0), axis=0)
            sum_odd += tl.sum(tl.sum(dn_odd * odd, axis=0), axis=0)
            g_even, g_odd = dn_even * weight_even, dn_odd * weight_odd
            mean = (tl.sum(g_even * even + g_odd * odd, axis=2) / HEAD_DIM)[:, :, None]
            dx = tl.reshape(tl.join(g_even - even * mean, g_odd - odd * mean), (TOKENS, BLOCK_HEADS, DIM)) * rstd
            tl.store(p_dqk + o, dx.to(p_dqk.dtype.element_ty), mask=m)
            if BIAS:
                sum_dx += tl.sum(dx, axis=0)
        p = p_sums + (program * 2 + part) * HEAD_DIM + 2 * o_i
        tl.store(p, sum_even, mask=o_i < HEAD_DIM // 2)
        tl.store(p + 1, sum_odd, mask=o_i < HEAD_DIM // 2)
        if BIAS:
            o_bias = (program * 2 + part) * (HEADS * HEAD_DIM) + o_head[:, None] * HEAD_DIM + o_d[None, :]
            m_bias = (o_head < HEADS)[:, None] & (o_d < HEAD_DIM)[None, :]
            tl.store(p_bias_sums + o_bias, sum_dx, mask=m_bias)


def _sizes(qk: Tensor, heads: int) -> tuple[int, int, int, int]:
    head_dim = qk.shape[2] // (2 * heads)
    return heads, head_dim, next_power_of_2(heads), next_power_of_2(head_dim)


@torch.library.custom_op("unite_kernels::qk_norm_rope_fwd", mutates_args=())
def _qk_norm_rope_fwd(
    qk: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    bias: Tensor | None,
    heads: int,
    prefix: int,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend == "cpp":
        return _backend.cpu_op("qk_norm_rope_fwd")(qk, q_weight, k_weight, cos, sin, bias, heads, prefix, eps)
    batch, tokens, _width = qk.shape
    launch, grid, samples = _launch("forward", qk)
    out, rstd = torch.empty_like(qk), qk.new_empty(batch, tokens, 2, heads, dtype=torch.float32)
    with torch.cuda.device_of(qk):
        _forward_kernel[grid](
            *(qk, q_weight, k_weight, cos, sin, bias, out, rstd, batch, tokens, samples, prefix, eps),
            *(*_sizes(qk, heads), launch.rows, bias is not None),
            num_warps=launch.warps,
        )
    return out, rstd


@_qk_norm_rope_fwd.register_fake
def _(qk, q_weight, k_weight, cos, sin, bias, heads, prefix, eps, backend):
    return torch.empty_like(qk), qk.new_empty(*qk.shape[:2], 2, heads, dtype=torch.float32)


@torch.library.custom_op("unite_kernels::qk_norm_rope_bwd", mutates_args=())
def _qk_norm_rope_bwd(
    dout: Tensor,
    qk: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    bias: Tensor | None,
    rstd: Tensor,
    heads: int,
    prefix: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dout = dout.contiguous()
    if backend == "cpp":
        return _backend.cpu_op("qk_norm_rope_bwd")(dout, qk, q_weight, k_weight, cos, sin, bias, rstd, heads, prefix)
    batch, tokens, width = qk.shape
    launch, grid, samples = _launch("backward", qk)
    dqk = torch.empty_like(qk)
    sums = qk.new_empty(grid[0] * grid[1], 2, q_weight.numel(), dtype=torch.float32)
    bias_sums = None if bias is None else qk.new_empty(grid[0] * grid[1], width, dtype=torch.float32)
    with torch.cuda.device_of(qk):
        _backward_kernel[grid](
            *(dout, qk, q_weight, k_weight, cos, sin, bias, rstd, dqk, sums, bias_sums, batch, tokens, samples, prefix),
            *(*_sizes(qk, heads), launch.rows, bias is not None),
            num_warps=launch.warps,
        )
    sums = sums.sum(0)
    dbias = qk.new_empty(0, dtype=torch.float32) if bias is None else bias_sums.sum(0).to(bias.dtype)
    return dqk, sums[0].to(q_weight.dtype, copy=True), sums[1].to(k_weight.dtype, copy=True), dbias


@_qk_norm_rope_bwd.register_fake
def _(dout, qk, q_weight, k_weight, cos, sin, bias, rstd, heads, prefix, backend):
    dbias = qk.new_empty(0, dtype=torch.float32) if bias is None else torch.empty_like(bias)
    return torch.empty_like(qk), torch.empty_like(q_weight), torch.empty_like(k_weight), dbias


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # no zeros for rstd, which has no gradient; the other output is always used
    *tensors, ctx.heads, ctx.prefix, _eps, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.biased = tensors[-1] is not None


def _backward(ctx, dout, _drstd):
    *grads, dbias = _qk_norm_rope_bwd(dout, *ctx.saved_tensors, ctx.heads, ctx.prefix, ctx.backend)
    return *grads, None, None, dbias if ctx.biased else None, None, None, None, None


_qk_norm_rope_fwd.register_autograd(_backward, setup_context=_setup)


def qk_norm_rope(
    qk: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    prefix: int = 0,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "fused",
) -> Tensor:
    """Packed (B, T, 2 heads head_dim): q and k of qk + bias, normalised per head and rotated.

    Gradients of qk, bias and the weights.
    """
    backend = _backend.resolve(backend, qk, q_weight, k_weight, cos, sin, bias)
    _backend.check_float("qk", qk)
    if qk.ndim != 3 or heads < 1 or qk.shape[2] == 0 or qk.shape[2] % (4 * heads):
        raise ValueError(f"qk must have shape (batch, tokens, 2 * {heads} heads * even), not {tuple(qk.shape)}")
    _backend.check_contiguous("qk", qk)
    head_dim = qk.shape[2] // (2 * heads)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        _backend.check_float(name, weight)
        _backend.check_shape(name, weight, (head_dim,))
        _backend.check_contiguous(name, weight)
    if bias is not None:
        _backend.check_float("bias", bias)
        _backend.check_shape("bias", bias, qk.shape[2:])
        _backend.check_contiguous("bias", bias)
    if not 0 <= prefix <= qk.shape[1]:
        raise ValueError(f"prefix must be between 0 and the {qk.shape[1]} tokens, not {prefix}")
    positions = qk.shape[1] - prefix
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype != torch.float32:
            raise TypeError(f"{name} must be float32, not {table.dtype}")
        if table.ndim != 2 or table.shape[1] != head_dim // 2 or table.shape[0] < positions:
            raise ValueError(f"{name} must have shape (>= {positions}, {head_dim // 2}), not {tuple(table.shape)}")
        _backend.check_contiguous(name, table)
    if backend == "eager":
        return qk_norm_rope_eager(qk, q_weight, k_weight, cos, sin, bias, heads, prefix, eps)
    return _qk_norm_rope_fwd(qk, q_weight, k_weight, cos, sin, bias, heads, prefix, eps, backend)[0]
