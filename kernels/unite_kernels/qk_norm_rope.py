"""RMSNorm of each query and key head, then rotary position embedding, on the packed output of a linear layer.

    n = x / sqrt(mean(x^2) + eps) weight                           per head; a weight (head_dim,) for each part
    out[2i], out[2i+1] = n[2i] c - n[2i+1] s, n[2i+1] c + n[2i] s  c, s = cos[p, i], sin[p, i], p = token - prefix

x (B, T, P heads head_dim): P parts, each head-major. The first N, those with a weight (queries, keys), are normalised
and rotated, each into a tensor of its own, (B, T, heads head_dim); the first ``prefix`` tokens are not rotated. At most
one more part (values) is returned as it lies in x, a view. cos, sin (L, head_dim / 2) float32 with L >= T - prefix;
rstd (N, B, T, heads) float32.

The backward takes the gradients of the parts as attention gives them, one tensor each, and writes the gradient of x, as
the linear layer's two backward products read it: nothing is concatenated. The layer's bias is in x already; its
gradient, the sum of that of x over rows, is taken on the way, and so is that of the values' bias.

Bytes per token in bfloat16, D = heads head_dim: forward 4 D of each normalised part, backward 6 D, and 4 D of the
values; 4 heads for rstd each way. A program takes the same tokens and a few heads of one part, of several samples: it
reads weights and tables once, and keeps its sums in registers until its end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backend as _backend
from .qk_norm_rope_triton import run_backward, run_forward


def qk_norm_rope_eager(
    x: Tensor,
    weights: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    bias: Tensor | None,
    heads: int,
    prefix: int,
    eps: float,
) -> tuple[Tensor, ...]:
    batch, tokens, _ = x.shape
    if bias is not None:
        x = (x + (bias - bias.detach())).to(x.dtype)  # zero, with the bias's gradient
    parts = x.split(heads * weights[0].numel(), dim=-1)
    cos, sin = (table[: tokens - prefix, None].float() for table in (cos, sin))

    def rotated(part: Tensor, weight: Tensor) -> Tensor:
        u = part.reshape(batch, tokens, heads, -1).float()
        u = u * torch.rsqrt(u.square().mean(-1, keepdim=True) + eps) * weight.float()
        even, odd = u[:, prefix:, :, 0::2], u[:, prefix:, :, 1::2]
        turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
        return torch.cat((u[:, :prefix], turned), dim=1).to(x.dtype).flatten(2)

    return *(rotated(*pair) for pair in zip(parts, weights, strict=False)), *parts[len(weights) :]


@torch.library.custom_op("unite_kernels::qk_norm_rope_fwd", mutates_args=())
def _qk_norm_rope_fwd(
    x: Tensor, weights: list[Tensor], cos: Tensor, sin: Tensor, heads: int, prefix: int, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "cpp":
        return _backend.cpu_op("qk_norm_rope_fwd")(x, weights, cos, sin, heads, prefix, eps)
    return run_forward(x, weights, cos, sin, heads, prefix, eps)


@_qk_norm_rope_fwd.register_fake
def _(x, weights, cos, sin, heads, prefix, eps, backend):
    rows = len(weights), *x.shape[:2]
    return x.new_empty(*rows, heads * weights[0].numel()), x.new_empty(*rows, heads, dtype=torch.float32)


@torch.library.custom_op("unite_kernels::qk_norm_rope_bwd", mutates_args=())
def _qk_norm_rope_bwd(
    grads: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    rstd: Tensor,
    heads: int,
    prefix: int,
    biased: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = [grad.contiguous() for grad in grads]
    if backend == "cpp":
        return _backend.cpu_op("qk_norm_rope_bwd")(grads, x, weights, cos, sin, rstd, heads, prefix, biased)
    return run_backward(grads, x, weights, cos, sin, rstd, heads, prefix, biased)


@_qk_norm_rope_bwd.register_fake
def _(grads, x, weights, cos, sin, rstd, heads, prefix, biased, backend):
    dweights = x.new_empty(len(weights), weights[0].numel(), dtype=torch.float32)
    return torch.empty_like(x), dweights, x.new_empty(x.shape[2] if biased else 0, dtype=torch.float32)


class _QkNormRope(torch.autograd.Function):
    """Not registered with the operation, since its outputs are slices of one tensor and a view of x: their gradients
    come here apart, as attention made them."""

    @staticmethod
    def forward(ctx, x, bias, cos, sin, heads, prefix, eps, backend, *weights):
        out, rstd = _qk_norm_rope_fwd(x, list(weights), cos, sin, heads, prefix, eps, backend)
        ctx.save_for_backward(x, cos, sin, rstd, *weights)
        ctx.heads, ctx.prefix, ctx.backend = heads, prefix, backend
        ctx.bias_dtype = None if bias is None else bias.dtype
        rest = x[..., len(weights) * out.shape[-1] :]
        return (*out.unbind(), rest) if rest.shape[-1] else out.unbind()

    @staticmethod
    def backward(ctx, *grads):
        x, cos, sin, rstd, *weights = ctx.saved_tensors
        biased = ctx.bias_dtype is not None
        dx, dweights, dbias = _qk_norm_rope_bwd(
            list(grads), x, weights, cos, sin, rstd, ctx.heads, ctx.prefix, biased, ctx.backend
        )
        dbias = dbias.to(ctx.bias_dtype) if biased else None
        return dx, dbias, *[None] * 6, *(d.to(w.dtype) for d, w in zip(dweights.unbind(), weights, strict=True))


def qk_norm_rope(
    x: Tensor,
    weights: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    heads: int,
    prefix: int = 0,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "fused",
) -> tuple[Tensor, ...]:
    """The parts of x (B, T, P heads head_dim), each (B, T, heads head_dim): those with a weight normalised and rotated.

    weights: one or two of shape (head_dim,); P is their number or one more. bias: that of the linear layer which made
    x, (P heads head_dim,), in it already: its value is not used, its gradient is made. Gradients of x, bias, weights.
    """
    backend = _backend.resolve(backend, x, *weights, cos, sin, bias)
    _backend.check_float("x", x)
    if not 1 <= len(weights) <= 2:
        raise ValueError(f"expected one or two weights, not {len(weights)}")
    head_dim = weights[0].numel()
    for weight in weights:
        _backend.check_float("weight", weight)
        _backend.check_shape("weight", weight, (head_dim,))
        _backend.check_contiguous("weight", weight)
    widths = [parts * heads * head_dim for parts in (len(weights), len(weights) + 1)]
    if x.ndim != 3 or heads < 1 or head_dim % 2 or x.shape[2] not in widths:
        raise ValueError(
            f"x must have shape (batch, tokens, {widths[0]} or {widths[1]}), which is {heads} heads of an even size, "
            f"{head_dim}, in as many parts as weights or one more, not {tuple(x.shape)}"
        )
    _backend.check_contiguous("x", x)
    if bias is not None:
        _backend.check_float("bias", bias)
        _backend.check_shape("bias", bias, x.shape[2:])
    if not 0 <= prefix <= x.shape[1]:
        raise ValueError(f"prefix must be between 0 and the {x.shape[1]} tokens, not {prefix}")
    positions = x.shape[1] - prefix
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype != torch.float32:
            raise TypeError(f"{name} must be float32, not {table.dtype}")
        if table.ndim != 2 or table.shape[1] != head_dim // 2 or table.shape[0] < positions:
            raise ValueError(f"{name} must have shape (>= {positions}, {head_dim // 2}), not {tuple(table.shape)}")
        _backend.check_contiguous(name, table)
    if backend == "eager":
        return qk_norm_rope_eager(x, weights, cos, sin, bias, heads, prefix, eps)
    return _QkNormRope.apply(x, bias, cos, sin, heads, prefix, eps, backend, *weights)
