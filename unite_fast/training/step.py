"""The training step: the only place where forward, backward and update meet."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor

from unite_fast.base import faults
from unite_fast.base.errors import RunError
from unite_fast.config import Config
from unite_fast.data import Batch
from unite_fast.data.batch import slots_taken
from unite_fast.efficiency import graph, precision
from unite_fast.objective import FlowPass, Objective
from unite_fast.optim.schedule import learning_rate
from unite_fast.parallel.distributed import Ranks
from unite_fast.parallel.overlap import Averager
from unite_fast.training.guards import SkipCounter
from unite_fast.training.means import SKIPPED
from unite_fast.training.state import Part, TrainState

log = logging.getLogger("unite_fast.training.step")


class TrainStep:
    """One optimizer step of ``state`` on one rank's share of the global batch; device scalars, averaged over it."""

    def __init__(
        self,
        state: TrainState,
        config: Config,
        ranks: Ranks,
        split: tuple[int, int],
        images_per_epoch: int,
        objective: Objective,
    ) -> None:
        """split: (micro-batch, accumulation steps) of ``config.batch_split``."""
        self.state, self.config, self.ranks, self.objective = state, config, ranks, objective
        self.metrics = ("total", *objective.terms, *objective.measures, "latent_std", "grad_norm", "lr", SKIPPED)
        self.micro_batch, _ = split
        self.images_per_epoch = images_per_epoch
        self.skips = SkipCounter(ranks.device)
        objective.join({name: part.module for name, part in state.parts.items()})
        self.averagers = {name: self._averager(part) for name, part in state.parts.items()}
        self.passes = state.execution.passes([part.module for part in state.parts.values()])
        self.graphs = Graphs(self) if state.execution.captures else None

    # --- The step: a batch in, new weights. ``Graphs`` may replay what these functions do. ------------------------

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """batch: this rank's global_batch / world_size images. Averages gradients over ranks; no host sync on a GPU.

        A part whose gradient norm is not finite does not change, on all ranks. The step then counts as skipped: its
        metrics are 0 and "skipped" is 1.
        """
        state, number = self.state, self.state.step + 1
        self.objective.begin(number)
        losses = self.within_memory(batch, number)
        self.average()
        update = self.update if self.graphs is None else self.graphs.update
        metrics = update(*self.scalars(), losses)
        faults.strike("opt", number, list(state.optimizer.parameters.values()))
        faults.strike("ema", number, list(state.optimizer.ema.values()))
        state.step, state.images_seen = number, state.images_seen + self.config.train.global_batch
        return metrics

    def accumulate(self, batch: Batch, number: int) -> dict[str, Tensor]:
        """Gradients of the share's mean loss, micro-batch by micro-batch; the losses."""
        parts = len(batch.labels) // self.micro_batch
        sums: dict[str, Tensor] = {}
        for i, part in enumerate(batch.split(self.micro_batch)):
            micro_step = self.begin(number, last=i == parts - 1)
            part = part._replace(content=self.state.model.modality.content(part.content))
            faults.strike("fwd", number, [x for x in part.content.values() if x.is_floating_point()])
            for name, value in micro_step(part, 1 / parts).items():
                sums[name] = sums[name] + value if name in sums else value
        return {name: value / parts for name, value in sums.items()}

    def micro_step(self, batch: Batch, scale: float, flow_pass: FlowPass | None = None) -> dict[str, Tensor]:
        """Forward and backward of a micro-batch: adds the gradients of scale x its mean loss; losses and moments."""
        model = self.state.model
        registers = model.modality.registers(model.config, batch.content)
        draws = self.objective.draws(model, self.config.seed, batch.samples, registers)
        losses = self.objective.backward(model, batch, draws, scale, flow_pass, self.passes.last)
        latents = losses.pop("latents").double()
        if cut := model.latent_shape[0] - registers:
            latents = F.pad(latents, (0, 0, 0, cut))
        return losses | moments(latents, batch.sizes)

    def update(self, lr: Tensor, position: Tensor, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Clip, Muon, AdamW and EMA from gradients that are the same on all ranks; the step's metrics."""
        self.objective.settle(losses, self.ranks)
        latents = torch.stack([value for name, value in losses.items() if name.startswith("latent_")])
        self.ranks.average_([latents])  # over the global batch, however it is split
        due = self.due()
        norms = {name: part.step(lr) for name, part in due.items()}
        skip = torch.stack([part.optimizer.skip for part in due.values()]).any()
        self.skips.record(skip, position)
        metrics = {name: value for name, value in losses.items() if name in self.metrics}
        metrics |= {"latent_std": spread(*latents), "grad_norm": norms[""], "lr": lr}
        metrics = {name: torch.where(skip, 0.0, value) for name, value in metrics.items()}
        return metrics | {SKIPPED: skip.to(lr.dtype)}

    # ---------------------------------------------------------------------------------------------------------------

    def begin(self, number: int, last: bool) -> Callable[[Batch, float], dict[str, Tensor]]:
        """Before a micro-batch of step ``number``, the last one or not: what runs it, ``micro_step`` or its graph."""
        for averager in self.averagers.values():
            averager.begin(number, last)
        self.passes.begin(last)
        sends = last and self.state.execution.overlaps  # by hooks, which a replay does not run
        return self.micro_step if self.graphs is None or sends else self.graphs.micro_step

    def average(self) -> None:
        """Gradients of the due parts, over ranks."""
        for averager in self.averagers.values():
            averager.drop_untouched()
        for name in self.due():
            self.averagers[name].finish()

    def due(self) -> dict[str, Part]:
        """The parts to which this step's backward has given gradients: the same on all ranks."""
        return {name: part for name, part in self.state.parts.items() if part.optimizer.due}

    def _averager(self, part: Part) -> Averager:
        how, optimizer = self.state.execution, part.optimizer
        parameters = list(optimizer.parameters.values())
        return Averager(parameters, self.ranks, how.overlaps, optimizer.sharded, resident=not how.captures)

    def lr(self, images_seen: int) -> float:
        train = self.config.train
        return learning_rate(self.config.optim, images_seen, self.images_per_epoch, train.global_batch, train.epochs)

    def scalars(self) -> tuple[Tensor, Tensor]:
        """The learning rate (float32) and the number of images seen (int64) of this step, 0-d, on the device."""
        device, seen = self.ranks.device, self.state.images_seen
        lr = torch.full((), self.lr(seen), device=device)
        return lr, torch.full((), seen, dtype=torch.int64, device=device)

    def within_memory(self, batch: Batch, number: int) -> dict[str, Tensor]:
        """``accumulate`` in the precision of the parts. Out of memory: halves this rank's micro-batch if allowed.

        The gradient does not depend on how the share is cut, so the ranks need not agree on it.
        """
        state, wanted = self.state, self.state.execution.efficiency.precision
        for part in state.parts.values():
            if part.recipe.name != wanted:
                raise ValueError(f"the model is prepared for {part.recipe.name}, not {wanted}: see execution.prepare")
        while True:
            if self.graphs is not None:
                self.graphs.gradients.begin()
            try:
                # One context for all passes of the step: low-precision copies of the weights are made once in it.
                with ExitStack() as contexts:
                    for part in state.parts.values():
                        contexts.enter_context(part.recipe.step())
                    losses = self.accumulate(batch, number)
            except torch.OutOfMemoryError:
                half = next((m for m in range(self.micro_batch // 2, 0, -1) if len(batch.labels) % m == 0), 0)
                where = f"out of memory in step {number} with train.micro_batch={self.micro_batch}"
                if self.config.train.on_oom == "fail" or not half:
                    raise RunError(f"{where}; {self.memory_mend(half)}") from None
            else:
                if self.graphs is not None:
                    self.graphs.gradients.keep()
                return losses
            log.warning("%s; going on with %d, the global batch stays", where, half)
            self.micro_batch = half
            for parameter in state.parameters.values():
                parameter.grad = None
            if self.ranks.device.type == "cuda":
                torch.cuda.empty_cache()

    def memory_mend(self, half: int) -> str:
        """What a run that is out of memory can try. half: the next smaller micro-batch, 0 where there is none."""
        execution, mends = self.state.execution, []
        if not execution.recompute.blocks:
            mends.append("efficiency.recompute=blocks")
        if execution.captures and execution.overlaps:  # with twice the activations
            mends.append("efficiency.cuda_graph=step")
        if execution.efficiency.flow_mini_batch > 1:
            mends.append("efficiency.flow_mini_batch=1")
        mend = f"set train.micro_batch={half}" if half else "the model needs a larger GPU"
        return f"{mend} (or {' or '.join(mends)})" if mends else mend


def moments(z: Tensor, sizes: Tensor | None) -> dict[str, Tensor]:
    """Of latents (B, K, C) over samples: mean and mean square (K, C), and with ``sizes`` the share of samples in which
    each is there, since the others are 0.
    """
    found = {"latent_mean": z.mean(0), "latent_square": z.square().mean(0)}
    if sizes is not None:
        found["latent_share"] = slots_taken(sizes, z.shape[1]).double().mean(0)[:, None].expand_as(found["latent_mean"])
    return found


def spread(mean: Tensor, square: Tensor, share: Tensor | None = None) -> Tensor:
    """The mean standard deviation of latents over samples, 0-d, from their ``moments`` over all samples (K, C)."""
    if share is None:
        return (square - mean.square()).clamp_min(0).sqrt().mean()
    there, often = share > 0, share.clamp_min(1e-12)
    deviation = (square / often - (mean / often).square()).clamp_min(0).sqrt()
    return (deviation * there).sum() / there.sum().clamp_min(1)


class Graphs:
    """What ``efficiency.cuda_graph`` captures of a step, in place of the same of ``TrainStep``.

    A graph has fixed shapes: molecules that are padded to few sizes (``data.atoms.pad_multiple``) have one for each.
    """

    def __init__(self, step: TrainStep) -> None:
        self.step, self.execution = step, step.state.execution
        self.gradients = graph.Gradients(step.state.parameters)
        place = graph.Place.on(step.ranks.device)
        self.scale = step.micro_batch / (step.config.train.global_batch // step.ranks.world_size)
        self.flow: dict[int, graph.Captured] = {}
        self.micro: dict[int, graph.Captured] = {}  # by the registers that its batches are padded to
        self.place = place
        self.last = graph.Captured("the update", self._update, place)

    def micro_step(self, batch: Batch, scale: float) -> dict[str, Tensor]:
        """As ``TrainStep.micro_step``, from one graph or with graphs of its flow mini-batches."""
        if scale != self.scale:
            raise RuntimeError("a captured step goes on with the micro-batch that it began with")
        if self.execution.captures_flow_alone:
            return self.step.micro_step(batch, scale, self.flow_pass)
        model = self.step.state.model
        registers = model.modality.registers(model.config, batch.content)
        if registers not in self.micro:
            self.micro[registers] = graph.Captured("the micro-batch", self._micro, self.place)
        return self.micro[registers](**batch.tensors())

    def flow_pass(self, **tensors: Tensor) -> Tensor:
        """As ``Objective.flow_backward`` of one flow mini-batch, from a graph."""
        registers = tensors["z"].shape[1]
        if registers not in self.flow:
            self.flow[registers] = graph.Captured("the flow mini-batch", self._flow, self.place)
        return self.flow[registers](**tensors)["loss"]

    def update(self, lr: Tensor, position: Tensor, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """As ``TrainStep.update``; it communicates where there are several ranks, and is not captured then."""
        if self.execution.captures_update:
            return self.last(lr=lr, position=position, **losses)
        return self.step.update(lr, position, losses)

    def _flow(self, **tensors: Tensor) -> dict[str, Tensor]:
        with precision.uncached(self.execution.efficiency.precision, self.step.ranks.device):
            return {"loss": self.step.objective.flow_backward(self.step.state.model, self.scale, **tensors)}

    def _micro(self, **tensors: Tensor) -> dict[str, Tensor]:
        with precision.uncached(self.execution.efficiency.precision, self.step.ranks.device):
            return self.step.micro_step(Batch.from_tensors(tensors), self.scale)

    def _update(self, lr: Tensor, position: Tensor, **losses: Tensor) -> dict[str, Tensor]:
        return self.step.update(lr, position, losses)
