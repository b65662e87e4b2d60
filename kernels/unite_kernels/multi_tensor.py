"""The optimizer's elementwise work on lists of tensors: norm, clip, AdamW, Muon and EMA, one pass over memory each.

    norm     n = sqrt(sum over all tensors of |g|^2);   coef = min(1, max_norm / (n + 1e-6));   skip = n is not finite
    AdamW    g' = coef g;  m += (1 - b1)(g' - m);  v = b2 v + (1 - b2) g'^2;  p *= 1 - lr wd
             p -= lr / (1 - b1^s) * m / (sqrt(v / (1 - b2^s)) + eps),   s = step + 1      (torch.optim.AdamW)
    Muon     g' = coef g;  buf += (1 - mu)(g' - buf);  u = g' + mu (buf - g')  -> Newton-Schulz ->
             p = p (1 - lr wd) - lr scale u                                                (torch.optim.Muon)
    EMA      e += (1 - decay)(p - e), in the same pass as the update of p

Shapes: every list holds tensors of any shape; lists of one call correspond element by element. float32, contiguous;
Muon's update may be bfloat16. ``lr``, ``step``, ``coef`` and ``skip`` are 0-d tensors on the tensors' device: nothing
is read back, so a step can be captured in a CUDA graph. Where ``skip`` is true an update changes nothing.

Bytes per element, fused: norm 4; AdamW 28, with EMA 36; Muon momentum 12 + update; Muon apply 8 + update, with EMA +8.
Launches of a whole step on CUDA, up to 512 tensors per list: norm 2, momentum 1, Muon apply 1, AdamW 1, step count 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from . import backend as _backend
from .extension import load_cpu, load_cuda

NORM_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_


# --- eager reference ---------------------------------------------------------------------------------------------


@contextmanager
def _unless(skip: Tensor | None, *lists: Sequence[Tensor] | None):
    """Undo what the block wrote to these tensors where ``skip`` is true, without reading ``skip`` on the host."""
    tensors = [tensor for group in lists if group is not None for tensor in group] if skip is not None else []
    saved = [tensor.clone() for tensor in tensors]
    yield
    for tensor, old in zip(tensors, saved, strict=True):
        tensor.copy_(torch.where(skip, old, tensor))


def _clipped(grads: Sequence[Tensor], coef: Tensor | None) -> Sequence[Tensor]:
    return grads if coef is None else torch._foreach_mul(grads, coef)


def eager_clip(tensors: Sequence[Tensor], max_norm: float) -> tuple[Tensor, Tensor, Tensor]:
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))
    return norm, (max_norm / (norm + NORM_EPS)).clamp(max=1.0), ~torch.isfinite(norm)


def eager_ema_(ema: Sequence[Tensor], params: Sequence[Tensor], decay: float) -> None:
    torch._foreach_lerp_(ema, params, 1.0 - decay)


def eager_ema_lerp_(ema: Sequence[Tensor], params: Sequence[Tensor], weight: Tensor) -> None:
    differences = torch._foreach_sub(params, ema)
    torch._foreach_mul_(differences, weight)
    torch._foreach_add_(ema, differences)


def eager_adamw_(params, grads, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay, coef, ema, ema_decay) -> None:
    grads = _clipped(grads, coef)
    count = step.double() + 1.0  # in float64: 1 - 0.999**1 keeps only 4 digits in float32
    correction1, correction2 = 1.0 - betas[0] ** count, 1.0 - betas[1] ** count
    torch._foreach_lerp_(exp_avg, grads, 1.0 - betas[0])
    torch._foreach_mul_(exp_avg_sq, betas[1])
    torch._foreach_addcmul_(exp_avg_sq, grads, grads, 1.0 - betas[1])
    if weight_decay:
        torch._foreach_mul_(params, 1.0 - lr * weight_decay)
    denominators = torch._foreach_sqrt(exp_avg_sq)
    torch._foreach_div_(denominators, correction2.sqrt().float())
    torch._foreach_add_(denominators, eps)
    updates = torch._foreach_div(exp_avg, denominators)
    torch._foreach_mul_(updates, (lr / correction1).float())
    torch._foreach_sub_(params, updates)
    if ema is not None:
        eager_ema_(ema, params, ema_decay)
    step.add_(1.0)


def eager_muon_momentum_(grads, buffers, momentum, nesterov, coef, out) -> None:
    grads = _clipped(grads, coef)
    torch._foreach_lerp_(buffers, grads, 1.0 - momentum)
    torch._foreach_copy_(out, torch._foreach_lerp(grads, buffers, momentum) if nesterov else buffers)


def eager_muon_apply_(params, updates, lr, scales, weight_decay, ema, ema_decay) -> None:
    if weight_decay:
        torch._foreach_mul_(params, 1.0 - lr * weight_decay)
    scaled = torch._foreach_mul([update.float() for update in updates], list(scales))
    torch._foreach_mul_(scaled, lr)
    torch._foreach_sub_(params, scaled)
    if ema is not None:
        eager_ema_(ema, params, ema_decay)


# --- compiled operations ---------------------------------------------------------------------------------------------


def _compiled(backend: str, tensors: Sequence[Tensor]):
    """The namespace of the compiled operations for these tensors, or None for the eager form."""
    first = _first(tensors)
    resolved = _backend.resolve(backend, first)
    if resolved == "eager":
        return None
    if resolved == "cpp":
        load_cpu()
        return torch.ops.unite_kernels_cpu
    if first.device.type != "cuda":
        raise RuntimeError("the multi-tensor updates have no Triton kernel: on CPU tensors use 'fused' or 'eager'")
    load_cuda()
    return torch.ops.unite_kernels_cuda


# --- public functions --------------------------------------------------------------------------------------------


@torch.no_grad()
def clip(tensors: Sequence[Tensor], max_norm: float, backend: str = "eager") -> tuple[Tensor, Tensor, Tensor]:
    """(norm, coef, skip), 0-d: the global norm, min(1, max_norm / (norm + 1e-6)), and whether the norm is not finite.

    The tensors stay as they are: the update functions below multiply by ``coef`` while they read the gradients.
    """
    if ops := _compiled(backend, tensors):
        return ops.clip(tensors, max_norm)
    _check_lists({"tensors": tensors})
    return eager_clip(tensors, max_norm)


@torch.no_grad()
def adamw_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    step: Tensor,
    lr: Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    clip_coef: Tensor | None = None,
    skip: Tensor | None = None,
    ema: Sequence[Tensor] | None = None,
    ema_decay: float = 0.0,
    backend: str = "eager",
) -> None:
    """AdamW on all ``params`` and, with ``ema``, their moving average. ``step`` counts the updates done before this
    one and is advanced; ``lr``, ``step``, ``clip_coef`` (float32) and ``skip`` (bool) are 0-d device tensors."""
    _check_scalars(params, step=step, lr=lr, clip_coef=clip_coef, skip=skip)
    if ops := _compiled(backend, params):
        rates = (*betas, eps, weight_decay)
        ops.adamw_(params, grads, exp_avg, exp_avg_sq, step, lr, *rates, clip_coef, skip, ema or [], ema_decay)
        return
    _check_lists({"params": params, "grads": grads, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "ema": ema})
    with _unless(skip, params, exp_avg, exp_avg_sq, ema, [step]):
        eager_adamw_(params, grads, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay, clip_coef, ema, ema_decay)


@torch.no_grad()
def muon_momentum_(
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor],
    momentum: float = 0.95,
    nesterov: bool = True,
    clip_coef: Tensor | None = None,
    skip: Tensor | None = None,
    out: Sequence[Tensor] | None = None,
    backend: str = "eager",
) -> Sequence[Tensor]:
    """Advance the momentum ``buffers`` and return the matrices to orthogonalise, in float32.

    ``out`` receives them instead (float32 or bfloat16): slices of one (n, rows, cols) make a batch without a copy.
    Where ``skip`` is true the result is undefined and ``muon_apply_`` must be given the same ``skip``.
    """
    if out is None:
        out = [torch.empty_like(grad, dtype=torch.float32) for grad in grads]
    _check_scalars(grads, clip_coef=clip_coef, skip=skip)
    if ops := _compiled(backend, grads):
        ops.muon_momentum_(grads, buffers, momentum, nesterov, clip_coef, skip, out)
        return out
    _check_lists({"grads": grads, "buffers": buffers}, updates=out)
    with _unless(skip, buffers):
        eager_muon_momentum_(grads, buffers, momentum, nesterov, clip_coef, out)
    return out


@torch.no_grad()
def muon_apply_(
    params: Sequence[Tensor],
    updates: Sequence[Tensor],
    lr: Tensor,
    scales: Sequence[float],
    weight_decay: float = 0.0,
    skip: Tensor | None = None,
    ema: Sequence[Tensor] | None = None,
    ema_decay: float = 0.0,
    backend: str = "eager",
) -> None:
    """p = p (1 - lr weight_decay) - lr scale update, and the moving average of p; one scale per tensor (a host float).

    The scale of ``adjust_lr_fn="match_rms_adamw"`` is 0.2 sqrt(max(rows, cols)). ``updates`` float32 or bfloat16.
    """
    _check_scalars(params, lr=lr, skip=skip)
    if ops := _compiled(backend, params):
        ops.muon_apply_(params, updates, lr, scales, weight_decay, skip, ema or [], ema_decay)
        return
    _check_lists({"params": params, "ema": ema}, updates=updates)
    if len(scales) != len(params):
        raise ValueError(f"{len(params)} params but {len(scales)} scales")
    with _unless(skip, params, ema):
        eager_muon_apply_(params, updates, lr, scales, weight_decay, ema, ema_decay)


@torch.no_grad()
def ema_lerp_(
    ema: Sequence[Tensor],
    params: Sequence[Tensor],
    decay: float | Tensor,
    skip: Tensor | None = None,
    backend: str = "eager",
) -> None:
    """ema += (1 - decay)(params - ema): the moving average alone, 12 bytes per element.

    ``decay``: a host float, or a 0-d float64 tensor on the device where it changes from step to step.
    """
    device = _first(ema).device
    if isinstance(decay, Tensor):
        weight = (1.0 - decay).float()
    else:
        weight = torch.full((), 1.0 - decay, device=device)
    _check_scalars(ema, weight=weight, skip=skip)
    if ops := _compiled(backend, ema):
        ops.ema_(ema, params, weight, skip)
        return
    _check_lists({"ema": ema, "params": params})
    with _unless(skip, ema):
        eager_ema_lerp_(ema, params, weight)


def _check_lists(lists: dict[str, Sequence[Tensor] | None], updates: Sequence[Tensor] | None = None) -> None:
    """One length, equal shapes per position, float32, one device; ``updates`` may be bfloat16 instead. The compiled
    operations check the same themselves: looking at a thousand tensors from Python would cost them a millisecond."""
    first_name, first = next(iter(lists.items()))
    device = first[0].device
    for name, group in (*lists.items(), ("updates", updates)):
        if group is None:
            continue
        if len(group) != len(first):
            raise ValueError(f"{len(first)} {first_name} but {len(group)} {name}")
        dtypes = (torch.float32, torch.bfloat16) if name == "updates" else (torch.float32,)
        for i, (tensor, model) in enumerate(zip(group, first, strict=True)):
            if tensor.dtype not in dtypes or tensor.dtype != group[0].dtype:
                raise TypeError(f"{name}[{i}] must be {' or '.join(map(str, dtypes))}, not {tensor.dtype}")
            if tensor.device != device:
                raise RuntimeError(f"{name}[{i}] is on {tensor.device} and {first_name}[0] on {device}")
            if tensor.shape != model.shape:
                raise ValueError(f"{name}[{i}] has shape {tuple(tensor.shape)}, {first_name}[{i}] {tuple(model.shape)}")


def _check_scalars(tensors: Sequence[Tensor], **scalars: Tensor | None) -> None:
    device = _first(tensors).device
    for name, scalar in scalars.items():
        if scalar is None:
            continue
        dtype = torch.bool if name == "skip" else torch.float32
        if not isinstance(scalar, Tensor) or scalar.ndim != 0 or scalar.dtype != dtype:
            raise TypeError(f"{name} must be a 0-d {dtype} tensor on the tensors' device, so that no step waits for it")
        if scalar.device != device:
            raise RuntimeError(f"{name} is on {scalar.device} and the tensors on {device}")


def _first(tensors: Sequence[Tensor]) -> Tensor:
    if not tensors:
        raise ValueError("the list of tensors is empty")
    return tensors[0]
