"""A linear layer computed from low-precision copies of its weight, which are made once and used by many passes.

    y = x W^T + b;  dx = dy W;  dW = dy^T x;  db = sum dy

    half    every product in bfloat16, from a bfloat16 copy of W
    scaled  y and dx in float8, from e4m3 copies of W and W^T; dW in bfloat16

Scales are taken from the values at hand ("current scaling"), so there is no history to save. One scale per tensor: x
and W in e4m3, dy in e5m2, whose range a gradient can use. One scale per row (of x, dy, W and W^T): all in e4m3.
dW and db reach a float32 weight in float32; on CPUs, which have no such product, dW is rounded to bfloat16 before. A
weight that is in bfloat16, as ranks gather it, has its dW in bfloat16.

Shapes: x (..., K), W (N, K), y (..., N), b (N,). ``columns`` (start, stop) asks for these columns of y alone; b is then
theirs. A b that wants no gradient gets none: it is a pass over dy, which whoever made dy may have taken with it. N, K
and the columns of a scaled layer are multiples of 16 (cuBLAS).

Copies may be larger than W, for sizes that products are fast at: W's rows in ``groups`` equal groups, each followed by
zero rows, and zero columns behind its own. Then x has the copy's columns and y as many columns as the copy has rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.torch_version import TorchVersion

MULTIPLE = 16  # of the sizes of a float8 product
SCALES_ROWS = TorchVersion(torch.__version__) >= (2, 13)  # on CPUs, too
SMALLEST = 1e-30  # largest magnitude of a tensor from which scales are computed: 57344 / SMALLEST is finite


def quantise(x: Tensor, dtype: torch.dtype, per_row: bool = False) -> tuple[Tensor, Tensor]:
    """(rows, columns) in any float dtype -> the same in a float8 ``dtype``, and float32 factors that undo its scaling.

    The factors have shape (), or (rows, 1) with ``per_row``. What is not finite makes its whole tensor or row NaN.
    """
    limit = torch.finfo(dtype).max
    largest = torch.linalg.vector_norm(x, torch.inf, dim=1 if per_row else None, keepdim=per_row)
    largest = largest.float().clamp_min(SMALLEST)
    scaled = x.float() * (limit / largest)
    return scaled.clamp(-limit, limit).to(dtype), largest / limit


def padded_shape(shape: Sequence[int], groups: int, columns: bool) -> tuple[int, int]:
    """(N, K) -> that of a copy: each of ``groups`` groups of rows, and with ``columns`` the columns, in multiples of
    16. No group (0): as many rows as there are."""
    rows, inputs = shape
    if groups:
        rows = groups * _rounded_up(rows // groups)
    return rows, _rounded_up(inputs) if columns else inputs


def _rounded_up(size: int) -> int:
    return -(-size // MULTIPLE) * MULTIPLE


def own_part(padded: Tensor, shape: Sequence[int], groups: int) -> Tensor:
    """Of a padded copy or gradient, what belongs to the weight (N, K) or bias (N,): a view (groups, N / groups, K)."""
    groups = groups or 1
    rows = padded.unflatten(0, (groups, -1))[:, : shape[0] // groups]
    return rows[..., : shape[1]] if len(shape) > 1 else rows


def write_scaled_(
    weight: Tensor, copy: Tensor, scale: Tensor, transposed: Tensor, transposed_scale: Tensor, groups: int = 0
) -> None:
    """Quantises ``weight`` (N, K) into ``copy`` (N, K) and ``transposed`` (K, N), e4m3, with their factors.

    Factors of shape () mean one scale per tensor; (N, 1) and (K, 1) one per row of each copy.
    """
    if copy.shape != weight.shape:
        padded = weight.new_zeros(copy.shape)
        own_part(padded, weight.shape, groups).copy_(weight.unflatten(0, (groups or 1, -1)))
        weight = padded
    per_row = scale.ndim == 2
    values, factors = quantise(weight, copy.dtype, per_row)
    copy.copy_(values)
    scale.copy_(factors)
    if per_row:
        values, factors = quantise(weight.t(), copy.dtype, per_row)
        transposed.copy_(values)
    else:
        transposed.copy_(values.t())
    transposed_scale.copy_(factors)


def _weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """dy^T x of (R, N) and (R, K) bfloat16, in ``dtype``, bfloat16 or float32."""
    if x.is_cuda and dtype == torch.float32:
        return torch.mm(dy.t(), x, out_dtype=torch.float32)
    return torch.mm(dy.t(), x).to(dtype)


def _layer_weight_gradient(
    dy: Tensor,
    x: Tensor,
    columns: tuple[int, int],
    outputs: int,
    shape: Sequence[int],
    groups: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """dW of ``shape`` (N, K) in ``dtype`` from dy (R, n), its columns ``columns``, and x (..., K), both bfloat16.

    outputs: N, or the rows of a padded copy.
    """
    dweight = _weight_gradient(dy, x.flatten(0, -2), dtype)
    before, behind = columns[0], outputs - columns[1]
    if before or behind:
        dweight = F.pad(dweight, (0, 0, before, behind))
    return dweight if dweight.shape == shape else own_part(dweight, shape, groups).flatten(0, 1)


def _bias_gradient(dy: Tensor, size: int, groups: int = 0) -> Tensor | None:
    """float32 db (size,) from its part of dy (R, n): a pass over all of it, so only where there is a bias (not 0)."""
    if not size:
        return None
    dbias = dy.sum(0, dtype=torch.float32)
    return dbias if len(dbias) == size else own_part(dbias, (size,), groups).flatten()


def _wanted(bias: Tensor | None, gradient: bool) -> int:
    """The size of the bias gradient that a backward makes, 0 for none."""
    return len(bias) if bias is not None and gradient else 0


def _scaled_product(x: Tensor, y: Tensor, x_scale: Tensor, y_scale: Tensor, **options: Any) -> Tensor:
    """x yT of float8 matrices with their scales, 0-d or one per row (M, 1), (N, 1)."""
    if x_scale.ndim == 0 and not x.is_cuda and SCALES_ROWS:  # a thousand times as fast there as one scale per matrix
        x_scale, y_scale = x_scale.expand(len(x), 1).contiguous(), y_scale.expand(len(y), 1).contiguous()
    y_scale = y_scale.t() if y_scale.ndim == 2 else y_scale
    return torch._scaled_mm(x, y.t(), scale_a=x_scale, scale_b=y_scale, **options)


class _Half(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        copy: Tensor,
        bias_copy: Tensor | None,
        columns: tuple[int, int],
        groups: int,
    ):
        ctx.save_for_backward(x, copy)
        ctx.columns, ctx.shape, ctx.groups = columns, weight.shape, groups
        ctx.biased = _wanted(bias, ctx.needs_input_grad[2])
        return F.linear(x, copy[slice(*columns)], bias_copy)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, copy = ctx.saved_tensors
        dy = dy.flatten(0, -2)
        dx = torch.mm(dy, copy[slice(*ctx.columns)]).view(x.shape) if ctx.needs_input_grad[0] else None
        dweight = None  # of a frozen weight
        if ctx.needs_input_grad[1]:
            dweight = _layer_weight_gradient(dy, x, ctx.columns, len(copy), ctx.shape, ctx.groups)
        return dx, dweight, _bias_gradient(dy, ctx.biased, ctx.groups), *(None,) * 4


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        copy: Tensor,
        scale: Tensor,
        transposed: Tensor,
        transposed_scale: Tensor,
        bias_copy: Tensor | None,
        columns: tuple[int, int],
        groups: int,
    ):
        per_row = scale.ndim == 2
        values, factors = quantise(x.flatten(0, -2), copy.dtype, per_row)
        ctx.save_for_backward(x, transposed, transposed_scale)
        ctx.columns, ctx.shape, ctx.groups, ctx.dtype = columns, weight.shape, groups, weight.dtype
        ctx.biased = _wanted(bias, ctx.needs_input_grad[2])
        where = slice(*columns)
        scale = scale[where] if per_row else scale
        y = _scaled_product(values, copy[where], factors, scale, bias=bias_copy, out_dtype=x.dtype, use_fast_accum=True)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, transposed, transposed_scale = ctx.saved_tensors
        outputs = transposed.shape[1]
        dy = dy.flatten(0, -2)
        dx = None
        if ctx.needs_input_grad[0]:
            per_row = transposed_scale.ndim == 2
            values, factors = quantise(dy, transposed.dtype if per_row else torch.float8_e5m2, per_row)
            if dy.shape[1] < outputs:
                transposed = transposed[:, slice(*ctx.columns)].contiguous()
            # Sums of gradients in full float32; the kernels with a scale per row are only fast without.
            options = {"out_dtype": x.dtype, "use_fast_accum": per_row}
            dx = _scaled_product(values, transposed, factors, transposed_scale, **options).view(x.shape)
        dweight = None  # of a frozen weight
        if ctx.needs_input_grad[1]:
            dweight = _layer_weight_gradient(dy, x, ctx.columns, outputs, ctx.shape, ctx.groups, ctx.dtype)
        return dx, dweight, _bias_gradient(dy, ctx.biased, ctx.groups), *(None,) * 7


class _WeightGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, start: int):
        ctx.save_for_backward(x)
        ctx.columns, ctx.shape = (start, start + y.shape[-1]), weight.shape
        ctx.biased = _wanted(bias, ctx.needs_input_grad[3])
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy: Tensor):
        (x,) = ctx.saved_tensors
        rows = dy.flatten(0, -2)
        dweight = None  # of a frozen weight
        if ctx.needs_input_grad[2]:
            dweight = _layer_weight_gradient(rows, x, ctx.columns, ctx.shape[0], ctx.shape)
        return dy, None, dweight, _bias_gradient(rows, ctx.biased), None


def with_weight_gradient(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, start: int = 0) -> Tensor:
    """y, computed elsewhere from x and constants equal to ``weight`` and ``bias``, with dW and db sent to these.

    y (..., n) and x (..., K) in bfloat16; y are the layer's columns from ``start`` on, the last ones with ``bias``. The
    gradient of x is the business of whoever computed y.
    """
    return _WeightGradient.apply(y, x.detach(), weight, bias, start)


def half_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    copy: Tensor,
    bias_copy: Tensor | None,
    columns: tuple[int, int],
    groups: int = 0,
) -> Tensor:
    """Columns of y in bfloat16, which x is cast to; gradients go to ``weight`` and ``bias``.

    copy (N, K) and bias_copy (n,): their current values in bfloat16, padded or not. Without a bias both of it are None.
    """
    return _Half.apply(x.to(copy.dtype), weight, bias, copy, bias_copy, columns, groups)


def scaled_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    copies: tuple[Tensor, Tensor, Tensor, Tensor],
    bias_copy: Tensor | None,
    columns: tuple[int, int],
    groups: int = 0,
) -> Tensor:
    """As ``half_linear`` with products in float8. copies: what ``write_scaled_`` wrote, in its order.

    Needs sm_89 or later, or a CPU (with one scale per row: torch 2.13 or later there).
    """
    return _Scaled.apply(x.to(torch.bfloat16), weight, bias, *copies, bias_copy, columns, groups)
