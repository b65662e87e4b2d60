"""The decoder: a plain pre-norm ViT from latent tokens to pixels.

With one latent per patch (published) each latent token becomes its patch. With any other number the latents
are followed by one query per patch, and the queries become the patches.

Shape letters: B batch, K latents, M = side**2 patches, D width, H heads, E head size, P patch size, Q channels.
Key names are those of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unite_fast.config import DecoderConfig
from unite_fast.layers import Linear, adamw_parameter, sincos_2d
from unite_fast.layers.attention import attention

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

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.layernorm_before(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)  # (B, H, T, E)
        x = x + self.attn_proj(attention(q, k, v, backend=self.attention).transpose(1, 2).flatten(2))
        return x + self.ffn_down(F.gelu(self.ffn_up(self.layernorm_after(x))))


class Decoder(nn.Module):
    """(B, K, in_features) -> (B, Q, side * P, side * P). Not clamped."""

    positions: Tensor  # (1, M + 1, D)

    def __init__(self, config: DecoderConfig, num_latents: int, side: int, patch_size: int, channels: int) -> None:
        super().__init__()
        self.side, self.patch_size, self.channels = side, patch_size, channels
        self.queries = num_latents != side**2
        self.recompute = False  # the layers' activations, in backward
        self.run_layer: Callable[..., Tensor] = nn.Module.__call__  # or DecoderLayer.forward, compiled
        self.residual: torch.dtype | None = None  # in training; None leaves it in the positions' float32
        self.trainable_cls_token = nn.Parameter(torch.zeros(config.width))
        self.decoder_embed = Linear(config.in_features, config.width)
        self.decoder_layers = nn.ModuleList(
            DecoderLayer(config.width, config.heads, config.mlp_hidden) for _ in range(config.depth)
        )
        self.decoder_norm = nn.LayerNorm(config.width, eps=EPS)
        self.decoder_pred = Linear(config.width, patch_size**2 * channels)
        positions = torch.cat([torch.zeros(1, config.width), sincos_2d(side, config.width)])
        self.register_buffer("positions", positions[None], persistent=False)
        if self.queries:
            self.latent_positions = adamw_parameter(torch.randn(1, num_latents, config.width) * 0.5)
            self.query_token = nn.Parameter(torch.zeros(config.width))

    def forward(self, z: Tensor) -> Tensor:
        x = self.decoder_embed(z)
        if self.queries:
            latents, x = x + self.latent_positions, self.query_token.to(x.dtype).expand(len(x), self.side**2, -1)
        x = torch.cat([self.trainable_cls_token.to(x.dtype).expand(len(x), 1, -1), x], dim=1) + self.positions
        if self.queries:
            x = torch.cat([x, latents], dim=1)
        if self.residual is not None and self.training:
            x = x.to(self.residual)
        for layer in self.decoder_layers:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(self.run_layer, layer, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = self.run_layer(layer, x)
        x = self.decoder_pred(self.decoder_norm(x[:, : self.side**2 + 1]))[:, 1:]
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=self.side, p=self.patch_size, c=self.channels)
