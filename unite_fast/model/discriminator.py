"""The discriminator of the decoder's fine-tuning: heads on the Generative Encoder's own features of an image.

    features   the patch tokens in the tokenization pass, after a few blocks: by default at a quarter, a half and three
               quarters of the depth. They describe patches, which is where a decoder goes wrong; registers say what the
               latents hold. The last block, which registers alone leave, never runs.
    heads      one for each of those blocks: LayerNorm without weights, Linear, a 3x3 convolution over the grid of
               patches, Linear to one logit per patch; leaky ReLU between them

The published recipe says that the discriminator is initialised from the Generative Encoder (arXiv 2603.22283), not
which features it reads nor by which heads. Several depths with a small head each are as in Sauer et al. 2021 (arXiv
2111.01007); judging patches as in Isola et al. 2017 (arXiv 1611.07004). At small scale the blocks that are read matter
little, and a trunk that learns tells far more images apart than a frozen one (LOG.md).

Shape letters: B batch, Q channels, S image size, K registers, C latent dim, M patches, D encoder width, H heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from unite_fast.config import AdversarialConfig, ModelConfig
from unite_fast.modality import Content
from unite_fast.model.encoder import GenerativeEncoder
from unite_fast.model.shards import encoder_units
from unite_fast.model.unite import UNITE, features
from unite_fast.parallel.sharding import Unit

SLOPE = 0.2  # of the leaky ReLU


def blocks_read(depth: int, chosen: Sequence[int]) -> tuple[int, ...]:
    """The blocks after which heads stand, of an encoder with ``depth`` (2 or more): ``chosen`` or the default."""
    found = chosen or {min(depth - 1, max(1, round(depth * part))) for part in (0.25, 0.5, 0.75)}
    return tuple(sorted(found))


class Head(nn.Module):
    """Tokens of a grid of patches (B, M, D) -> logits (B, M), above 0 for real."""

    def __init__(self, width: int, channels: int, normalised: bool) -> None:
        super().__init__()
        layers = nn.Linear(width, channels), nn.Conv2d(channels, channels, 3, padding=1), nn.Linear(channels, 1)
        self.enter, self.mix, self.leave = (spectral_norm(layer) if normalised else layer for layer in layers)

    def forward(self, x: Tensor) -> Tensor:
        side = round(x.shape[1] ** 0.5)
        x = F.leaky_relu(self.enter(F.layer_norm(x, x.shape[-1:])), SLOPE)
        x = self.mix(x.transpose(1, 2).unflatten(2, (side, side))).flatten(2).transpose(1, 2)
        return self.leave(F.leaky_relu(x, SLOPE))[..., 0]


class Trunk(nn.Module):
    """A copy of what of UNITE makes features: the embedder, the register positions and the first blocks."""

    def __init__(self, model: UNITE, depth: int) -> None:
        super().__init__()
        sizes = model.config
        shorter = dataclasses.replace(sizes.encoder, depth=depth)
        self.null_class = model.null_class
        self.latent_tokens = nn.Parameter(torch.empty_like(model.latent_tokens))
        self.embedder = model.modality.embedder(sizes)
        tokens = sizes.num_latents + model.modality.context_tokens(sizes)
        self.encoder = GenerativeEncoder(shorter, sizes.latent_dim, sizes.num_classes, tokens)
        self.encoder.final_layer.requires_grad_(False)  # of what is behind the features
        self.encoder.t_embedder.special_time_emb.requires_grad_(False)
        with torch.no_grad():
            self.latent_tokens.copy_(model.latent_tokens)
            self.embedder.load_state_dict(model.embedder.state_dict())
            self.encoder.load_state_dict(model.encoder.state_dict(), strict=False)  # which has more blocks

    def features(self, content: Content, noise: Tensor, t: Tensor, after: Sequence[int]) -> list[Tensor]:
        """As of UNITE."""
        return features(self, self.embedder, content, noise, t, after)


class Discriminator(nn.Module):
    """Judges images; ``trunk`` is None where it stands on the model's own encoder, which is frozen then.

    Buffers, of the steps so far: ``ratio``, the adaptive weight in force (0 before there is one); ``anchors``, running
    means of the scores of real and fake images for LeCam, and ``anchored``, whether there are any (0 or 1).
    """

    ratio: Tensor
    anchors: Tensor
    anchored: Tensor

    def __init__(self, model: UNITE, config: AdversarialConfig, seed: int = 0) -> None:
        """model: with its weights, before anything of it is frozen or prepared for a precision."""
        super().__init__()
        sizes: ModelConfig = model.config
        self.after = blocks_read(sizes.encoder.depth, config.blocks)
        device = model.latent_tokens.device
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(seed)
            self.trunk = Trunk(model, max(self.after)) if config.trunk == "trained" else None
            heads = [Head(sizes.encoder.width, config.channels, config.spectral_norm) for _ in self.after]
        self.heads = nn.ModuleList(heads)
        for name, size in {"ratio": (), "anchors": (2,), "anchored": ()}.items():
            self.register_buffer(name, torch.zeros(size, device=device))
        self.train()

    def train(self, mode: bool = True) -> Discriminator:
        """The heads' power iteration is ``advance``'s alone: how often an image is judged must not matter."""
        super().train(mode)
        self.heads.train(False)
        return self

    @torch.no_grad()
    def advance(self) -> None:
        """Before each step in which it learns: one power iteration of every spectral norm."""
        for module in self.heads.modules():
            if nn.utils.parametrize.is_parametrized(module):
                module.train()
                module.weight  # noqa: B018  # computing it iterates
                module.eval()

    def use_kernels(self, backend: str) -> None:
        """As of UNITE, for a trunk of its own."""
        if self.trunk is not None:
            self.trunk.encoder.backend = backend

    def shard_units(self) -> list[Unit]:
        """Those of a trunk of its own; the heads are gathered with the rest."""
        return [] if self.trunk is None else encoder_units(self.trunk.encoder)

    def forwards(self) -> dict[nn.Module, tuple[str, ...]]:
        """As of UNITE."""
        own: dict[nn.Module, tuple[str, ...]] = {self: ("features", "logits", "advance")}
        return own if self.trunk is None else own | {self.trunk.encoder: ("features",)}

    def features(self, model: UNITE, images: Tensor, noise: Tensor, t: Tensor) -> list[Tensor]:
        """Images (B, Q, S, S), registers' input (B, K, C) and times (B,) of tokenization -> H times (B, M, D)."""
        source = model if self.trunk is None else self.trunk
        return source.features({"images": images}, noise, t, self.after)

    def logits(self, features: Sequence[Tensor]) -> Tensor:
        """(B, H M) float32, above 0 for real."""
        return torch.cat([head(x) for head, x in zip(self.heads, features, strict=True)], dim=1).float()
