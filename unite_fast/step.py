"""The training step: the only place where forward, backward and update meet."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from unite_fast import objective
from unite_fast.checkpoint import TrainState
from unite_fast.config import Config, RunError
from unite_fast.data import Batch, to_float
from unite_fast.losses import Perceptual
from unite_fast.model.unite import UNITE
from unite_fast.optim.parts import local
from unite_fast.optim.schedule import learning_rate
from unite_fast.runtime import faults
from unite_fast.runtime.distributed import Ranks
from unite_fast.runtime.guards import SkipCounter
from unite_fast.runtime.overlap import Averager
from unite_fast.runtime.stats import SKIPPED

log = logging.getLogger("unite_fast.step")
METRICS = ("total", "l1", "lpips", "flow", "latent_std", "grad_norm", "lr", SKIPPED)


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
        self.skips = SkipCounter(ranks.device)
        self.averager: Averager | None = None

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
        """batch: this rank's global_batch / world_size images. Averages gradients over ranks; no host sync on a GPU.

        A step whose gradient norm is not finite changes nothing, on all ranks; its metrics are 0 and "skipped" is 1.
        """
        number = state.step + 1
        if self.averager is None:
            config, optimizer = self.config, state.optimizer
            overlap = config.efficiency.overlap_gradients and config.train.on_oom == "fail"
            self.averager = Averager(list(optimizer.parameters.values()), self.ranks, overlap, optimizer.sharded)
        losses = self.accumulate(state, batch, number)
        self.averager.finish()
        moments = [losses.pop("latent_mean"), losses.pop("latent_square")]
        self.ranks.average_(moments)  # over the global batch, however it is split
        losses["latent_std"] = (moments[1] - moments[0].square()).clamp_min(0).sqrt().mean()
        lr = self.lr(state.images_seen)
        norm = state.optimizer.step(lr)
        skip = state.optimizer.skip
        faults.strike("opt", number, list(state.optimizer.parameters.values()))
        faults.strike("ema", number, list(state.optimizer.ema.values()))
        self.skips.record(skip, state.images_seen)
        state.step = number
        state.images_seen += self.config.train.global_batch
        metrics = losses | {"grad_norm": norm, "lr": torch.full_like(norm, lr)}
        metrics = {name: torch.where(skip, 0.0, value) for name, value in metrics.items()}
        return metrics | {SKIPPED: skip.to(norm.dtype)}

    def accumulate(self, state: TrainState, batch: Batch, number: int) -> dict[str, Tensor]:
        """Gradients of the share's mean loss; the losses. Out of memory: halves this rank's micro-batch if allowed.

        The gradient does not depend on how the share is cut, so the ranks need not agree on it.
        """
        wanted = self.config.efficiency.precision
        if state.recipe.name != wanted:
            raise ValueError(f"the model is prepared for {state.recipe.name}, not {wanted}: see precision.apply")
        while True:
            try:
                # One context for all passes of the step: low-precision copies of the weights are made once in it.
                with state.recipe.step():
                    return self._accumulate(state, batch, number)
            except torch.OutOfMemoryError:
                half = next((m for m in range(self.micro_batch // 2, 0, -1) if len(batch.labels) % m == 0), 0)
                where = f"out of memory in step {number} with train.micro_batch={self.micro_batch}"
                if self.config.train.on_oom == "fail" or not half:
                    mend = f"; set train.micro_batch={half}" if half else "; the model needs a larger GPU"
                    raise RunError(f"{where}{mend} (or efficiency.recompute=blocks)") from None
            log.warning("%s; going on with %d, the global batch stays", where, half)
            self.micro_batch = half
            for parameter in state.optimizer.parameters.values():
                parameter.grad = None
            if self.ranks.device.type == "cuda":
                torch.cuda.empty_cache()

    def _accumulate(self, state: TrainState, batch: Batch, number: int) -> dict[str, Tensor]:
        config, model = self.config, state.model
        parts = len(batch.labels) // self.micro_batch
        sums: dict[str, Tensor] = {}
        assert self.averager is not None
        micro_batches = zip(*(part.split(self.micro_batch) for part in batch), strict=True)
        for i, (images, labels, samples) in enumerate(micro_batches):
            self.averager.begin(number, last=i == parts - 1)
            images = to_float(images)
            faults.strike("fwd", number, [images])
            draws = self.draws(model, samples)
            losses = objective.backward(
                model,
                images,
                labels,
                draws,
                config.objective,
                self.perceptual,
                1 / parts,
                config.efficiency.flow_mini_batch,
            )
            z = losses.pop("latents").double()
            losses |= {"latent_mean": z.mean(0), "latent_square": z.square().mean(0)}
            for name, value in losses.items():
                sums[name] = sums[name] + value if name in sums else value
        return {name: value / parts for name, value in sums.items()}


def sampling_model(state: TrainState, weights: Mapping[str, Tensor] | None = None) -> Callable[[], None]:
    """Puts ``weights``, by default the EMA, into the model; the returned function puts the raw ones back."""
    raw = {name: local(p.detach()).clone() for name, p in state.optimizer.parameters.items()}
    _copy(state, state.optimizer.ema if weights is None else weights)
    return lambda: _copy(state, raw)


@torch.no_grad()
def _copy(state: TrainState, values: Mapping[str, Tensor]) -> None:
    for name, parameter in state.optimizer.parameters.items():
        local(parameter).copy_(local(values[name]))
