"""UNITE: the Generative Encoder, the decoder and the latent LayerNorm, with the three operations users call.

Shape letters: B batch, K registers, C latent dim, D encoder width, M patches, Q channels, S image size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unite_fast import modality
from unite_fast.base.errors import UserError
from unite_fast.config import ModelConfig
from unite_fast.data.batch import slots_taken
from unite_fast.layers import Linear, adamw_parameter, sincos_1d, use_adamw
from unite_fast.modality import Content
from unite_fast.model.encoder import GenerativeEncoder
from unite_fast.model.shards import decoder_units, encoder_units
from unite_fast.parallel.sharding import Unit
from unite_kernels import corruption
from unite_kernels.backend import obstacle

TOKENIZE_SEED = 0  # of the registers' noise when a caller of tokenize() gives none
TOKENIZE_T_MAX = 0.01
FORWARDS = ("tokenize", "denoise", "decode", "features")  # what training uses in place of forward(); none calls another


class UNITE(nn.Module):
    """The whole model (arXiv 2603.22283, section 3). ``null_class`` is the label of classifier-free guidance."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.modality = modality.of(config)
        self.null_class = config.num_classes
        width = config.encoder.width
        positions = sincos_1d(torch.arange(config.num_latents), width).float()[None]
        self.latent_tokens = adamw_parameter(positions)
        if config.separate_denoiser:
            self.latent_tokens_denoiser = adamw_parameter(positions.clone())
        self.add_module(self.modality.embedder_name, use_adamw(self.modality.embedder(config)))
        self.encoder = self._generative_encoder()
        if config.separate_denoiser:
            self.denoiser = self._generative_encoder()
            self.denoiser.load_state_dict(self.encoder.state_dict())
        self.encoder_layer_norm = nn.LayerNorm(config.latent_dim, eps=1e-5)
        self.decoder = self.modality.decoder(config)
        self.up_sample_decoder = Linear(config.latent_dim, config.decoder.in_features)

    def _generative_encoder(self) -> GenerativeEncoder:
        c = self.config
        tokens = c.num_latents + self.modality.context_tokens(c)
        return GenerativeEncoder(c.encoder, c.latent_dim, c.num_classes, tokens)

    @property
    def embedder(self) -> nn.Module:
        """What makes context tokens of a content, under the modality's name."""
        return getattr(self, self.modality.embedder_name)

    def encoders(self) -> list[GenerativeEncoder]:
        """The Generative Encoder, and the denoiser where it has its own weights."""
        return [self.encoder, self.denoiser] if self.config.separate_denoiser else [self.encoder]

    def shard_units(self) -> list[Unit]:
        """What is gathered together; the rest is needed in every pass."""
        encoders = [unit for encoder in self.encoders() for unit in encoder_units(encoder)]
        return encoders + decoder_units(self.decoder)

    def forwards(self) -> dict[nn.Module, tuple[str, ...]]:
        """What callers use of the model, and it of its parts, in place of ``forward``."""
        found: dict[nn.Module, tuple[str, ...]] = {self: FORWARDS}
        found.update((encoder, ("features",)) for encoder in self.encoders())
        return found

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(K, C)."""
        return self.config.num_latents, self.config.latent_dim

    @property
    def time_shift(self) -> float:
        """The resolution shift a of t' = a t / (1 + (a - 1) t), for training times and for the sampler's grid."""
        mode = self.config.time_shift
        if isinstance(mode, str):
            k, c = self.latent_shape
            return math.sqrt({"total": k * c, "channels": c, "tokens": k}[mode] / 4096)
        return mode

    def use_kernels(self, backend: str) -> None:
        """The implementation of the encoder's fused operations: "eager" or "fused" (``efficiency.kernels``, settled).

        The model is where it will run. Raises UserError when the implementation cannot run there.
        """
        device = self.latent_tokens.device
        if device.type != "meta" and (why := obstacle(backend, device)):
            raise UserError(f"kernels={backend}: {why}; or choose kernels=eager")
        for encoder in self.encoders():
            encoder.backend = backend

    def normalise(self, latents: Tensor) -> Tensor:
        """The latent LayerNorm: (B, K, C) -> (B, K, C)."""
        return self.encoder_layer_norm(latents)

    def tokenize(
        self, content: Content, noise: Tensor | None = None, t: Tensor | None = None, sizes: Tensor | None = None
    ) -> Tensor:
        """A modality's content -> normalised latents (B, K, C). Of images that is (B, Q, S, S) in [0, 1].

        noise: the registers' input (B, K, C); t: their times (B,) in [0, 0.01]. When either is None it is drawn from a
        fixed seed by place in the batch, so equal batches give equal latents. sizes: int64 (B,), how many registers and
        context tokens of each sample are there; latents of the others are 0. None: all of them.
        """
        content = self.modality.content(content)
        first = next(iter(content.values()))
        b, device = len(first), first.device
        shape = self.modality.registers(self.config, content), self.config.latent_dim
        if noise is None or t is None:
            places = torch.arange(b, device=device)
            drawn = corruption.draw_tokenizer(TOKENIZE_SEED, places, shape, TOKENIZE_T_MAX)
            noise = drawn[0] if noise is None else noise
            t = drawn[1] if t is None else t
        labels = torch.full((b,), self.null_class, device=device)
        context = self.embedder(content, sizes)
        if sizes is None:
            return self.normalise(self.encoder(noise, t, labels, self.latent_tokens, context))
        taken = [slots_taken(sizes, slots) for slots in (shape[0], context.shape[1])]
        z = self.normalise(self.encoder(noise, t, labels, self.latent_tokens, context, torch.cat(taken, dim=1)))
        return z * taken[0][:, :, None]

    def denoise_raw(self, zt: Tensor, t: Tensor, labels: Tensor, sizes: Tensor | None = None) -> Tensor:
        """As ``denoise``, before the latent LayerNorm; latents of absent registers mean nothing."""
        mask = None if sizes is None else slots_taken(sizes, zt.shape[1])
        if self.config.separate_denoiser:
            return self.denoiser(zt, t, labels, self.latent_tokens_denoiser, key_mask=mask)
        return self.encoder(zt, t, labels, self.latent_tokens, key_mask=mask)

    def denoise(self, zt: Tensor, t: Tensor, labels: Tensor, sizes: Tensor | None = None) -> Tensor:
        """Noised latents (B, K, C), times (B,), labels int64 (B,) -> predicted clean normalised latents (B, K, C).

        sizes: as for ``tokenize``.
        """
        x0 = self.normalise(self.denoise_raw(zt, t, labels, sizes))
        return x0 if sizes is None else x0 * slots_taken(sizes, zt.shape[1])[:, :, None]

    def decode(self, z: Tensor, sizes: Tensor | None = None) -> Any:
        """Normalised latents (B, K, C) -> the modality's prediction. sizes: as for ``tokenize``.

        Of images that is a tensor (B, Q, S, S), nominally in [0, 1], not clamped.
        """
        return self.decoder(self.up_sample_decoder(z), sizes)

    def features(self, content: Content, noise: Tensor, t: Tensor, after: Sequence[int]) -> list[Tensor]:
        """The context tokens (B, M, D) in the tokenization pass, after each of the blocks ``after``."""
        return features(self, self.embedder, content, noise, t, after)

    def trainable_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


def features(
    network: Any, embedder: nn.Module, content: Content, noise: Tensor, t: Tensor, after: Sequence[int]
) -> list[Tensor]:
    """As ``UNITE.features``, of a network with an ``encoder``, ``latent_tokens`` and a ``null_class``."""
    labels = torch.full((len(noise),), network.null_class, device=noise.device)
    return network.encoder.features(noise, t, labels, network.latent_tokens, embedder(content, None), after)


def build(config: ModelConfig, seed: int = 0, device: torch.device | str = "cpu") -> UNITE:
    """A freshly initialised model; the weights depend on ``seed`` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = UNITE(config)
    return model.to(device)
