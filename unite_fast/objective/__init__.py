"""One training step's losses from (images, labels, draws). Every random draw of a step is made here, in ``Draws``.

Shape letters: B batch, N flow steps, K registers, C latent dim, Q channels, S image size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from unite_fast import flow
from unite_fast.config import ObjectiveConfig
from unite_fast.modality.lpips import Perceptual, pixel_loss
from unite_fast.model.unite import UNITE
from unite_kernels import corruption

FlowPass = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (z, zt, t, labels) -> loss, with its backward done


@dataclass(frozen=True)
class Draws:
    """All randomness of one step."""

    tokenize_noise: Tensor  # (B, K, C) the registers' input
    tokenize_t: Tensor  # (B,)
    noising_mask: Tensor  # (B,) bool: which samples are decoded from noised latents
    noising_t: Tensor  # (B,)
    noising_noise: Tensor  # (B, K, C)
    flow_t: Tensor  # (N, B), after the shift
    flow_noise: Tensor  # (N, B, K, C)
    flow_class_dropped: Tensor  # (N, B) bool

    @classmethod
    def make(cls, model: UNITE, objective: ObjectiveConfig, seed: int, samples: Tensor) -> Draws:
        """The draws of the global sample positions ``samples`` (B,) int64, on their device.

        A value depends on (seed, sample, use) alone: not on the batch around it, the world size or the past.
        """
        shape, o = model.latent_shape, objective
        noise, t = corruption.draw_tokenizer(seed, samples, shape, o.tokenizer_t_max)
        mask, noising_t, noising_noise = corruption.draw_noising(
            seed, samples, shape, o.noising_probability, *o.noising_t
        )
        law = (o.flow_time, o.flow_time_mean, o.flow_time_std, model.time_shift, o.label_dropout)
        if o.flow_steps:
            flow_t, flow_noise, dropped = corruption.draw_flow(seed, samples, o.flow_steps, shape, *law)
        else:
            flow_t = t.new_empty(0, len(samples))
            flow_noise, dropped = noise.new_empty(0, *noise.shape), flow_t.bool()
        return cls(noise, t, mask, noising_t, noising_noise, flow_t, flow_noise, dropped)

    def tokenizer(self) -> tuple[Tensor, Tensor]:
        """The tokenization pass's registers (B, K, C) and times (B,)."""
        return self.tokenize_noise, self.tokenize_t

    def decoder_input(self, z: Tensor, objective: ObjectiveConfig) -> Tensor:
        """Latents (B, K, C), noised in the samples that the mask names."""
        if objective.noising == "add":  # arXiv 2603.22283, section 3.2
            noised = z + objective.noising_sigma * self.noising_noise
        else:
            noised = flow.interpolate(z, self.noising_noise, self.noising_t)
        return torch.where(self.noising_mask[:, None, None], noised, z)

    def flow(self, z: Tensor, labels: Tensor, null_class: int) -> tuple[Tensor, Tensor, Tensor]:
        """z (B, K, C), labels (B,) -> noised latents (N, B, K, C), times (N, B), labels after the drop (N, B)."""
        t = self.flow_t[:, :, None, None]
        noised = t * z.float() + (1 - t) * self.flow_noise
        return noised, self.flow_t, torch.where(self.flow_class_dropped, null_class, labels)


@dataclass(frozen=True)
class SeededDraws:
    """The same randomness as ``Draws.make``, drawn inside the kernels that use it, bit for bit."""

    model: UNITE
    objective: ObjectiveConfig
    seed: int
    samples: Tensor  # (B,) int64, global sample positions
    backend: str = "fused"

    def tokenizer(self) -> tuple[Tensor, Tensor]:
        return corruption.draw_tokenizer(
            self.seed, self.samples, self.model.latent_shape, self.objective.tokenizer_t_max, backend=self.backend
        )

    def decoder_input(self, z: Tensor, objective: ObjectiveConfig) -> Tensor:
        if objective.noising == "add":  # an ablation without a kernel of its own
            return Draws.make(self.model, objective, self.seed, self.samples).decoder_input(z, objective)
        low, high = objective.noising_t
        return corruption.noise_injection(
            z, self.samples, self.seed, objective.noising_probability, low, high, backend=self.backend
        )

    def flow(self, z: Tensor, labels: Tensor, null_class: int) -> tuple[Tensor, Tensor, Tensor]:
        o = self.objective
        return corruption.flow_corruption(
            z.float(), labels, self.samples, self.seed, o.flow_steps, o.flow_time, o.flow_time_mean, o.flow_time_std,
            self.model.time_shift, o.label_dropout, null_class, backend=self.backend,
        )  # fmt: skip


