"""The training step: the only place where forward, backward and update meet."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from unite_fast import objective
from unite_fast.checkpoint import TrainState
from unite_fast.config import Config
from unite_fast.data import Batch, to_float
from unite_fast.losses import Perceptual
from unite_fast.model.unite import UNITE
from unite_fast.optim.schedule import learning_rate
from unite_fast.runtime import precision
from unite_fast.runtime.distributed import Ranks

METRICS = ("total", "l1", "lpips", "flow", "latent_std", "grad_norm", "lr")


class TrainStep:
    """One optimizer step on one rank's share of the global batch; returns device scalars, averaged over the share."""

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        split: tuple[int, int],
        images_per_epoch: int,
        perceptual: Perceptual | None = None,
    ) -> None:
        """split: (micro-batch, accumulation steps) of ``config.batch_split``."""
        self.config, self.ranks, self.perceptual = config, ranks, perceptual
        self.micro_batch, self.accumulation = split
        self.images_per_epoch = images_per_epoch

    def lr(self, images_seen: int) -> float:
        train = self.config.train
        return learning_rate(
            self.config.optim, images_seen, self.images_per_epoch, train.global_batch, train.epochs, self.accumulation
        )

    def draws(self, model: UNITE, samples: Tensor) -> objective.Draws | objective.SeededDraws:
        """Every random number of a micro-batch, from its global sample positions (B,)."""
        if self.config.efficiency.kernels == "fused" and self.config.objective.stop_gradient:
            return objective.SeededDraws(model, self.config.objective, self.config.seed, samples)
        return objective.Draws.make(model, self.config.objective, self.config.seed, samples)

    def __call__(self, state: TrainState, batch: Batch) -> dict[str, Tensor]:
        """batch: this rank's global_batch / world_size images. Averages gradients over ranks; no host sync on a GPU."""
        config, model = self.config, state.model
        sums: dict[str, Tensor] = {}
        for images, labels, samples in zip(*(part.split(self.micro_batch) for part in batch), strict=True):
            images = to_float(images)
            draws = self.draws(model, samples)
            with precision.autocast(config.efficiency.precision, self.ranks.device):
                losses = objective.backward(
                    model,
                    images,
                    labels,
                    draws,
                    config.objective,
                    self.perceptual,
                    1 / self.accumulation,
                    config.efficiency.flow_mini_batch,
                )
            losses["latent_std"] = losses.pop("latents").float().std(dim=0, correction=0).mean()
            for name, value in losses.items():
                sums[name] = sums[name] + value if name in sums else value
        self.ranks.average_([p.grad for p in state.optimizer.parameters.values() if p.grad is not None])
        lr = self.lr(state.images_seen)
        norm = state.optimizer.step(lr)
        state.step += 1
        state.images_seen += config.train.global_batch
        metrics = {name: value / self.accumulation for name, value in sums.items()}
        return metrics | {"grad_norm": norm, "lr": torch.full_like(norm, lr)}


def sampling_model(state: TrainState) -> Callable[[], None]:
    """Puts the EMA weights into the model; the returned function puts the raw ones back."""
    raw = {name: p.detach().clone() for name, p in state.optimizer.parameters.items()}
    _copy(state, state.optimizer.ema)
    return lambda: _copy(state, raw)


@torch.no_grad()
def _copy(state: TrainState, values: dict[str, Tensor]) -> None:
    for name, parameter in state.optimizer.parameters.items():
        parameter.copy_(values[name])
