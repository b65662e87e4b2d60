"""Queries, keys and values as a training step hands them to attention(), for what measures attention alone.

The encoder makes them with one product and QK-norm (kernels/unite_kernels/qk_norm_rope.py): queries and keys come out
as dense tensors (B, T, D), values stay in the product, rows 3 D apart. In its last block, where the registers alone
ask, queries have a product of their own, and values lie in rows of 2 D beside what were the keys. The decoder splits
one product in three.
"""

from __future__ import annotations

import torch
from torch import Tensor


def queries_keys_values(
    shape: tuple[int, int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    queries: int = 0,
    decoder: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, H, T, E), k and v (B, H, S, E) from ``shape``, (B, H, S, E); random, with gradients, strides of the step.

    queries: T of the encoder's last block; 0: all of the S tokens ask.
    """
    images, heads, tokens, size = shape
    width, generator = heads * size, torch.Generator(device).manual_seed(seed)

    def rows(tokens: int, columns: int) -> Tensor:
        return torch.randn(images, tokens, columns, generator=generator, device=device).to(dtype)

    if decoder:
        parts = rows(tokens, 3 * width).chunk(3, dim=-1)
    else:
        product = rows(tokens, (2 if queries else 3) * width)
        parts = rows(queries or tokens, width), rows(tokens, width), product[..., -width:]
    q, k, v = (x.unflatten(-1, (heads, size)).transpose(1, 2).detach().requires_grad_() for x in parts)
    return q, k, v
