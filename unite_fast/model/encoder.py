"""The Generative Encoder: one transformer that tokenizes (registers + context tokens) and denoises (registers alone).

It sees latents, embedded context tokens and a key mask. What the context tokens are (image patches, atoms)
is the business of whoever embeds them.

Shape letters: B batch, K registers, M context tokens, T = K + M, S in-context class tokens, C latent dim,
D width, H heads, E head size. Key names are those of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unite_fast.config import EncoderConfig
from unite_fast.layers import Linear, RMSNorm, adamw_parameter, rotary_table, use_adamw
from unite_fast.layers.attention import Keys, Plan, attention, visible_keys
from unite_fast.parallel.sharding import is_unit
from unite_kernels.adaln import adaln, adaln_mid, adaln_tail
from unite_kernels.qk_norm_rope import qk_norm_rope
from unite_kernels.swiglu import swiglu


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


class Branch(NamedTuple):
    """What a block adds to its residual stream, (B, T, D), and the bias (D,) that is still to be added to it.

    The operation that adds them to the stream holds the branch's gradient in registers, and sums the bias's from it.
    """

    product: Tensor
    bias: Tensor


def branch(last: Linear, x: Tensor) -> Branch:
    """From the branch's last layer. The bias is a copy, since FSDP frees a module's parameters when it returns."""
    return Branch(last.without_bias(x), last.bias.clone())


class SelfAttention(nn.Module):
    """Multi-head attention with RMSNorm on queries and keys, and rotary positions after the first ``prefix`` tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention = "sdpa"  # the backend or plan of layers/attention.py
        self.qkv = Linear(width, 3 * width, large=True)
        self.q_norm = RMSNorm(width // heads)
        self.k_norm = RMSNorm(width // heads)
        self.proj = Linear(width, width, large=True)

    def forward(self, x: Tensor, layout: Layout, backend: str, kept: int = 0) -> Branch:
        """x (B, T, D) -> (B, T, D); with ``kept`` of the R = kept rows after the prefix alone: (B, R, D).

        One product makes queries, keys and values, or two: of the queries that are kept, and of the others. The
        gradient of its bias is made by the operation that normalises them.
        """
        q_weight, k_weight = self.q_norm.weight, self.k_norm.weight
        if kept:
            rows, width = x[:, layout.prefix : layout.prefix + kept], x.shape[-1]
            (q,) = self._normed(rows, 0, width, [q_weight], layout, 0, backend)
            k, v = self._normed(x, width, 3 * width, [k_weight], layout, layout.prefix, backend)
        else:
            q, k, v = self._normed(x, 0, 3 * x.shape[-1], [q_weight, k_weight], layout, layout.prefix, backend)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))  # (B, H, T, E)
        return branch(self.proj, attention(q, k, v, layout.keys, self.attention).transpose(1, 2).flatten(2))

    def _normed(
        self, x: Tensor, start: int, stop: int, weights: list[Tensor], layout: Layout, prefix: int, backend: str
    ) -> tuple[Tensor, ...]:
        """Columns of qkv, a tensor (B, T, D) for each part: as many as there are weights normalised and rotated."""
        product, bias = self.qkv.columns(x, start, stop), self.qkv.bias[start:stop]
        prefix = prefix if layout.rotate else x.shape[1]
        tables = layout.cos, layout.sin
        return qk_norm_rope(product, weights, *tables, self.heads, prefix, bias, backend=backend)


class SwiGLU(nn.Module):
    """Linear(D, 2F) -> silu(first half) * second half -> Linear(F, D)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = Linear(width, 2 * hidden, large=True, groups=2)
        self.w3 = Linear(hidden, width, large=True, wide_inputs=True)

    def forward(self, x: Tensor, backend: str) -> Branch:
        """The first Linear's bias is added inside the activation, which sums its gradient as well."""
        halves, bias = self.w12.without_bias(x), self.w12.bias
        if padding := (halves.shape[-1] - len(bias)) // 2:
            bias = F.pad(bias.unflatten(0, (2, -1)), (0, padding)).flatten()
        return branch(self.w3, swiglu(halves, bias, backend=backend))


