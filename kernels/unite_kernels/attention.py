"""Scaled dot-product attention for CPUs whose matrix units want large products (AMX in bfloat16).

    y = P v,  P = softmax(S),  S = scale q kT,  scale = 1 / sqrt(E)
    dv = PT dy,  dP = dy vT,  dS = scale P (dP - sum over keys of P dP),  dq = dS k,  dk = dST q

The forward is torch's. The backward is the five products as they stand here, batched over heads, and one C++ pass over
the scores between them; torch's own, in blocks of 32 queries, takes 2 to 3 times as long in bfloat16. It computes the
scores again, a few heads at a time, so that they stay in the caches and nothing but q, k and v is kept.

Shapes: q and y (B, H, T, E), k and v (B, H, S, E), no mask. P and dS have the dtype of q, sums are float32 in a fixed
order.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend as _backend

BUFFER = 1 << 20  # bytes of scores that are at hand at once: half of the cache of a core with AMX


@torch.library.custom_op("unite_kernels::attention_fwd", mutates_args=())
def _attention_fwd(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v).contiguous()


@_attention_fwd.register_fake
def _(q, k, v):
    return q.new_empty(q.shape)


@torch.library.custom_op("unite_kernels::attention_bwd", mutates_args=())
def _attention_bwd(dy: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (b, h, t, e), s = q.shape, k.shape[2]
    between = _backend.cpu_op("attention_scores_bwd_")
    dy, q, k, v = (x.reshape(b * h, -1, e) for x in (dy, q, k, v))
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    heads = min(b * h, max(1, BUFFER // (t * s * q.element_size())))
    scores, gradients = q.new_empty(2, heads, t, s).unbind(0)
    for low in range(0, b * h, heads):
        part = slice(low, min(low + heads, b * h))
        p, dp = scores[: part.stop - low], gradients[: part.stop - low]
        torch.bmm(q[part], k[part].mT, out=p)
        torch.bmm(dy[part], v[part].mT, out=dp)
        between(p, dp, 1 / math.sqrt(e))
        torch.bmm(p.mT, dy[part], out=dv[part])
        torch.bmm(dp, k[part], out=dq[part])
        torch.bmm(dp.mT, q[part], out=dk[part])
    return dq.view(b, h, t, e), dk.view(b, h, s, e), dv.view(b, h, s, e)


@_attention_bwd.register_fake
def _(dy, q, k, v):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    return _attention_bwd(dy, *ctx.saved_tensors)


_attention_fwd.register_autograd(_backward, setup_context=_setup)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kT / sqrt(E)) v of CPU tensors, all in float32 or all in bfloat16."""
    _backend.resolve("cpp", q, k, v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != q.dtype or x.dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(f"{name} must be float32 or bfloat16 and have the dtype of q, {q.dtype}, not {x.dtype}")
        if x.ndim != 4:
            raise ValueError(f"{name} must have shape (batch, heads, tokens, size), not {tuple(x.shape)}")
    b, h, s, e = k.shape
    _backend.check_shape("v", v, (b, h, s, e))
    _backend.check_shape("q", q, (b, h, q.shape[2], e))
    return _attention_fwd(q, k, v)
