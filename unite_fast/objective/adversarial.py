"""The adversarial loss of the decoder's fine-tuning, and the discriminator's own, from one forward pass of each.

    hinge            D: (max(0, 1 - s(x)) + max(0, 1 + s(x'))) / 2            G: -s(x')
    non_saturating   D: (softplus(-s(x)) + softplus(s(x'))) / 2              G: softplus(-s(x'))

s: a patch's logit of the image x or its reconstruction x'; means over patches and images (Lim & Ye 2017, arXiv
1705.02894; Goodfellow et al. 2014, arXiv 1406.2661). Both networks are updated by the same step from the same x', so
there is no state between the two updates.

The decoder's loss is L + weight * ratio * G, with L the reconstruction's. ratio = min(cap, |dL/dW| / (|dG/dW| + 1e-6))
at the decoder's last layer W (Esser et al. 2021, arXiv 2012.09841), here of the whole global batch of the step before:
0 in the first step. It is then the same however a batch is cut over ranks and micro-batches, and the decoder's backward
runs once, on the sum. What the two losses say of x' is computed first, each of its own network alone.

    r1      E |ds/dx|^2 / 2 of real images (Mescheder et al. 2018, arXiv 1801.04406), as the squared difference of the
            image's mean logit along one random direction of length 0.01 per pixel: attention and the fused operations
            have no second derivative
    lecam   E max(0, s(x) - a')^2 + E max(0, a - s(x'))^2, with a, a' running means of s(x), s(x') (Tseng et al. 2021,
            arXiv 2104.03310)

Shape letters: B batch, Q channels, S image size, L logits of an image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unite_fast.config import AdversarialConfig
from unite_fast.modality.images import ImageDecoder
from unite_fast.model.discriminator import Discriminator
from unite_fast.model.unite import UNITE
from unite_fast.objective import augment
from unite_fast.objective.draws import SeededDraws
from unite_fast.parallel.distributed import Ranks

TERM = "generator"  # the decoder's, among the terms of the objective
MEASURES = ("discriminator", "d_real", "d_fake", "d_accuracy", "adaptive_weight")
LAST_LAYER = ("last_layer_reconstruction", "last_layer_generator")  # gradients, for ``settle`` alone
EPS = 1e-6  # beside the norm that the ratio divides by
STEP = 0.01  # of the penalty's difference, in the images' range of 1
ANCHOR_DECAY = 0.99  # of LeCam's running means, per step

Reconstruct = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]  # a prediction -> (terms, their weighted sum)


class Shown(NamedTuple):
    """Real images and reconstructions (B, Q, S, S) as the discriminator sees them, and the draws of both."""

    real: Tensor
    fake: Tensor
    draws: SeededDraws


class Judged(NamedTuple):
    """Logits (B, L) of real images and of reconstructions, and the penalty on them (0-d)."""

    real: Tensor
    fake: Tensor
    penalty: Tensor


def generator_loss(kind: str, fake: Tensor) -> Tensor:
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


def discriminator_loss(kind: str, real: Tensor, fake: Tensor) -> Tensor:
    if kind == "hinge":
        return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2


def adaptive_ratio(reconstruction: Tensor, generator: Tensor, cap: float) -> Tensor:
    """From the gradients of both losses at the decoder's last layer; 0-d float32."""
    return (reconstruction.norm() / (generator.norm() + EPS)).clamp(max=cap)


def lecam(real: Tensor, fake: Tensor, anchors: Tensor) -> Tensor:
    """anchors: the running means of the logits of real and fake images (2,)."""
    return F.relu(real - anchors[1]).square().mean() + F.relu(anchors[0] - fake).square().mean()


def rounded(images: Tensor) -> Tensor:
    """As 8 bits would hold them; the gradient passes unchanged."""
    held = (images.detach().clamp(0, 1) * 255).round() / 255
    return images + (held - images).detach()


def opened(prediction: Tensor) -> Tensor:
    """The values (B, Q, S, S) in float32, with a graph of their own. No leaf of it: torch's FLOP counter hooks the
    inputs of modules, which it cannot where they are leaves."""
    values = prediction.detach().float().requires_grad_()
    return values.view_as(values)


def _gradient(loss: Tensor, of: Tensor) -> Tensor:
    with torch.autocast(loss.device.type, enabled=False):
        return torch.autograd.grad(loss, of)[0]