class Layout(NamedTuple):
    """Where the tokens of a pass stand: rotary tables (P >= T - prefix, E / 2), and which keys can be seen."""

    cos: Tensor
    sin: Tensor
    rotate: bool  # false: no token is rotated
    prefix: int  # in-context class tokens in front, never rotated
    keys: Keys | None  # None: all of them


class Modulation(NamedTuple):
    """What modulates the input of a layer: its RMSNorm weight (D,), and shift and scale (B, D)."""

    weight: Tensor
    shift: Tensor
    scale: Tensor


class Block(nn.Module):
    """adaLN transformer block with a norm on its output: the residual stream is renormalised at every block.

        x1 = x + gate1 attn(mod(norm1 x));   x2 = norm3(x1 + gate2 mlp(mod(norm2 x1)))

    Each residual sum is computed together with the norms and the modulation that follow it, up to the next layer's
    input, so a block takes its modulated input ready made and hands the next one its own.
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = RMSNorm(width), RMSNorm(width), RMSNorm(width)
        self.attn = SelfAttention(width, heads)
        self.mlp = SwiGLU(width, hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 6 * width))

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        chunks: tuple[Tensor, ...],
        following: Modulation,
        layout: Layout,
        backend: str,
        kept: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, D) residual, y (B, T, D) its modulated norm1 -> the same of the next layer.

        chunks: (shift1, scale1, gate1, shift2, scale2, gate2), each (B, D). kept: when not 0, only that many rows after
        the prefix are wanted, (B, kept, D): all rows give keys and values, nothing else is computed for the others.
        """
        _, _, gate1, shift2, scale2, gate2 = chunks
        h, bias = self.attn(y, layout, backend, kept)
        if kept:
            x = x[:, layout.prefix : layout.prefix + kept].contiguous()
        x, y = adaln_mid(x, h, gate1, self.norm2.weight, shift2, scale2, bias, backend=backend)
        h, bias = self.mlp(y, backend)
        return adaln_tail(x, h, gate2, self.norm3.weight, *following, bias, backend=backend)


class FinalLayer(nn.Module):
    """Modulated RMSNorm, then Linear(D, C); both Linears start at zero."""

    def __init__(self, width: int, latent_dim: int) -> None:
        super().__init__()
        self.norm_final = RMSNorm(width)
        self.linear = Linear(width, latent_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 2 * width))