def reconstruction_losses(
    model: UNITE,
    images: Tensor,
    draws: Draws | SeededDraws,
    objective: ObjectiveConfig,
    perceptual: Perceptual | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(latents (B, K, C), {"l1", "lpips"}) of images (B, Q, S, S) in [0, 1]. "l1" is the pixel loss of the config."""
    z = model.tokenize(images, *draws.tokenizer())
    reconstruction = model.decode(draws.decoder_input(z, objective))
    l1 = pixel_loss(images, reconstruction, objective.pixel_loss)
    lpips = l1.new_zeros(()) if perceptual is None else perceptual(images, reconstruction).float()
    return z, {"l1": l1, "lpips": lpips}


def flow_loss(model: UNITE, z: Tensor, zt: Tensor, t: Tensor, labels: Tensor, objective: ObjectiveConfig) -> Tensor:
    """The loss of one flow step: clean latents z and noised zt (B, K, C), times t (B,), labels (B,) after the drop."""
    x0 = model.denoise(zt, t, labels)
    return flow.LOSSES[objective.flow_loss](x0.float(), z.float(), zt, t)


def reconstruction_total(losses: dict[str, Tensor], objective: ObjectiveConfig) -> Tensor:
    return objective.pixel_weight * losses["l1"] + objective.perceptual_weight * losses["lpips"]


def joint_loss(
    model: UNITE,
    images: Tensor,
    labels: Tensor,
    draws: Draws | SeededDraws,
    objective: ObjectiveConfig | None = None,
    perceptual: Perceptual | None = None,
) -> dict[str, Tensor]:
    """Both passes at once: {"l1", "lpips", "flow", "total"} scalars with a graph, and "latents" (B, K, C) detached.

    images (B, Q, S, S) in [0, 1], labels int64 (B,). Without ``perceptual`` the LPIPS term is 0. The published
    objective is the default; the number of flow steps is that of the draws.
    """
    objective = objective or ObjectiveConfig()
    z, losses = reconstruction_losses(model, images, draws, objective, perceptual)
    target = z.detach() if objective.stop_gradient else z
    steps = zip(*draws.flow(target, labels, model.null_class), strict=True)
    flows = [flow_loss(model, target, *step, objective) for step in steps]
    losses["flow"] = _reduce(flows, objective) if flows else losses["l1"].new_zeros(())
    losses["total"] = reconstruction_total(losses, objective) + objective.flow_weight * losses["flow"]
    losses["latents"] = z.detach()
    return losses


def _reduce(flows: list[Tensor], objective: ObjectiveConfig) -> Tensor:
    stacked = torch.stack(flows)
    return stacked.mean() if objective.flow_reduction == "mean" else stacked.sum()


def _propagate(loss: Tensor) -> None:
    """The backward pass, outside autocast: what ran in float32 forward does so backward."""
    with torch.autocast(loss.device.type, enabled=False):
        loss.backward()


def flow_backward(
    model: UNITE, z: Tensor, zt: Tensor, t: Tensor, labels: Tensor, objective: ObjectiveConfig, steps: int, scale: float
) -> Tensor:
    """Forward and backward of n of the ``steps`` flow steps as one batch; the detached loss, their part of the whole.

    z (B, K, C) detached latents; zt (n, B, K, C), t and labels (n, B) of ``draws.flow``.
    """
    count = len(zt)
    loss = flow_loss(model, z.repeat(count, 1, 1), zt.flatten(0, 1), t.flatten(), labels.flatten(), objective)
    loss = loss * (count / (steps if objective.flow_reduction == "mean" else 1))
    _propagate(loss * (objective.flow_weight * scale))
    return loss.detach()


def backward(
    model: UNITE,
    images: Tensor,
    labels: Tensor,
    draws: Draws | SeededDraws,
    objective: ObjectiveConfig,
    perceptual: Perceptual | None = None,
    scale: float = 1.0,
    flow_mini_batch: int = 1,
    flow_pass: FlowPass | None = None,
) -> dict[str, Tensor]:
    """Accumulates the gradients of ``scale * total``; returns the losses of ``joint_loss``, detached.

    The latents are detached for the flow, so the backward of ``flow_mini_batch`` flow steps, which go through the
    network as one batch, follows their forward at once: memory holds one pass at a time. flow_pass: instead of
    ``flow_backward`` with this model, objective and scale, the same from a CUDA graph.
    """
    if not objective.stop_gradient:
        losses = joint_loss(model, images, labels, draws, objective, perceptual)
        _propagate(losses["total"] * scale)
        return {name: value.detach() for name, value in losses.items()}
    z, losses = reconstruction_losses(model, images, draws, objective, perceptual)
    total = reconstruction_total(losses, objective)
    _propagate(total * scale)
    # Nothing of this pass's graph may live on: the flow's capture needs accumulation nodes of its own stream.
    total, z = total.detach(), z.detach()
    noised, t, labels = draws.flow(z, labels, model.null_class)
    losses = {name: value.detach() for name, value in losses.items()}
    losses["flow"] = torch.zeros_like(losses["l1"])
    steps = len(t)
    for zt, times, classes in zip(*(x.split(flow_mini_batch) for x in (noised, t, labels)), strict=True):
        if flow_pass is None:
            losses["flow"] += flow_backward(model, z, zt, times, classes, objective, steps, scale)
        else:
            losses["flow"] += flow_pass(z, zt, times, classes)
    return losses | {"total": total + objective.flow_weight * losses["flow"], "latents": z}
