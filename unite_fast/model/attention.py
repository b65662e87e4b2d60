"""Scaled dot-product attention behind one function: the only place that knows the backends."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """softmax(q kT / sqrt(E)) v.

    q, k, v: (B, H, T, E), one dtype. key_mask: optional bool (B, T), true where a key may be attended to.
    Returns (B, H, T, E). Rows whose keys are all masked are undefined.
    """
    mask = None if key_mask is None else key_mask[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