class GenerativeEncoder(nn.Module):
    """GE(x, t, y, [context]) -> latents before the latent LayerNorm (arXiv 2603.22283, section 3)."""

    rotary_cos: Tensor
    rotary_sin: Tensor

    def __init__(self, config: EncoderConfig, latent_dim: int, num_classes: int, max_tokens: int) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.recompute = False  # the blocks' activations, in backward
        self.run_block: Callable[..., tuple[Tensor, Tensor]] = nn.Module.__call__  # or Block.forward, compiled
        self.backend = "eager"  # of the fused kernels; efficiency.kernels
        self.residual: torch.dtype | None = None  # in training; None leaves it in the positions' float32
        self.in_context_posemb = adamw_parameter(torch.randn(1, config.in_context_len, width) * 0.02)
        self.up_sample = Linear(latent_dim, width)
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

    def _keys(self, key_mask: Tensor | None, prefix: int) -> Keys | None:
        """Which keys the blocks see, with ``prefix`` class tokens in front, prepared once for all of them."""
        if key_mask is None:
            return None
        backend: Plan = self.blocks[0].attn.attention  # type: ignore[assignment]
        return visible_keys(F.pad(key_mask, (prefix, 0), value=True), backend)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        labels: Tensor,
        positions: Tensor,
        context: Tensor | None = None,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """x (B, K, C), t (B,), labels int64 (B,), positions (1, P >= K, D), context (B, M, D) -> (B, K, C).

        A batch with fewer registers than there are positions is one whose last slots were cut off: the others, and
        the context, keep the positions that they have without the cut.
        key_mask: optional bool (B, K + M), true for real tokens (registers, then context). The in-context
        class tokens are always visible.
        """
        modulated: Any = None
        for _, modulated in self._run(x, t, labels, positions, context, key_mask, len(self.blocks), prune=True):  # noqa: B007
            pass
        return self.final_layer.linear(modulated)

    def features(
        self, x: Tensor, t: Tensor, labels: Tensor, positions: Tensor, context: Tensor, after: Sequence[int]
    ) -> list[Tensor]:
        """The context tokens (B, M, D) of the residual stream after each of the blocks ``after``, which count from 1.

        Other arguments: as for ``forward``. Blocks beyond the last of them do not run.
        """
        found = []
        for number, (h, _) in enumerate(self._run(x, t, labels, positions, context, None, max(after)), 1):
            if number in after:
                found.append(h[:, h.shape[1] - context.shape[1] :])
        return found

    def _run(
        self,
        x: Tensor,
        t: Tensor,
        labels: Tensor,
        positions: Tensor,
        context: Tensor | None,
        key_mask: Tensor | None,
        depth: int,
        prune: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """After each of the first ``depth`` blocks: the residual stream, and the modulated input of what follows.

        prune: the last block computes the registers alone.
        """
        registers = x.shape[1]
        y = self.y_embedder(labels)
        c = self.t_embedder(t) + y
        h = self.up_sample(x) + positions[:, :registers]
        cos, sin = self.rotary_cos, self.rotary_sin
        if context is not None:
            h = torch.cat([h, context], dim=1)
            if registers < (first := positions.shape[1]):
                cos, sin = (torch.cat([table[:registers], table[first:]]) for table in (cos, sin))
        if self.residual is not None and self.training:
            h = h.to(self.residual)
        blocks: list[Any] = list(self.blocks)
        keys = self._keys(key_mask, 0)
        layout = Layout(cos, sin, self.config.rope, 0, keys)
        activated = F.silu(c)  # the first module of every adaLN_modulation
        # Those of the blocks that run and of what follows them; sharded, all are gathered together and run together.
        together = is_unit(self.final_layer.adaLN_modulation[1])
        modulated_blocks = blocks if together else blocks[: depth + 1]
        chunks = [block.adaLN_modulation[1](activated).chunk(6, dim=-1) for block in modulated_blocks]
        inputs = [Modulation(b.norm1.weight, *m[:2]) for b, m in zip(modulated_blocks, chunks, strict=True)]
        if together or depth == len(blocks):
            shift, scale = self.final_layer.adaLN_modulation[1](activated).chunk(2, dim=-1)
            inputs.append(Modulation(self.final_layer.norm_final.weight, shift, scale))
        modulated = adaln(h, *inputs[0], backend=self.backend)
        if torch.is_autocast_enabled(h.device.type):  # as the other blocks get it
            modulated = modulated.to(torch.get_autocast_dtype(h.device.type))
        for i, block in enumerate(blocks[:depth]):
            if i == self.config.in_context_start and self.config.in_context_len:
                tokens = (y[:, None] + self.in_context_posemb).to(h.dtype)
                modulated_tokens = adaln(tokens, *inputs[i], backend=self.backend).to(modulated.dtype)
                h, modulated = torch.cat([tokens, h], dim=1), torch.cat([modulated_tokens, modulated], dim=1)
                prefix = tokens.shape[1]
                layout = layout._replace(prefix=prefix, keys=self._keys(key_mask, prefix))
            last = prune and i == depth - 1
            kept = registers if last and registers < h.shape[1] else 0  # the others are dropped after it
            arguments = (h, modulated, chunks[i], inputs[i + 1], layout, self.backend, kept)
            if self.recompute and torch.is_grad_enabled():
                # Blocks draw nothing: keeping the generator's state would read it back from the device.
                h, modulated = checkpoint(
                    self.run_block, block, *arguments, use_reentrant=False, preserve_rng_state=False
                )
            else:
                h, modulated = self.run_block(block, *arguments)
            yield h, modulated
