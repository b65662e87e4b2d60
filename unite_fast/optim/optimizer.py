"""One update of all parameters: global clip, Muon on the matrices, AdamW on the rest, then EMA.

Muon (Jordan, 2024) is batched over tensors of equal shape: one Newton-Schulz iteration orthogonalises all of them.
State is kept by parameter name, so a checkpoint does not depend on the order of parameters.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from unite_fast.config import OptimConfig
from unite_fast.optim.groups import split_parameters
from unite_kernels import multi_tensor
from unite_kernels.newton_schulz import newton_schulz

NS_EPS = 1e-6


class Optimizer:
    """Muon + AdamW + EMA of ``model`` (SPEC section 3).

    Attributes: ``momentum`` (Muon), ``exp_avg`` and ``exp_avg_sq`` (AdamW), ``ema``: tensors by parameter name;
    ``steps``: updates done (0-d float32 tensor), the same for every AdamW tensor; ``skip``: whether the last step
    changed nothing because the gradient was not finite (0-d bool tensor).
    """

    def __init__(self, model: nn.Module, config: OptimConfig, backend: str = "eager") -> None:
        self.config, self.backend = config, backend
        self.muon, self.adamw = split_parameters(model, config.muon)
        self.parameters = self.muon | self.adamw
        self.momentum = {name: torch.zeros_like(p) for name, p in self.muon.items()}
        self.exp_avg = {name: torch.zeros_like(p) for name, p in self.adamw.items()}
        self.exp_avg_sq = {name: torch.zeros_like(p) for name, p in self.adamw.items()}
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.steps = torch.zeros((), device=next(iter(self.ema.values())).device)
        self.skip = torch.zeros_like(self.steps, dtype=torch.bool)

    def newton_schulz_dtype(self, device: torch.device) -> torch.dtype:
        choice = self.config.newton_schulz_dtype
        if choice == "auto":
            choice = "fp32" if device.type == "cpu" else "bf16"
        return torch.float32 if choice == "fp32" else torch.bfloat16

    @torch.no_grad()
    def step(self, lr: float) -> Tensor:
        """Updates parameters, state and EMA from ``.grad`` and clears it; returns the gradient norm before the clip.

        Parameters without a gradient keep their value. When the norm is not finite nothing changes and ``skip`` is
        true, without the host knowing; gradients averaged over ranks make all of them skip together.
        """
        live = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        norm, coefficient, self.skip = multi_tensor.clip(list(live.values()), self.config.clip, backend=self.backend)
        rate = torch.full_like(norm, lr)
        self._adamw({n: g for n, g in live.items() if n in self.adamw}, rate, coefficient)
        self._muon({n: g for n, g in live.items() if n in self.muon}, rate, coefficient)
        for name in live:
            self.parameters[name].grad = None
        return norm

    def _adamw(self, grads: dict[str, Tensor], lr: Tensor, coefficient: Tensor) -> None:
        """Loshchilov & Hutter 2019."""
        c = self.config
        if grads:
            multi_tensor.adamw_step_(
                [self.adamw[n].detach() for n in grads],
                list(grads.values()),
                [self.exp_avg[n] for n in grads],
                [self.exp_avg_sq[n] for n in grads],
                self.steps,
                lr,
                c.betas,
                c.eps,
                c.weight_decay,
                clip_coef=coefficient,
                skip=self.skip,
                ema=[self.ema[n] for n in grads],
                ema_decay=c.ema_decay,
                backend=self.backend,
            )

    def _muon(self, grads: dict[str, Tensor], lr: Tensor, coefficient: Tensor) -> None:
        """As torch.optim.Muon with Nesterov momentum and adjust_lr_fn="match_rms_adamw"."""
        if not grads:
            return
        c = self.config
        names = sorted(grads, key=lambda n: grads[n].shape)
        batches, slices = [], []
        for shape, group in itertools.groupby(names, key=lambda n: grads[n].shape):
            batch = torch.empty(len(list(group)), *shape, device=lr.device, dtype=self.newton_schulz_dtype(lr.device))
            batches.append(batch)
            slices.extend(batch.unbind(0))
        multi_tensor.muon_momentum_(
            [grads[n] for n in names],
            [self.momentum[n] for n in names],
            c.muon_momentum,
            clip_coef=coefficient,
            skip=self.skip,
            out=slices,
            backend=self.backend,
        )
        updates = []
        for batch in batches:
            orthogonal = newton_schulz(batch, c.newton_schulz_steps, eps=NS_EPS, dtype=batch.dtype)
            updates.extend(orthogonal.contiguous().unbind(0))
        multi_tensor.muon_apply_(
            [self.muon[n].detach() for n in names],
            updates,
            lr,
            [0.2 * math.sqrt(max(grads[n].shape)) for n in names],
            c.muon_weight_decay,
            skip=self.skip,
            ema=[self.ema[n] for n in names],
            ema_decay=c.ema_decay,
            backend=self.backend,
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Flat tensors "momentum.<name>", "exp_avg.<name>", "exp_avg_sq.<name>"; ``steps`` and ``ema`` apart."""
        parts = {"momentum": self.momentum, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return {f"{part}.{name}": t for part, tensors in parts.items() for name, t in tensors.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor], steps: int) -> None:
        """Copies tensors of ``state_dict``'s names. Raises ValueError naming what is missing, extra or misshapen."""
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
            tensor.copy_(state[name])
        self.steps.fill_(steps)
