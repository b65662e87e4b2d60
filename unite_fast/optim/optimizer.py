"""One update of all parameters: global clip, Muon on the matrices, AdamW on the rest, then the moving averages.

State is kept by parameter name, so a checkpoint does not depend on the order of parameters. A parameter may be a
DTensor (FSDP2, HSDP): its state is then one too, and what is elementwise happens on each rank's own part.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unite_fast.config import OptimConfig
from unite_fast.optim import ema, muon
from unite_fast.optim.groups import split_parameters
from unite_fast.parallel.tensors import local, locals_of, part_of, shard_group
from unite_kernels import multi_tensor
from unite_kernels.newton_schulz import fastest_dtype

PARTS = ("momentum", "exp_avg", "exp_avg_sq")  # of the state, in its names


class Optimizer:
    """Muon + AdamW + EMA of ``model``, as the official code has them.

    Attributes: ``momentum`` (Muon), ``exp_avg`` and ``exp_avg_sq`` (AdamW), ``ema``: tensors by parameter name;
    ``averages``: every moving average by its name (``optim.ema``), ``ema`` among them;
    ``steps``: updates done (0-d float32 tensor), the same for every AdamW tensor; ``skip``: whether the last step
    changed nothing because the gradient was not finite (0-d bool tensor).
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimConfig,
        backend: str = "eager",
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """group: ranks that hold the same parameters and divide Muon's work among them; None: each does all of it.

        The ranks of a sharded model divide it over its shards whatever ``group`` is.
        """
        self.config, self.backend = config, backend
        self.muon, self.adamw = split_parameters(model, config.muon)
        self.parameters = self.muon | self.adamw
        self.momentum = {name: torch.zeros_like(p) for name, p in self.muon.items()}
        self.exp_avg = {name: torch.zeros_like(p) for name, p in self.adamw.items()}
        self.exp_avg_sq = {name: torch.zeros_like(p) for name, p in self.adamw.items()}
        self.averages = {name: self._copies() for name in ema.names(config)}
        self.ema = self.averages["ema"]
        first = next(iter(self.parameters.values()))
        shards = shard_group(first)
        self.sharded, self.group = shards is not None, shards or group
        self.steps = torch.zeros((), device=first.device)
        self.skip = torch.zeros_like(self.steps, dtype=torch.bool)
        self._plan: muon.Plan | None = None

    def _copies(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def restart(self, averages: Iterable[str]) -> None:
        """Lets these averages begin anew with the present weights."""
        for average in averages:
            for name, value in self.averages[average].items():
                local(value).copy_(local(self.parameters[name]))

    def newton_schulz_dtype(self, device: torch.device) -> torch.dtype:
        choice = self.config.newton_schulz_dtype
        if choice == "auto":
            return fastest_dtype(device, max((min(p.shape) for p in self.muon.values()), default=0))
        return torch.float32 if choice == "fp32" else torch.bfloat16

    @property
    def due(self) -> bool:
        """Whether a backward has given gradients since the last step."""
        return any(p.grad is not None for p in self.parameters.values())

    @torch.no_grad()
    def step(self, lr: float | Tensor) -> Tensor:
        """Updates parameters, state and EMA from ``.grad`` and clears it; returns the gradient norm before the clip.

        lr: a number, or a 0-d float32 tensor on the device, which a CUDA graph reads anew at every replay.

        Parameters without a gradient keep their value. When the norm is not finite nothing changes and ``skip`` is
        true, without the host knowing; gradients averaged over ranks make all of them skip together.
        """
        live = {name: local(p.grad) for name, p in self.parameters.items() if p.grad is not None}
        norm, coefficient = self._clip(list(live.values()))
        rate = lr if isinstance(lr, Tensor) else torch.full_like(norm, lr)
        matrices = {n: g for n, g in live.items() if n in self.muon}
        work = self._start_muon(matrices, coefficient)
        self._adamw({n: g for n, g in live.items() if n in self.adamw}, rate, coefficient)
        if work is not None:
            self._finish_muon(work, matrices, rate)
        self._average(live)
        for name in live:
            self.parameters[name].grad = None
        return norm

    def _clip(self, grads: list[Tensor]) -> tuple[Tensor, Tensor]:
        """(the norm over all shards, the factor on the gradients); sets ``skip``."""
        norm, coefficient, self.skip = multi_tensor.clip(grads, self.config.clip, backend=self.backend)
        if self.sharded:
            square = norm.double().square()
            dist.all_reduce(square, group=self.group)
            norm = square.sqrt().float()
            coefficient = (self.config.clip / (norm + multi_tensor.NORM_EPS)).clamp(max=1.0)
            self.skip = ~torch.isfinite(norm)
        return norm, coefficient

    def _adamw(self, grads: dict[str, Tensor], lr: Tensor, coefficient: Tensor) -> None:
        """Loshchilov & Hutter 2019."""
        c = self.config
        if grads:
            multi_tensor.adamw_step_(
                locals_of(self.adamw, grads),
                list(grads.values()),
                locals_of(self.exp_avg, grads),
                locals_of(self.exp_avg_sq, grads),
                self.steps,
                lr,
                c.betas,
                c.eps,
                c.weight_decay,
                clip_coef=coefficient,
                skip=self.skip,
                ema=None if c.ema_warmup else locals_of(self.ema, grads),
                ema_decay=c.ema_decay,
                backend=self.backend,
            )

    def _start_muon(self, grads: dict[str, Tensor], coefficient: Tensor) -> muon.Orthogonaliser | None:
        """As torch.optim.Muon with Nesterov momentum and adjust_lr_fn="match_rms_adamw": all but the last step."""
        if not grads:
            return None
        c = self.config
        if self._plan is None or self._plan.names != set(grads):
            ranks = 1 if self.group is None else dist.get_world_size(self.group)
            self._plan = muon.plan({n: self.muon[n].shape for n in grads}, ranks, self.sharded)
        device = coefficient.device
        work = muon.Orthogonaliser(
            self._plan, c.newton_schulz_steps, self.newton_schulz_dtype(device), device, self.group
        )
        slots = work.slots(grads)
        multi_tensor.muon_momentum_(
            [grads[n] for n in slots],
            locals_of(self.momentum, slots),
            c.muon_momentum,
            clip_coef=coefficient,
            skip=self.skip,
            out=list(slots.values()),
            backend=self.backend,
        )
        work.start()
        return work

    def _finish_muon(self, work: muon.Orthogonaliser, grads: dict[str, Tensor], lr: Tensor) -> None:
        for updates in work.updates(grads):
            multi_tensor.muon_apply_(
                locals_of(self.muon, updates),
                list(updates.values()),
                lr,
                [0.2 * math.sqrt(max(self.muon[n].shape)) for n in updates],
                self.config.muon_weight_decay,
                skip=self.skip,
                ema=None if self.config.ema_warmup else locals_of(self.ema, updates),
                ema_decay=self.config.ema_decay,
                backend=self.backend,
            )

    def _average(self, live: Mapping[str, Tensor]) -> None:
        """The averages that are not updated together with the weights, as the main one is without a warm-up."""
        decays = {ema.name(entry): ema.decay(entry, self.steps) for entry in self.config.ema_extra}
        if self.config.ema_warmup:
            decays["ema"] = ema.warmed(self.config.ema_decay, self.steps)
        for name, decay in decays.items():
            average, weights = locals_of(self.averages[name], live), locals_of(self.parameters, live)
            multi_tensor.ema_lerp_(average, weights, decay, self.skip, self.backend)

    def state_dict(self) -> dict[str, Tensor]:
        """Flat tensors "momentum.<name>", "exp_avg.<name>", "exp_avg_sq.<name>"; ``steps`` and averages apart."""
        parts = dict(zip(PARTS, (self.momentum, self.exp_avg, self.exp_avg_sq), strict=True))
        return {f"{part}.{name}": t for part, tensors in parts.items() for name, t in tensors.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Copies whole tensors of these names. Raises ValueError that says what is missing, extra or misshapen."""
        own = self.state_dict()
        problems = [f"lacks {n}" for n in own if n not in state] + [f"has unknown {n}" for n in state if n not in own]
        problems += [
            f"{n} is {tuple(state[n].shape)}, expected {tuple(t.shape)}"
            for n, t in own.items()
            if n in state and state[n].shape != t.shape
        ]
        if problems:
            raise ValueError("optimizer state " + "; ".join(problems[:3]))
        for name, tensor in own.items():
            local(tensor).copy_(part_of(state[name], tensor))
        self.steps.fill_(steps)
