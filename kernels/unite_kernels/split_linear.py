"""One linear layer's output in two tensors: the first ``split`` columns, and the rest.

    first = x W[:split]^T,  rest = x W[split:]^T + b
    dx = dfirst W[:split] + drest W[split:],  dW = [dfirst^T x; drest^T x],  db = sum drest

For a layer whose outputs part ways (queries and keys are normalised, by an operation that adds their bias; values are
not): each part is contiguous, so neither has to be copied out of the other's rows. Shapes: x (..., D), W (N, D), b
(N - split,), first (..., split), rest (..., N - split). The backward writes both parts into one gradient and adds the
second product to dx in place; a slice of the weight outside would cost a zero-padded gradient of the whole weight per
part, and their sum.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def split_linear_eager(x: Tensor, weight: Tensor, bias: Tensor, split: int) -> tuple[Tensor, Tensor]:
    return F.linear(x, weight[:split]), F.linear(x, weight[split:], bias)


class _SplitLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, split: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.split = split
        return split_linear_eager(x, weight, bias, split)

    @staticmethod
    def backward(ctx, dfirst: Tensor, drest: Tensor):
        x, weight = ctx.saved_tensors
        parts = dfirst.flatten(0, -2), drest.flatten(0, -2)
        slices = slice(0, ctx.split), slice(ctx.split, len(weight))
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = torch.mm(parts[0], weight[slices[0]])
            dx = torch.addmm(dx, parts[1], weight[slices[1]], out=dx).view(x.shape)
        if ctx.needs_input_grad[1]:
            dweight, rows = torch.empty_like(weight), x.flatten(0, -2)
            for part, where in zip(parts, slices, strict=True):
                torch.mm(part.T, rows, out=dweight[where])
        if ctx.needs_input_grad[2]:
            dbias = parts[1].sum(0)
        return dx, dweight, dbias, None


def split_linear(x: Tensor, weight: Tensor, bias: Tensor, split: int) -> tuple[Tensor, Tensor]:
    """(x W^T)[..., :split] and (x W^T)[..., split:] + bias, each contiguous.

    x (..., D), weight (N, D), bias (N - split,), one dtype; under autocast all three are cast to its dtype, as
    ``F.linear`` would. Any device; it has no kernels of its own.
    """
    if x.ndim < 2 or weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x and weight must have shapes (..., D), (N, D), not {tuple(x.shape)}, {tuple(weight.shape)}")
    if not 0 < split < weight.shape[0]:
        raise ValueError(f"split must be between 1 and {weight.shape[0] - 1}, not {split}")
    if tuple(bias.shape) != (weight.shape[0] - split,):
        raise ValueError(f"bias must have shape ({weight.shape[0] - split},), not {tuple(bias.shape)}")
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    if not x.dtype == weight.dtype == bias.dtype:
        raise TypeError(f"x, weight and bias must have one dtype, not {x.dtype}, {weight.dtype} and {bias.dtype}")
    return _SplitLinear.apply(x, weight, bias, split)