class Adversarial:
    """``begin`` before a step, ``backward`` for each micro-batch, ``settle`` after the last.

    discriminator: the training state's, put here before the first step.
    """

    discriminator: Discriminator

    def __init__(self, config: AdversarialConfig) -> None:
        self.config = config
        self.number = 0

    @property
    def learns(self) -> bool:
        """Whether the discriminator is updated in this step."""
        return self.number > self.config.discriminator_start

    @property
    def pulls(self) -> bool:
        """Whether the decoder learns from it."""
        return self.number > self.config.generator_start

    def begin(self, number: int) -> None:
        self.number = number
        if self.learns:
            self.discriminator.advance()

    def backward(
        self,
        model: UNITE,
        images: Tensor,
        prediction: Tensor,
        draws: SeededDraws,
        reconstruct: Reconstruct,
        scale: float,
        last: Callable[[nn.Module], None],
    ) -> dict[str, Tensor]:
        """Accumulates ``scale`` times the gradients of both networks; the terms, "total" and measures, detached.

        images (B, Q, S, S) in [0, 1]; prediction (B, Q, S, S) with its graph; last: as of ``Objective.backward``.
        """
        c = self.config
        fake = opened(prediction)
        terms, total = reconstruct(fake)
        toward = _gradient(total, fake)
        total = total.detach()
        found = {name: torch.zeros_like(total) for name in (TERM, *MEASURES)}
        if self.learns:
            shown, features = self.shown(images, fake, draws), None
            if self.pulls:
                loss, features = self.generator(model, shown)
                pull = _gradient(loss, fake)
                factor = c.weight * (self.discriminator.ratio if c.adaptive else torch.ones_like(total))
                found |= {TERM: loss.detach(), "adaptive_weight": factor}
                if c.adaptive:
                    found |= self._last_layer(model, prediction, toward, pull)
                toward, total = toward + factor * pull, total + factor * loss.detach()
            judged = self.judged(model, shown, features)
            last(self.discriminator)
            found |= self._learn(judged, scale)
        last(model)
        with torch.autocast(total.device.type, enabled=False):
            prediction.backward((toward * scale).to(prediction.dtype))
        return {name: term.detach() for name, term in terms.items()} | found | {"total": total}

    def shown(self, images: Tensor, fake: Tensor, draws: SeededDraws) -> Shown:
        c = self.config
        with torch.autocast(fake.device.type, enabled=False):
            numbers = augment.draw(draws.seed, draws.samples)
            fake = rounded(fake) if c.round_fakes else fake
            real, fake = (augment.augment(x, numbers, c.augment, c.augment_probability) for x in (images.float(), fake))
        return Shown(real, fake, draws)

    def _features(self, model: UNITE, seen: Tensor, draws: SeededDraws) -> list[Tensor]:
        return self.discriminator.features(model, seen, *draws.tokenizer())

    def generator(self, model: UNITE, shown: Shown) -> tuple[Tensor, list[Tensor] | None]:
        """(the decoder's loss with its graph; the reconstructions' features, where nothing learned makes them)."""
        features = self._features(model, shown.fake, shown.draws)
        loss = generator_loss(self.config.loss, self.discriminator.logits(features))
        return loss, [x.detach() for x in features] if self.discriminator.trunk is None else None

    def judged(self, model: UNITE, shown: Shown, features: list[Tensor] | None = None) -> Judged:
        """What the discriminator says, with its own graph alone. features: of the reconstructions, where known."""
        c, draws = self.config, shown.draws
        features = features or self._features(model, shown.fake.detach(), draws)
        real, fake = (
            self.discriminator.logits(self._features(model, shown.real, draws)),
            self.discriminator.logits(features),
        )
        penalty = real.new_zeros(())
        if c.penalty == "r1":
            direction = augment.direction(draws.seed, draws.samples, tuple(shown.real.shape[1:]))
            moved = self.discriminator.logits(self._features(model, shown.real + STEP * direction, draws))
            penalty = ((moved.mean(1) - real.mean(1)) / STEP).square().mean() / 2
        elif c.penalty == "lecam":
            penalty = self.discriminator.anchored * lecam(real, fake, self.discriminator.anchors)
        return Judged(real, fake, penalty)

    def _last_layer(self, model: UNITE, prediction: Tensor, toward: Tensor, pull: Tensor) -> dict[str, Tensor]:
        """The gradients of both losses at the decoder's last layer, from those at the prediction."""
        weight = cast(ImageDecoder, model.decoder).last_layer
        with torch.autocast(prediction.device.type, enabled=False):
            both = [
                torch.autograd.grad(prediction, weight, at.to(prediction.dtype), retain_graph=True)[0]
                for at in (toward, pull)
            ]
        return dict(zip(LAST_LAYER, both, strict=True))

    def _learn(self, judged: Judged, scale: float) -> dict[str, Tensor]:
        """Accumulates the discriminator's gradients; its measures."""
        real, fake, penalty = judged
        loss = discriminator_loss(self.config.loss, real, fake)
        with torch.autocast(loss.device.type, enabled=False):
            ((loss + self.config.penalty_weight * penalty) * scale).backward()
        real, fake = real.detach(), fake.detach()
        right = ((real.mean(1) > 0).float().mean() + (fake.mean(1) < 0).float().mean()) / 2
        return {"discriminator": loss.detach(), "d_real": real.mean(), "d_fake": fake.mean(), "d_accuracy": right}

    @torch.no_grad()
    def settle(self, losses: dict[str, Tensor], ranks: Ranks) -> None:
        """After the last micro-batch: takes what is the state's out of the step's ``losses``, and updates the ratio and
        the anchors from it. What is not finite leaves them as they are."""
        last = [losses.pop(name) for name in LAST_LAYER if name in losses]
        if last:
            ranks.average_(last)
            ratio = adaptive_ratio(last[0], last[1], self.config.adaptive_cap)
            self.discriminator.ratio.copy_(torch.where(torch.isfinite(ratio), ratio, self.discriminator.ratio))
        if self.learns and self.config.penalty == "lecam":
            seen = torch.stack([losses["d_real"], losses["d_fake"]]).float()
            ranks.average_([seen])
            anchors, anchored = self.discriminator.anchors, self.discriminator.anchored
            moved = torch.where(anchored > 0, ANCHOR_DECAY * anchors + (1 - ANCHOR_DECAY) * seen, seen)
            good = torch.isfinite(moved).all()
            anchors.copy_(torch.where(good, moved, anchors))
            anchored.copy_(torch.where(good, 1.0, anchored))
