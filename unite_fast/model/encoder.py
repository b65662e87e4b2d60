"""The Generative Encoder: one transformer that tokenizes (registers + context tokens) and denoises (registers alone).

It sees latents, embedded context tokens and a key mask. What the context tokens are (image patches, atoms)
is the business of whoever embeds them.

Shape letters: B batch, K registers, M context tokens, T = K + M, S in-context class tokens, C latent dim,
D width, H heads, E head size. Key names are those of the published checkpoints.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unite_fast.config import EncoderConfig
from unite_fast.model.attention import attention
from unite_fast.model.layers import RMSNorm, adamw_parameter, rotary_table, use_adamw


class TimeEmbedding(nn.Module):
    """t (B,) -> (B, D): random Fourier features of 256 fixed frequencies, then an MLP, all in float32."""

    W: Tensor

    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        self.register_buffer("W", torch.randn(frequencies))
        # Never used by the forward pass; published checkpoints and optimizer states have a place for it.
        self.special_time_emb = nn.Parameter(torch.zeros(width))
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        with torch.autocast(t.device.type, enabled=False):
            angle = t.float()[:, None] * self.W[None, :] * 2 * torch.pi
            return self.mlp(torch.cat([angle.sin(), angle.cos()], dim=-1))


class LabelEmbedding(nn.Module):
    """labels (B,) -> (B, D). Row num_classes is the null class; the last row is unused, as published."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 2, width)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class SelfAttention(nn.Module):
    """Multi-head attention with RMSNorm on queries and keys, and rotary positions after the first ``prefix`` tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = RMSNorm(width // heads)
        self.k_norm = RMSNorm(width // heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, prefix: int, key_mask: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, T, E)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, *rotary, prefix), rotate(k, *rotary, prefix)
        return self.proj(attention(q, k, v, key_mask).transpose(1, 2).flatten(2))


def rotate(x: Tensor, cos: Tensor, sin: Tensor, prefix: int) -> Tensor:
    """Rotary embedding of interleaved pairs (2i, 2i+1); the first ``prefix`` tokens keep their value.

    x (B, H, prefix + T, E); cos, sin float32 (P >= T, E / 2). Computed in float32, returned in x's dtype.
    """
    head, body = x[:, :, :prefix], x[:, :, prefix:].float()
    cos, sin = cos[: body.shape[2]], sin[: body.shape[2]]
    even, odd = body[..., 0::2], body[..., 1::2]
    body = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).to(x.dtype)
    return torch.cat([head, body], dim=2) if prefix else body


class SwiGLU(nn.Module):
    """Linear(D, 2F) -> silu(first half) * second half -> Linear(F, D)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, T, D) * (1 + scale) + shift; shift and scale (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """adaLN transformer block with a norm on its output: the residual stream is renormalised at every block."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = RMSNorm(width), RMSNorm(width), RMSNorm(width)
        self.attn = SelfAttention(width, heads)
        self.mlp = SwiGLU(width, hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(
        self, x: Tensor, c: Tensor, rotary: tuple[Tensor, Tensor] | None, prefix: int, key_mask: Tensor | None
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        h = self.attn(modulate(self.norm1(x), shift1, scale1), rotary, prefix, key_mask)
        x = x + gate1[:, None] * h
        h = self.mlp(modulate(self.norm2(x), shift2, scale2))
        return self.norm3(x + gate2[:, None] * h)


class FinalLayer(nn.Module):
    """Modulated RMSNorm, then Linear(D, C); both Linears start at zero."""

    def __init__(self, width: int, latent_dim: int) -> None:
        super().__init__()
        self.norm_final = RMSNorm(width)
        self.linear = nn.Linear(width, latent_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class GenerativeEncoder(nn.Module):
    """GE(x, t, y, [context]) -> latents before the latent LayerNorm (arXiv 2603.22283, section 3)."""

    def __init__(self, config: EncoderConfig, latent_dim: int, num_classes: int, max_tokens: int) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.checkpoint_blocks = False
        self.in_context_posemb = adamw_parameter(torch.randn(1, config.in_context_len, width) * 0.02)
        self.up_sample = nn.Linear(latent_dim, width)
        self.t_embedder = TimeEmbedding(width)
        self.y_embedder = LabelEmbedding(num_classes, width)
        hidden = int(2 / 3 * config.mlp_ratio * width)
        self.blocks = nn.ModuleList(Block(width, config.heads, hidden) for _ in range(config.depth))
        self.final_layer = use_adamw(FinalLayer(width, latent_dim))
        cos, sin = rotary_table(max_tokens, width // config.heads)
        self.register_buffer("rotary_cos", cos, persistent=False)
        self.register_buffer("rotary_sin", sin, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
                nn.init.zeros_(parameter)
            elif name.startswith(("y_embedder", "t_embedder.mlp")) and parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        labels: Tensor,
        positions: Tensor,
        context: Tensor | None = None,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """x (B, K, C), t (B,), labels int64 (B,), positions (1, K, D), context (B, M, D) -> (B, K, C).

        key_mask: optional bool (B, K + M), true for real tokens (registers, then context). The in-context
        class tokens are always visible.
        """
        registers = x.shape[1]
        y = self.y_embedder(labels)
        c = self.t_embedder(t) + y
        h = self.up_sample(x) + positions
        if context is not None:
            h = torch.cat([h, context], dim=1)
        rotary = (self.rotary_cos, self.rotary_sin) if self.config.rope else None
        prefix = 0
        for i, block in enumerate(self.blocks):
            if i == self.config.in_context_start and self.config.in_context_len:
                prefix = self.config.in_context_len
                h = torch.cat([(y[:, None] + self.in_context_posemb).to(h.dtype), h], dim=1)
                if key_mask is not None:
                    key_mask = F.pad(key_mask, (prefix, 0), value=True)
            if self.checkpoint_blocks and torch.is_grad_enabled():
                h = checkpoint(block, h, c, rotary, prefix, key_mask, use_reentrant=False)
            else:
                h = block(h, c, rotary, prefix, key_mask)
        return self.final_layer(h[:, prefix : prefix + registers], c)
