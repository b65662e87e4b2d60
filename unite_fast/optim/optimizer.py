"""One update of all parameters: global clip, Muon on the matrices, AdamW on the rest, then EMA.

Muon (Jordan, 2024) is batched over tensors of equal shape: one Newton-Schulz iteration orthogonalises all of them.
State is kept by parameter name, so a checkpoint does not depend on the order of parameters.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor, nn
from unite_kernels.newton_schulz import newton_schulz

from unite_fast.config import OptimConfig
from unite_fast.optim.groups import split_parameters

NS_EPS = 1e-6


class Optimizer:
    """Muon + AdamW + EMA of ``model`` (SPEC section 3).

    Attributes: ``momentum`` (Muon), ``exp_avg`` and ``exp_avg_sq`` (AdamW), ``ema``: tensors by parameter name;
    ``steps``: updates done, the same for every AdamW tensor.
    """

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        self.config = config
        self.muon, self.adamw = split_parameters(model, config.muon)
        self.parameters = self.muon | self.adamw
        self.momentum = {name: torch.zeros_like(p) for name, p in self.muon.items()}
        self.exp_avg = {name: torch.zeros_like(p) for name, p in self.adamw.items()}
        self.exp_avg_sq = {name: torch.zeros_like(p) for name, p in self.adamw.items()}
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.steps = 0

    def newton_schulz_dtype(self, device: torch.device) -> torch.dtype:
        choice = self.config.newton_schulz_dtype
        if choice == "auto":
            choice = "fp32" if device.type == "cpu" else "bf16"
        return torch.float32 if choice == "fp32" else torch.bfloat16

    @torch.no_grad()
    def step(self, lr: float) -> Tensor:
        """Updates parameters, state and EMA from ``.grad`` and clears it; returns the gradient norm before the clip.

        Parameters without a gradient keep their value.
        """
        live = {name: p for name, p in self.parameters.items() if p.grad is not None}
        grads = [p.grad for p in live.values()]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        coefficient = (self.config.clip / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(grads, coefficient)
        self.steps += 1
        self._adamw([n for n in self.adamw if n in live], lr)
        self._muon([n for n in self.muon if n in live], lr)
        torch._foreach_lerp_(
            list(self.ema.values()), [p.detach() for p in self.parameters.values()], 1 - self.config.ema_decay
        )
        for p in live.values():
            p.grad = None
        return norm

    def _adamw(self, names: list[str], lr: float) -> None:
        """Loshchilov & Hutter 2019, in the operation order of torch.optim.AdamW."""
        if not names:
            return
        c, (beta1, beta2) = self.config, self.config.betas
        params = [self.adamw[n] for n in names]
        grads = [p.grad for p in params]
        m, v = [self.exp_avg[n] for n in names], [self.exp_avg_sq[n] for n in names]
        if c.weight_decay:
            torch._foreach_mul_(params, 1 - lr * c.weight_decay)
        torch._foreach_lerp_(m, grads, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
        denominator = torch._foreach_sqrt(v)
        torch._foreach_div_(denominator, math.sqrt(1 - beta2**self.steps))
        torch._foreach_add_(denominator, c.eps)
        torch._foreach_addcdiv_(params, m, denominator, -lr / (1 - beta1**self.steps))

    def _muon(self, names: list[str], lr: float) -> None:
        """As torch.optim.Muon with Nesterov momentum and adjust_lr_fn="match_rms_adamw"."""
        c = self.config
        by_shape: dict[torch.Size, list[str]] = defaultdict(list)
        for name in names:
            by_shape[self.muon[name].shape].append(name)
        for shape, group in by_shape.items():
            params = [self.muon[n] for n in group]
            grads, buffers = [p.grad for p in params], [self.momentum[n] for n in group]
            torch._foreach_lerp_(buffers, grads, 1 - c.muon_momentum)
            update = torch.stack(torch._foreach_lerp(grads, buffers, c.muon_momentum))
            update = newton_schulz(
                update, c.newton_schulz_steps, eps=NS_EPS, dtype=self.newton_schulz_dtype(update.device)
            )
            if c.muon_weight_decay:
                torch._foreach_mul_(params, 1 - lr * c.muon_weight_decay)
            scale = 0.2 * math.sqrt(max(shape))
            torch._foreach_add_(params, list(update.to(params[0].dtype).unbind(0)), alpha=-lr * scale)

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
        self.steps = steps
