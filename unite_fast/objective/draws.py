"""The random numbers of a training step: each a function of (seed, global sample position, use) alone.

Shape letters: B batch, N flow steps, K registers, C latent dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unite_fast.config import ObjectiveConfig
from unite_fast.model.unite import UNITE
from unite_kernels import corruption


@dataclass(frozen=True)
class Draws:
    """All randomness of one step as tensors: what tests and comparisons with other code put in."""

    tokenize_noise: Tensor  # (B, K, C) the registers' input
    tokenize_t: Tensor  # (B,)
    noising_mask: Tensor  # (B,) bool: which samples are decoded from noised latents
    noising_t: Tensor  # (B,)
    noising_noise: Tensor  # (B, K, C)
    flow_t: Tensor  # (N, B), after the shift
    flow_noise: Tensor  # (N, B, K, C)
    flow_class_dropped: Tensor  # (N, B) bool

    @classmethod
    def make(cls, model: UNITE, objective: ObjectiveConfig, seed: int, samples: Tensor, registers: int = 0) -> Draws:
        """The draws of the global sample positions ``samples`` (B,) int64, on their device.

        registers: K of the batch, 0: the model's. Fewer have the first of the same numbers.
        """
        shape, o = (registers or model.latent_shape[0], model.latent_shape[1]), objective
        noise, t = corruption.draw_tokenizer(seed, samples, shape, o.tokenizer_t_max)
        mask, noising_t, noising_noise = corruption.draw_noising(
            seed, samples, shape, o.noising_probability, *o.noising_t
        )
        if o.flow_steps:
            flow_t, flow_noise, dropped = corruption.draw_flow(seed, samples, o.flow_steps, shape, *law(model, o))
        else:
            flow_t = t.new_empty(0, len(samples))
            flow_noise, dropped = noise.new_empty(0, *noise.shape), flow_t.bool()
        return cls(noise, t, mask, noising_t, noising_noise, flow_t, flow_noise, dropped)

    def tokenizer(self) -> tuple[Tensor, Tensor]:
        """The tokenization pass's registers (B, K, C) and times (B,)."""
        return self.tokenize_noise, self.tokenize_t

    def decoder_input(self, z: Tensor, objective: ObjectiveConfig) -> Tensor:
        """Latents (B, K, C), noised in the samples that the mask names."""
        return noised(z, self.noising_mask, self.noising_t, self.noising_noise, objective)

    def flow(self, z: Tensor, labels: Tensor, null_class: int) -> tuple[Tensor, Tensor, Tensor]:
        """z (B, K, C), labels (B,) -> noised latents (N, B, K, C), times (N, B), labels after the drop (N, B)."""
        noisy = corruption.blend(z.float(), self.flow_t, self.flow_noise)
        return noisy, self.flow_t, torch.where(self.flow_class_dropped, null_class, labels)


@dataclass(frozen=True)
class SeededDraws:
    """The same numbers as ``Draws.make``, where kernels draw them inside the operations that use them."""

    model: UNITE
    objective: ObjectiveConfig
    seed: int
    samples: Tensor  # (B,) int64, global sample positions
    backend: str = "fused"
    registers: int = 0  # as of ``Draws.make``

    @property
    def shape(self) -> tuple[int, int]:
        """(K, C)."""
        registers, width = self.model.latent_shape
        return self.registers or registers, width

    def tokenizer(self) -> tuple[Tensor, Tensor]:
        t_max = self.objective.tokenizer_t_max
        return corruption.draw_tokenizer(self.seed, self.samples, self.shape, t_max, backend=self.backend)

    def decoder_input(self, z: Tensor, objective: ObjectiveConfig) -> Tensor:
        p, (low, high) = objective.noising_probability, objective.noising_t
        if objective.noising == "add":  # an ablation without a kernel of its own
            drawn = corruption.draw_noising(self.seed, self.samples, self.shape, p, low, high)
            return noised(z, *drawn, objective)
        return corruption.noise_injection(z, self.samples, self.seed, p, low, high, backend=self.backend)

    def flow(self, z: Tensor, labels: Tensor, null_class: int) -> tuple[Tensor, Tensor, Tensor]:
        if z.requires_grad:  # the kernels take detached latents
            made = Draws.make(self.model, self.objective, self.seed, self.samples, self.registers)
            return made.flow(z, labels, null_class)
        o = self.objective
        return corruption.flow_corruption(
            z.float(), labels, self.samples, self.seed, o.flow_steps, *law(self.model, o), null_class,
            backend=self.backend,
        )  # fmt: skip


def law(model: UNITE, o: ObjectiveConfig) -> tuple[str, float, float, float, float]:
    """Of a flow step's times and label drops, as ``unite_kernels.corruption`` takes it."""
    return o.flow_time, o.flow_time_mean, o.flow_time_std, model.time_shift, o.label_dropout


def noised(z: Tensor, mask: Tensor, t: Tensor, noise: Tensor, objective: ObjectiveConfig) -> Tensor:
    """z (B, K, C) with noise (B, K, C) in the samples of ``mask`` (B,)."""
    if objective.noising == "add":  # arXiv 2603.22283, section 3.2
        noisy = z + objective.noising_sigma * noise
    else:
        noisy = corruption.blend(z, t, noise)
    return torch.where(mask[:, None, None], noisy, z)
