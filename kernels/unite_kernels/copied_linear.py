"""A linear layer computed from low-precision copies of its weight, which are made once and used by many passes.

    y = x W^T + b;  dx = dy W;  dW = dy^T x;  db = sum dy

    half    every product in bfloat16, from a bfloat16 copy of W
    scaled  y and dx in float8, from e4m3 copies of W and W^T; dW in bfloat16

Scales are taken from the values at hand ("current scaling"), so there is no history to save. One scale per tensor: x
and W in e4m3, dy in e5m2, whose range a gradient can use. One scale per row (of x, dy, W and W^T): all in e4m3.
dW and db reach the float32 weight in float32; on CPUs, which have no such product, dW is rounded to bfloat16 before.

Shapes: x (..., K), W (N, K), b (N,), y (..., N). ``bounds`` (rising, from 0 to N) asks for columns of y: those from
each bound to the next are one contiguous tensor (why: see split_linear.py). N, K and the bounds of a scaled layer are
multiples of 16 (cuBLAS).

Copies may be larger than W, for sizes that products are fast at: W's rows in ``groups`` equal groups, each followed by
zero rows, and zero columns behind its own. Then x has the copy's columns and y as many columns as the copy has rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

MULTIPLE = 16  # of the sizes of a float8 product
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


def _slices(bounds: tuple[int, ...]) -> list[slice]:
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]


def _weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """float32 dy^T x of (R, N) and (R, K) bfloat16."""
    if x.is_cuda:
        return torch.mm(dy.t(), x, out_dtype=torch.float32)
    return torch.mm(dy.t(), x).float()


def _parameter_gradients(
    parts: list[Tensor], x: Tensor, bounds: tuple[int, ...], outputs: int, shape: Sequence[int], groups: int = 0
) -> tuple[Tensor, Tensor]:
    """float32 dW of ``shape`` (N, K) and db (N,) from the parts of dy (R, n) and x (..., K), all bfloat16.

    outputs: N, or the rows of a padded copy.
    """
    rows = x.flatten(0, -2)
    dweights = [_weight_gradient(part, rows) for part in parts]
    dbiases = [part.sum(0, dtype=torch.float32) for part in parts]
    dweight, dbias = (t[0] if len(t) == 1 else torch.cat(t) for t in (dweights, dbiases))
    before, behind = bounds[0], outputs - bounds[-1]
    if before or behind:
        dweight, dbias = F.pad(dweight, (0, 0, before, behind)), F.pad(dbias, (before, behind))
    if dweight.shape != shape:
        dweight = own_part(dweight, shape, groups).flatten(0, 1)
        dbias = own_part(dbias, shape[:1], groups).flatten()
    return dweight, dbias


class _Half(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        copy: Tensor,
        bias_copy: Tensor | None,
        bounds: tuple[int, ...],
        groups: int,
    ):
        ctx.save_for_backward(x, copy)
        ctx.bounds, ctx.shape, ctx.groups = bounds, weight.shape, groups
        slices = _slices(bounds)
        return tuple(F.linear(x, copy[where], None if bias_copy is None else bias_copy[where]) for where in slices)

    @staticmethod
    def backward(ctx, *dys: Tensor):
        x, copy = ctx.saved_tensors
        parts = [dy.flatten(0, -2) for dy in dys]
        slices = _slices(ctx.bounds)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.mm(parts[0], copy[slices[0]])
            for part, where in zip(parts[1:], slices[1:], strict=True):
                dx = torch.addmm(dx, part, copy[where])
            dx = dx.view(x.shape)
        dweight, dbias = _parameter_gradients(parts, x, ctx.bounds, len(copy), ctx.shape, ctx.groups)
        return dx, dweight, dbias if ctx.needs_input_grad[2] else None, *(None,) * 4


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
        bounds: tuple[int, ...],
        groups: int,
    ):
        per_row = scale.ndim == 2
        values, factors = quantise(x.flatten(0, -2), copy.dtype, per_row)
        ctx.save_for_backward(x, transposed, transposed_scale)
        ctx.bounds, ctx.shape, ctx.groups = bounds, weight.shape, groups
        outputs = []
        for where in _slices(bounds):
            y = torch._scaled_mm(
                values,
                copy[where].t(),
                scale_a=factors,
                scale_b=scale[where].t() if per_row else scale,
                bias=None if bias_copy is None else bias_copy[where],
                out_dtype=x.dtype,
                use_fast_accum=True,
            )
            outputs.append(y.view(*x.shape[:-1], y.shape[-1]))
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *dys: Tensor):
        x, transposed, transposed_scale = ctx.saved_tensors
        outputs = transposed.shape[1]
        parts = [dy.flatten(0, -2) for dy in dys]
        dx = None
        if ctx.needs_input_grad[0]:
            per_row = transposed_scale.ndim == 2
            dy = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            values, factors = quantise(dy, transposed.dtype if per_row else torch.float8_e5m2, per_row)
            if dy.shape[1] < outputs:
                transposed = transposed[:, ctx.bounds[0] : ctx.bounds[-1]].contiguous()
            dx = torch._scaled_mm(
                values,
                transposed.t(),
                scale_a=factors,
                scale_b=transposed_scale.t() if per_row else transposed_scale,
                out_dtype=x.dtype,
                # Sums of gradients in full float32; the kernels with a scale per row are only fast without.
                use_fast_accum=per_row,
            ).view(x.shape)
        dweight, dbias = _parameter_gradients(parts, x, ctx.bounds, outputs, ctx.shape, ctx.groups)
        return dx, dweight, dbias if ctx.needs_input_grad[2] else None, *(None,) * 7


class _WeightGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, start: int):
        ctx.save_for_backward(x)
        ctx.bounds, ctx.shape = (start, start + y.shape[-1]), weight.shape
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy: Tensor):
        (x,) = ctx.saved_tensors
        dweight, dbias = _parameter_gradients([dy.flatten(0, -2)], x, ctx.bounds, ctx.shape[0], ctx.shape)
        return dy, None, dweight, dbias if ctx.needs_input_grad[3] else None, None


def with_weight_gradient(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, start: int = 0) -> Tensor:
    """y, computed elsewhere from x and constants equal to ``weight`` and ``bias``, with dW and db sent to these.

    y (..., n) and x (..., K) in bfloat16; y are the layer's columns from ``start`` on. The gradient of x is the
    business of whoever computed y.
    """
    return _WeightGradient.apply(y, x.detach(), weight, bias, start)


def half_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    copy: Tensor,
    bias_copy: Tensor | None,
    bounds: tuple[int, ...],
    groups: int = 0,
) -> tuple[Tensor, ...]:
    """The parts of y in bfloat16, which x is cast to; gradients go to ``weight`` and ``bias``.

    copy (N, K) and bias_copy (N,): their current values in bfloat16, padded or not. Without a bias both of it are None.
    """
    return _Half.apply(x.to(copy.dtype), weight, bias, copy, bias_copy, bounds, groups)


def scaled_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    copies: tuple[Tensor, Tensor, Tensor, Tensor],
    bias_copy: Tensor | None,
    bounds: tuple[int, ...],
    groups: int = 0,
) -> tuple[Tensor, ...]:
    """As ``half_linear`` with products in float8. copies: what ``write_scaled_`` wrote, in its order.

    Needs sm_89 or later, or a CPU (with one scale per row: torch 2.13 or later there).
    """
    return _Scaled.apply(x.to(torch.bfloat16), weight, bias, *copies, bias_copy, bounds, groups)
