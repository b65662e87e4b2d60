"""The losses of a training step by name, and their gradients.

    objective = Objective(config, modality's losses)
    draws = objective.draws(model, seed, batch.samples)
    losses = objective.backward(model, batch, draws)

The reconstruction's terms are the modality's (``modality/``), the flow's one is ``flow/losses.py``; their names and
weights are here, and the log, the report and the services take them from ``Objective.terms``.

Shape letters: B batch, N flow steps, n of them in a mini-batch, K registers, C latent dim.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from unite_fast import modality
from unite_fast.config import EfficiencyConfig, ModelConfig, ObjectiveConfig
from unite_fast.data.batch import Batch, batch_of_images, slots_taken
from unite_fast.flow.losses import LOSSES
from unite_fast.modality import Losses
from unite_fast.modality.images import ImageLosses
from unite_fast.modality.lpips import Perceptual
from unite_fast.model.discriminator import Discriminator
from unite_fast.model.unite import UNITE
from unite_fast.objective import adversarial
from unite_fast.objective.adversarial import Adversarial
from unite_fast.objective.draws import Draws, SeededDraws
from unite_fast.parallel.distributed import Ranks

__all__ = ["Draws", "FlowPass", "Objective", "SeededDraws", "joint_loss"]

FlowPass = Callable[..., Tensor]  # as ``Objective.flow_backward`` without its model and scale
FLOW = "flow"  # the flow's term


def _unheard(network: nn.Module) -> None:
    """Where nobody asks which backward is the last one."""


class Objective:
    """What is minimised: the weighted sum of the modality's terms and the flow's.

    losses: of the reconstruction. kernels, flow_mini_batch: as in ``efficiency``.
    """

    def __init__(
        self, config: ObjectiveConfig, losses: Losses, kernels: str = "eager", flow_mini_batch: int = 1
    ) -> None:
        self.config, self.losses, self.kernels, self.flow_mini_batch = config, losses, kernels, flow_mini_batch
        self.adversarial = Adversarial(config.adversarial) if config.adversarial.weight else None
        self.terms = (*losses.weights, *((FLOW,) if config.flow_steps else ()))
        self.measures: tuple[str, ...] = ()  # what else is told of a step
        if self.adversarial is not None:
            self.terms, self.measures = (*self.terms, adversarial.TERM), adversarial.MEASURES

    @classmethod
    def open(cls, model: ModelConfig, objective: ObjectiveConfig, efficiency: EfficiencyConfig) -> Objective:
        """That of a run, with the files that its losses need. Raises UserError."""
        losses = modality.of(model).losses(model, objective, efficiency)
        return cls(objective, losses, efficiency.kernels, efficiency.flow_mini_batch)

    def draws(self, model: UNITE, seed: int, samples: Tensor, registers: int = 0) -> SeededDraws:
        """Every random number of a micro-batch, from its global sample positions (B,).

        registers: that the batch has (``Modality.registers``); 0: as many as the model.
        """
        return SeededDraws(model, self.config, seed, samples, self.kernels, registers)

    # --- around the micro-batches of a step, for a discriminator that is trained beside the model ---

    def join(self, modules: Mapping[str, nn.Module]) -> None:
        """Takes the modules of the training state's other parts, by their names."""
        if self.adversarial is not None:
            self.adversarial.discriminator = cast(Discriminator, modules["discriminator"])

    def begin(self, number: int) -> None:
        """Before the first micro-batch of the step ``number``."""
        if self.adversarial is not None:
            self.adversarial.begin(number)

    def settle(self, losses: dict[str, Tensor], ranks: Ranks) -> None:
        """After the last one, on all ranks. losses: of all of this rank's; what is no loss is taken out."""
        if self.adversarial is not None:
            self.adversarial.settle(losses, ranks)

    # --- a micro-batch ---

    def decoded(self, model: UNITE, batch: Batch, draws: Draws | SeededDraws) -> tuple[Tensor, Any]:
        """(latents (B, K, C), the decoder's prediction) with their graph."""
        z = model.tokenize(batch.content, *draws.tokenizer(), batch.sizes)
        return z, model.decode(draws.decoder_input(z, self.config), batch.sizes)

    def reconstruction(
        self, model: UNITE, batch: Batch, draws: Draws | SeededDraws
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(latents (B, K, C), the modality's terms) with their graph."""
        z, prediction = self.decoded(model, batch, draws)
        return z, self.losses(batch.content, prediction, batch.sizes)

    def flow_loss(
        self, model: UNITE, z: Tensor, zt: Tensor, t: Tensor, labels: Tensor, sizes: Tensor | None = None
    ) -> Tensor:
        """Of one flow step: clean latents z and noised zt (B, K, C), times t (B,), labels (B,) after the drop.

        With ``sizes`` every sample counts alike, whatever its size: the loss does not depend on how a batch is cut.
        """
        weight = None
        if sizes is not None:
            slots = z.shape[1]
            weight = (slots_taken(sizes, slots) * (slots / sizes.clamp_min(1))[:, None])[:, :, None]

        def denoise(zt: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            return model.denoise(zt, t, labels, sizes)

        return LOSSES[self.config.flow_loss](denoise, z, zt, t, labels, weight)

    def flow_part(
        self, model: UNITE, z: Tensor, zt: Tensor, t: Tensor, labels: Tensor, sizes: Tensor | None = None
    ) -> Tensor:
        """The loss of n of the flow's steps as one batch, as their part of the whole.

        z (B, K, C) latents; zt (n, B, K, C), t and labels (n, B) of ``draws.flow``; sizes (B,).
        """
        o, count = self.config, len(zt)
        repeated = None if sizes is None else sizes.repeat(count)
        loss = self.flow_loss(model, z.repeat(count, 1, 1), zt.flatten(0, 1), t.flatten(), labels.flatten(), repeated)
        return loss * (count / (o.flow_steps if o.flow_reduction == "mean" else 1))

    def flow_backward(self, model: UNITE, scale: float, **tensors: Tensor) -> Tensor:
        """Forward and backward of ``flow_part``, whose detached loss is returned; its latents are detached."""
        loss = self.flow_part(model, **tensors)
        _propagate(loss * (self.config.flow_weight * scale))
        return loss.detach()

    def _flow(
        self,
        model: UNITE,
        z: Tensor,
        batch: Batch,
        draws: Draws | SeededDraws,
        part: FlowPass,
        before_last: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """The flow's term: ``part`` of each mini-batch of its steps, added up."""
        noised = draws.flow(z, batch.labels, model.null_class)
        others = {"z": z} if batch.sizes is None else {"z": z, "sizes": batch.sizes}
        found = torch.zeros((), device=z.device)
        mini_batches = list(zip(*(x.split(self.flow_mini_batch) for x in noised), strict=True))
        for number, (zt, t, labels) in enumerate(mini_batches, 1):
            if number == len(mini_batches):
                before_last()
            found = found + part(**others, zt=zt, t=t, labels=labels)
        return found

    def joint(self, model: UNITE, batch: Batch, draws: Draws | SeededDraws) -> dict[str, Tensor]:
        """Both passes at once: the terms and "total", 0-d with a graph, and "latents" (B, K, C), detached."""
        o = self.config
        z, terms = self.reconstruction(model, batch, draws)
        total = self._weighted(terms)
        if FLOW in self.terms:
            target = z.detach() if o.stop_gradient else z
            terms[FLOW] = self._flow(model, target, batch, draws, functools.partial(self.flow_part, model))
            total = total + o.flow_weight * terms[FLOW]
        return terms | {"total": total, "latents": z.detach()}

    def backward(
        self,
        model: UNITE,
        batch: Batch,
        draws: Draws | SeededDraws,
        scale: float = 1.0,
        flow_pass: FlowPass | None = None,
        last: Callable[[nn.Module], None] = _unheard,
    ) -> dict[str, Tensor]:
        """Accumulates the gradients of ``scale * total``; returns what ``joint`` does, detached.

        The latents are detached for the flow, so the backward of ``flow_mini_batch`` flow steps, which go through the
        network as one batch, follows their forward at once: memory holds one pass at a time. flow_pass: in place of
        ``flow_backward`` with this model and scale, the same from a CUDA graph. last: is told of a network when the
        backward that comes next is the last one through it.
        """
        o = self.config
        if self.adversarial is not None:
            return self._against(self.adversarial, model, batch, draws, scale, last)
        if not o.stop_gradient:
            losses = self.joint(model, batch, draws)
            last(model)
            _propagate(losses["total"] * scale)
            return {name: value.detach() for name, value in losses.items()}
        z, terms = self.reconstruction(model, batch, draws)
        total = self._weighted(terms)
        last(model.decoder if FLOW in self.terms else model)
        _propagate(total * scale)
        # Nothing of this pass's graph may live on: the flow's capture needs accumulation nodes of its own stream.
        total, z = total.detach(), z.detach()
        terms = {name: value.detach() for name, value in terms.items()}
        if FLOW in self.terms:
            part = flow_pass or functools.partial(self.flow_backward, model, scale)
            terms[FLOW] = self._flow(model, z, batch, draws, part, functools.partial(last, model))
            total = total + o.flow_weight * terms[FLOW]
        return terms | {"total": total, "latents": z}

    def _against(
        self,
        opponent: Adversarial,
        model: UNITE,
        batch: Batch,
        draws: Draws | SeededDraws,
        scale: float,
        last: Callable[[nn.Module], None],
    ) -> dict[str, Tensor]:
        """``backward`` of the decoder beside a discriminator."""
        assert isinstance(draws, SeededDraws)  # it draws more than a training step of UNITE
        z, prediction = self.decoded(model, batch, draws)

        def reconstruct(fake: Tensor) -> tuple[dict[str, Tensor], Tensor]:
            terms = self.losses(batch.content, fake, batch.sizes)
            return terms, self._weighted(terms)

        images = batch.content["images"]
        found = opponent.backward(model, images, prediction, draws, reconstruct, scale, last)
        return found | {"latents": z.detach()}

    def _weighted(self, terms: dict[str, Tensor]) -> Tensor:
        first, *others = (weight * terms[name] for name, weight in self.losses.weights.items())
        return sum(others, first)


def _propagate(loss: Tensor) -> None:
    """The backward pass, outside autocast: what ran in float32 forward does so backward."""
    if not loss.requires_grad:  # all that it passed through is frozen
        return
    with torch.autocast(loss.device.type, enabled=False):
        loss.backward()


def joint_loss(
    model: UNITE,
    images: Tensor,
    labels: Tensor,
    draws: Draws | SeededDraws,
    objective: ObjectiveConfig | None = None,
    perceptual: Perceptual | None = None,
) -> dict[str, Tensor]:
    """Both passes of images at once, for users: as ``Objective.joint``. The published objective is the default.

    images (B, Q, S, S) in [0, 1], labels int64 (B,). Without ``perceptual`` the term "lpips" is 0, without flow steps,
    whose number is that of the draws, "flow".
    """
    config = objective or ObjectiveConfig()
    if isinstance(draws, Draws):
        config = dataclasses.replace(config, flow_steps=len(draws.flow_t))
    batch = batch_of_images(images, labels, labels)
    losses = Objective(config, ImageLosses(config, perceptual)).joint(model, batch, draws)
    absent = losses["total"].new_zeros(())
    return {"lpips": absent, FLOW: absent} | losses
