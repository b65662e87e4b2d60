"""The trunk of every decoder: a plain pre-norm ViT over latents, with a class token in front.

A modality's decoder (``modality/``) gives the tokens positions and makes something of the output.

Shape letters: B batch, T tokens, D width, H heads, E head size. Key names are those of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unite_fast.config import DecoderConfig
from unite_fast.layers import Linear
from unite_fast.layers.attention import Keys, attention, visible_keys

EPS = 1e-12


class DecoderLayer(nn.Module):
    """x + proj(attn(LN x)), then x + down(gelu(up(LN x))), exact GELU."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention = "sdpa"  # the backend or plan of layers/attention.py
        self.layernorm_before = nn.LayerNorm(width, eps=EPS)
        self.qkv = Linear(width, 3 * width, large=True)
        self.attn_proj = Linear(width, width, large=True)
        self.layernorm_after = nn.LayerNorm(width, eps=EPS)
        self.ffn_up = Linear(width, hidden, large=True)
        self.ffn_down = Linear(hidden, width, large=True)

    def forward(self, x: Tensor, keys: Keys | None = None) -> Tensor:
        parts = self.qkv(self.layernorm_before(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)  # (B, H, T, E)
        x = x + self.attn_proj(attention(q, k, v, keys, self.attention).transpose(1, 2).flatten(2))
        return x + self.ffn_down(F.gelu(self.ffn_up(self.layernorm_after(x))))


class ViT(nn.Module):
    """Embedding, class token, layers and the last norm; a subclass says what is before, between and behind them."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.recompute = False  # the layers' activations, in backward
        self.run_layer: Callable[..., Tensor] = nn.Module.__call__  # or DecoderLayer.forward, compiled
        self.residual: torch.dtype | None = None  # in training; None leaves it in the positions' float32
        self.trainable_cls_token = nn.Parameter(torch.zeros(config.width))
        self.decoder_embed = Linear(config.in_features, config.width)
        self.decoder_layers = nn.ModuleList(
            DecoderLayer(config.width, config.heads, config.mlp_hidden) for _ in range(config.depth)
        )
        self.decoder_norm = nn.LayerNorm(config.width, eps=EPS)

    def with_class_token(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> (B, 1 + T, D)."""
        return torch.cat([self.trainable_cls_token.to(x.dtype).expand(len(x), 1, -1), x], dim=1)

    def run(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """x (B, T, D) through all layers, before the last norm. key_mask: bool (B, T), true for real tokens."""
        if self.residual is not None and self.training:
            x = x.to(self.residual)
        keys = None if key_mask is None else visible_keys(key_mask, self.decoder_layers[0].attention)  # type: ignore[arg-type]
        for layer in self.decoder_layers:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(self.run_layer, layer, x, keys, use_reentrant=False, preserve_rng_state=False)
            else:
                x = self.run_layer(layer, x, keys)
        return x
