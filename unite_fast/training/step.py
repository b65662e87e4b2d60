"""The training step: the only place where forward, backward and update meet."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from unite_fast import objective
from unite_fast.base import faults
from unite_fast.base.errors import RunError
from unite_fast.config import Config
from unite_fast.data import Batch, to_float
from unite_fast.efficiency import graph, precision
from unite_fast.modality.lpips import Perceptual
from unite_fast.optim.schedule import learning_rate
from unite_fast.parallel import overlap
from unite_fast.parallel.distributed import Ranks
from unite_fast.parallel.overlap import Averager
from unite_fast.parallel.tensors import local
from unite_fast.training.guards import SkipCounter
from unite_fast.training.means import SKIPPED
from unite_fast.training.state import TrainState

log = logging.getLogger("unite_fast.training.step")
METRICS = ("total", "l1", "lpips", "flow", "latent_std", "grad_norm", "lr", SKIPPED)


class TrainStep:
    """One optimizer step of ``state`` on one rank's share of the global batch; device scalars, averaged over it."""

    def __init__(
        self,
        state: TrainState,
        config: Config,
        ranks: Ranks,
        split: tuple[int, int],
        images_per_epoch: int,
        perceptual: Perceptual | None = None,
    ) -> None:
        """split: (micro-batch, accumulation steps) of ``config.batch_split``."""
        self.state, self.config, self.ranks, self.perceptual = state, config, ranks, perceptual
        self.micro_batch, self.accumulation = split
        self.images_per_epoch = images_per_epoch
        self.skips = SkipCounter(ranks.device)
        optimizer = state.optimizer
        self.averager = Averager(list(optimizer.parameters.values()), ranks, overlap.wanted(config), optimizer.sharded)
        self.graphs = Graphs(self) if config.efficiency.cuda_graph != "none" else None

    def lr(self, images_seen: int) -> float:
        train = self.config.train
        return learning_rate(
            self.config.optim, images_seen, self.images_per_epoch, train.global_batch, train.epochs, self.accumulation
        )

    def draws(self, samples: Tensor) -> objective.Draws | objective.SeededDraws:
        """Every random number of a micro-batch, from its global sample positions (B,)."""
        model = self.state.model
        if self.config.efficiency.kernels == "fused" and self.config.objective.stop_gradient:
            return objective.SeededDraws(model, self.config.objective, self.config.seed, samples)
        return objective.Draws.make(model, self.config.objective, self.config.seed, samples)

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """batch: this rank's global_batch / world_size images. Averages gradients over ranks; no host sync on a GPU.

        A step whose gradient norm is not finite changes nothing, on all ranks; its metrics are 0 and "skipped" is 1.
        """
        state, number = self.state, self.state.step + 1
        if self.graphs is not None:
            self.graphs.gradients.begin()
        losses = self.accumulate(batch, number)
        if self.graphs is not None:
            self.graphs.gradients.keep()
        self.averager.finish()
        lr, position = self.scalars()
        update = self.update if self.graphs is None else self.graphs.update
        metrics = update(lr, position, losses)
        faults.strike("opt", number, list(state.optimizer.parameters.values()))
        faults.strike("ema", number, list(state.optimizer.ema.values()))
        state.step = number
        state.images_seen += self.config.train.global_batch
        return metrics

    def scalars(self) -> tuple[Tensor, Tensor]:
        """The learning rate (float32) and the number of images seen (int64) of this step, 0-d, on the device."""
        device, seen = self.ranks.device, self.state.images_seen
        lr = torch.full((), self.lr(seen), device=device)
        return lr, torch.full((), seen, dtype=torch.int64, device=device)

    def update(self, lr: Tensor, position: Tensor, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Clip, Muon, AdamW and EMA from gradients that are the same on all ranks; the step's metrics."""
        moments = torch.stack((losses["latent_mean"], losses["latent_square"]))
        self.ranks.average_([moments])  # over the global batch, however it is split
        norm = self.state.optimizer.step(lr)
        skip = self.state.optimizer.skip
        self.skips.record(skip, position)
        metrics = {name: value for name, value in losses.items() if value.ndim == 0}
        metrics["latent_std"] = (moments[1] - moments[0].square()).clamp_min(0).sqrt().mean()
        metrics |= {"grad_norm": norm, "lr": lr}
        metrics = {name: torch.where(skip, 0.0, value) for name, value in metrics.items()}
        return metrics | {SKIPPED: skip.to(norm.dtype)}

    def accumulate(self, batch: Batch, number: int) -> dict[str, Tensor]:
        """Gradients of the share's mean loss; the losses. Out of memory: halves this rank's micro-batch if allowed.

        The gradient does not depend on how the share is cut, so the ranks need not agree on it.
        """
        state, wanted = self.state, self.config.efficiency.precision
        if state.recipe.name != wanted:
            raise ValueError(f"the model is prepared for {state.recipe.name}, not {wanted}: see precision.apply")
        while True:
            try:
                # One context for all passes of the step: low-precision copies of the weights are made once in it.
                with state.recipe.step():
                    return self._accumulate(batch, number)
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

    def _accumulate(self, batch: Batch, number: int) -> dict[str, Tensor]:
        parts = len(batch.labels) // self.micro_batch
        micro_step = self.micro_step if self.graphs is None else self.graphs.micro_step
        sums: dict[str, Tensor] = {}
        micro_batches = zip(*(part.split(self.micro_batch) for part in batch), strict=True)
        for i, (images, labels, samples) in enumerate(micro_batches):
            self.averager.begin(number, last=i == parts - 1)
            images = to_float(images)
            faults.strike("fwd", number, [images])
            losses = micro_step(images, labels, samples, 1 / parts)
            for name, value in losses.items():
                sums[name] = sums[name] + value if name in sums else value
        return {name: value / parts for name, value in sums.items()}

    def micro_step(
        self,
        images: Tensor,
        labels: Tensor,
        samples: Tensor,
        scale: float,
        flow_pass: objective.FlowPass | None = None,
    ) -> dict[str, Tensor]:
        """Forward and backward of one micro-batch: adds the gradients of scale x the mean loss; the losses and moments.

        images (B, Q, S, S) in [0, 1], labels and samples int64 (B,).
        """
        config, draws = self.config, self.draws(samples)
        losses = objective.backward(
            self.state.model,
            images,
            labels,
            draws,
            config.objective,
            self.perceptual,
            scale,
            config.efficiency.flow_mini_batch,
            flow_pass,
        )
        z = losses.pop("latents").double()
        return losses | {"latent_mean": z.mean(0), "latent_square": z.square().mean(0)}


class Graphs:
    """What ``efficiency.cuda_graph`` captures of a step, in place of the same of ``TrainStep``."""

    def __init__(self, step: TrainStep) -> None:
        self.step = step
        self.mode = step.config.efficiency.cuda_graph
        self.gradients = graph.Gradients(step.state.optimizer.parameters)
        place = graph.Place.on(step.ranks.device)
        self.scale = step.micro_batch / (step.config.train.global_batch // step.ranks.world_size)
        self.flow = graph.Captured("the flow mini-batch", self._flow, place)
        self.micro = graph.Captured("the micro-batch", self._micro, place)
        self.last = graph.Captured("the update", self._update, place)

    def micro_step(self, images: Tensor, labels: Tensor, samples: Tensor, scale: float) -> dict[str, Tensor]:
        """As ``TrainStep.micro_step``, from one graph or with graphs of its flow mini-batches."""
        if scale != self.scale:
            raise RuntimeError("a captured step goes on with the micro-batch that it began with")
        if self.mode == "flow":
            flow_pass = lambda z, zt, t, y: self.flow(z=z, zt=zt, t=t, labels=y)["loss"]  # noqa: E731
            return self.step.micro_step(images, labels, samples, scale, flow_pass)
        return self.micro(images=images, labels=labels, samples=samples)

    def update(self, lr: Tensor, position: Tensor, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """As ``TrainStep.update``; it communicates where there are several ranks, and is not captured then."""
        if self.mode == "flow" or self.step.ranks.world_size > 1:
            return self.step.update(lr, position, losses)
        return self.last(lr=lr, position=position, **losses)

    def _flow(self, z: Tensor, zt: Tensor, t: Tensor, labels: Tensor) -> dict[str, Tensor]:
        o = self.step.config.objective
        with precision.uncached(self.step.config.efficiency.precision, self.step.ranks.device):
            loss = objective.flow_backward(self.step.state.model, z, zt, t, labels, o, o.flow_steps, self.scale)
        return {"loss": loss}

    def _micro(self, images: Tensor, labels: Tensor, samples: Tensor) -> dict[str, Tensor]:
        with precision.uncached(self.step.config.efficiency.precision, self.step.ranks.device):
            return self.step.micro_step(images, labels, samples, self.scale)

    def _update(self, lr: Tensor, position: Tensor, **losses: Tensor) -> dict[str, Tensor]:
        return self.step.update(lr, position, losses)


def sampling_model(state: TrainState, weights: Mapping[str, Tensor] | None = None) -> Callable[[], None]:
    """Puts ``weights``, by default the EMA, into the model; the returned function puts the raw ones back."""
    raw = {name: local(p.detach()).clone() for name, p in state.optimizer.parameters.items()}
    _copy(state, state.optimizer.ema if weights is None else weights)
    return lambda: _copy(state, raw)


@torch.no_grad()
def _copy(state: TrainState, values: Mapping[str, Tensor]) -> None:
    for name, parameter in state.optimizer.parameters.items():
        local(parameter).copy_(local(values[name]))
