"""Adaptive layer norm: RMSNorm and modulation, with or without the residual operations before them.

    norm(u) = u / sqrt(mean(u^2) + eps), mod(u) = u (1 + scale) + shift
    adaln        y  = mod(norm(x) weight)
    adaln_mid    x1 = x + gate (branch + bias);                    y = mod(norm(x1) weight)
    adaln_tail   x2 = norm(x + gate (branch + bias)) weight3;      y = mod(norm(x2) weight1)

Shapes: x, branch (B, T, D); gate, shift, scale (B, D), rows may be apart; weights, bias (D,). The residual (x, x1, x2)
may be float32 beside a bfloat16 branch; y has the branch's dtype (x's in adaln). Statistics and sums are float32. The
bias, or none, is that of the linear layer which made the branch: its gradient is summed here, where the branch's passes
through registers, and not in a pass over it.

Bytes per token, r = bytes of a residual element, 2-byte branch: adaln forward (r + 2) D, backward (2 r + 2) D; mid and
tail forward (2 r + 4) D, backward (3 r + 6) D: the tail recomputes x1 and x2 from its inputs. Gradients shared over
rows are summed by program, then over programs in a fixed order: no atomics, so runs repeat.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backend as _backend
from .adaln_triton import MID, PLAIN, TAIL, run_backward, run_forward

WIDEST = 2048


def _norm(u: Tensor, weight: Tensor, eps: float) -> Tensor:
    u = u.float()
    return u * torch.rsqrt(u.square().mean(-1, keepdim=True) + eps) * weight.float()


def _modulate(u: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (u * (1.0 + scale.float()[:, None]) + shift.float()[:, None]).to(dtype)


def adaln_eager(x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return _modulate(_norm(x, weight, eps), shift, scale, x.dtype)


def _residual_sum(x: Tensor, branch: Tensor, gate: Tensor, bias: Tensor | None) -> Tensor:
    added = branch.float() if bias is None else branch.float() + bias.float()
    return x.float() + gate.float()[:, None] * added


def adaln_mid_eager(x, branch, gate, weight, shift, scale, bias, eps) -> tuple[Tensor, Tensor]:
    x1 = _residual_sum(x, branch, gate, bias).to(x.dtype)
    return x1, _modulate(_norm(x1, weight, eps), shift, scale, branch.dtype)


def adaln_tail_eager(x, branch, gate, weight3, weight1, shift, scale, bias, eps) -> tuple[Tensor, Tensor]:
    x2 = _norm(_residual_sum(x, branch, gate, bias), weight3, eps).to(x.dtype)
    return x2, _modulate(_norm(x2, weight1, eps), shift, scale, branch.dtype)


def _rstd(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.float32)


@torch.library.custom_op("unite_kernels::adaln_fwd", mutates_args=())
def _adaln_fwd(
    x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "cpp":
        return _backend.cpu_op("adaln_fwd")(x, weight, shift, scale, eps)
    _out, y, _rstd3, rstd = run_forward(PLAIN, x, None, None, None, weight, shift, scale, None, eps)
    return y, rstd


@_adaln_fwd.register_fake
def _(x, weight, shift, scale, eps, backend):
    return torch.empty_like(x), _rstd(x)


@torch.library.custom_op("unite_kernels::adaln_bwd", mutates_args=())
def _adaln_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor, rstd: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dy = dy.contiguous()
    if backend == "cpp":
        return _backend.cpu_op("adaln_bwd")(dy, x, weight, scale, rstd)
    grads = run_backward(PLAIN, None, dy, x, None, None, None, weight, scale, None, None, rstd)
    return grads[0], *grads[4:7]


@_adaln_bwd.register_fake
def _(dy, x, weight, scale, rstd, backend):
    return torch.empty_like(x), torch.empty_like(weight), _like(scale), _like(scale)


def _like(rows: Tensor) -> Tensor:
    return rows.new_empty(rows.shape)


def _like_bias(bias: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.float32) if bias is None else torch.empty_like(bias)


@torch.library.custom_op("unite_kernels::adaln_mid_fwd", mutates_args=())
def _adaln_mid_fwd(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    weight: Tensor,
    shift: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "cpp":
        return _backend.cpu_op("adaln_mid_fwd")(x, branch, gate, weight, shift, scale, bias, eps)
    x1, y, _rstd3, rstd = run_forward(MID, x, branch, gate, None, weight, shift, scale, bias, eps)
    return x1, y, rstd


@_adaln_mid_fwd.register_fake
def _(x, branch, gate, weight, shift, scale, bias, eps, backend):
    return torch.empty_like(x), torch.empty_like(branch), _rstd(x)


@torch.library.custom_op("unite_kernels::adaln_mid_bwd", mutates_args=())
def _adaln_mid_bwd(
    dx1: Tensor,
    dy: Tensor,
    x1: Tensor,
    branch: Tensor,
    gate: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    rstd: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx1, dy = dx1.contiguous(), dy.contiguous()
    if backend == "cpp":
        return _backend.cpu_op("adaln_mid_bwd")(dx1, dy, x1, branch, gate, weight, scale, bias, rstd)
    grads = run_backward(MID, dx1, dy, x1, branch, gate, None, weight, scale, bias, None, rstd)
    return *grads[:3], *grads[4:]


@_adaln_mid_bwd.register_fake
def _(dx1, dy, x1, branch, gate, weight, scale, bias, rstd, backend):
    big = torch.empty_like(x1), torch.empty_like(branch)
    return *big, _like(gate), torch.empty_like(weight), _like(scale), _like(scale), _like_bias(bias, x1)


@torch.library.custom_op("unite_kernels::adaln_tail_fwd", mutates_args=())
def _adaln_tail_fwd(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    weight3: Tensor,
    weight1: Tensor,
    shift: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if backend == "cpp":
        return _backend.cpu_op("adaln_tail_fwd")(x, branch, gate, weight3, weight1, shift, scale, bias, eps)
    return run_forward(TAIL, x, branch, gate, weight3, weight1, shift, scale, bias, eps)


@_adaln_tail_fwd.register_fake
def _(x, branch, gate, weight3, weight1, shift, scale, bias, eps, backend):
    return torch.empty_like(x), torch.empty_like(branch), _rstd(x), _rstd(x)


@torch.library.custom_op("unite_kernels::adaln_tail_bwd", mutates_args=())
def _adaln_tail_bwd(
    dx2: Tensor,
    dy: Tensor,
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    weight3: Tensor,
    weight1: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    rstd3: Tensor,
    rstd1: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx2, dy = dx2.contiguous(), dy.contiguous()
    if backend == "cpp":
        inputs = x, branch, gate, weight3, weight1, scale, bias, rstd3, rstd1
        return _backend.cpu_op("adaln_tail_bwd")(dx2, dy, *inputs)
    return run_backward(TAIL, dx2, dy, x, branch, gate, weight3, weight1, scale, bias, rstd3, rstd1)


@_adaln_tail_bwd.register_fake
def _(dx2, dy, x, branch, gate, weight3, weight1, scale, bias, rstd3, rstd1, backend):
    big = torch.empty_like(x), torch.empty_like(branch)
    weights = torch.empty_like(weight3), torch.empty_like(weight1)
    return *big, _like(gate), *weights, _like(scale), _like(scale), _like_bias(bias, x)


_run_adaln_bwd, _run_adaln_mid_bwd, _run_adaln_tail_bwd = map(
    _backend.direct, (_adaln_bwd, _adaln_mid_bwd, _adaln_tail_bwd)
)


def _adaln_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # here and below: no zeros are made for the statistics, which have no gradient
    x, weight, _shift, scale, _eps, ctx.backend = inputs
    ctx.save_for_backward(x, weight, scale, output[1])


def _gradients(*pairs: tuple[Tensor | None, Tensor]) -> list[Tensor]:
    """The gradients of outputs; zeros like the tensor beside it for an output that nothing used."""
    return [torch.zeros_like(like) if grad is None else grad for grad, like in pairs]


def _adaln_backward(ctx, dy, _drstd):
    saved = ctx.saved_tensors
    (dy,) = _gradients((dy, saved[0]))
    return *_run_adaln_bwd(dy, *saved, ctx.backend), None, None


def _adaln_mid_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    _x, branch, gate, weight, _shift, scale, bias, _eps, ctx.backend = inputs
    ctx.save_for_backward(output[0], branch, gate, weight, scale, bias, output[2])
    ctx.biased = bias is not None


def _adaln_mid_backward(ctx, dx1, dy, _drstd):
    saved = ctx.saved_tensors  # read once: recomputed activations are given out once
    dx1, dy = _gradients((dx1, saved[0]), (dy, saved[1]))
    *grads, dbias = _run_adaln_mid_bwd(dx1, dy, *saved, ctx.backend)
    return *grads, dbias if ctx.biased else None, None, None


def _adaln_tail_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    x, branch, gate, weight3, weight1, _shift, scale, bias, _eps, ctx.backend = inputs
    ctx.save_for_backward(x, branch, gate, weight3, weight1, scale, bias, *output[2:])
    ctx.biased = bias is not None


def _adaln_tail_backward(ctx, dx2, dy, _drstd3, _drstd1):
    saved = ctx.saved_tensors
    dx2, dy = _gradients((dx2, saved[0]), (dy, saved[1]))
    *grads, dbias = _run_adaln_tail_bwd(dx2, dy, *saved, ctx.backend)
    return *grads, dbias if ctx.biased else None, None, None


_run_adaln = _backend.differentiable(_adaln_fwd, _adaln_setup, _adaln_backward)
_run_adaln_mid = _backend.differentiable(_adaln_mid_fwd, _adaln_mid_setup, _adaln_mid_backward)
_run_adaln_tail = _backend.differentiable(_adaln_tail_fwd, _adaln_tail_setup, _adaln_tail_backward)


def _check(x: Tensor, branch: Tensor | None, weights: tuple[Tensor, ...], shift, scale, gate=None, bias=None) -> None:
    _backend.check_float("x", x)
    if x.ndim != 3 or not 0 < x.shape[2] <= WIDEST:
        raise ValueError(f"x must have shape (batch, tokens, width up to {WIDEST}), not {tuple(x.shape)}")
    _backend.check_contiguous("x", x)
    if branch is not None:
        _backend.check_float("branch", branch)
        _backend.check_shape("branch", branch, x.shape)
        _backend.check_contiguous("branch", branch)
    for name, weight in (*(("weight", weight) for weight in weights), ("bias", bias)):
        if weight is not None:
            _backend.check_float(name, weight)
            _backend.check_shape(name, weight, x.shape[2:])
            _backend.check_contiguous(name, weight)
    for name, rows in (("shift", shift), ("scale", scale), ("gate", gate)):
        if rows is not None:
            _backend.check_float(name, rows)
            _backend.check_shape(name, rows, (x.shape[0], x.shape[2]))
            _backend.check_rows(name, rows)
    if shift.dtype != scale.dtype:
        raise TypeError(f"shift and scale must have one dtype, not {shift.dtype} and {scale.dtype}")


def adaln(x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, backend: str = "fused") -> Tensor:
    """y (B, T, D) = norm(x) weight (1 + scale) + shift."""
    backend = _backend.resolve(backend, x, weight, shift, scale)
    _check(x, None, (weight,), shift, scale)
    if backend == "eager":
        return adaln_eager(x, weight, shift, scale, eps)
    return _run_adaln(x, weight, shift, scale, eps, backend)[0]


def adaln_mid(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    weight: Tensor,
    shift: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "fused",
) -> tuple[Tensor, Tensor]:
    """x1 = x + gate (branch + bias), y = norm(x1) weight (1 + scale) + shift; both (B, T, D)."""
    backend = _backend.resolve(backend, x, branch, gate, weight, shift, scale, bias)
    _check(x, branch, (weight,), shift, scale, gate, bias)
    if backend == "eager":
        return adaln_mid_eager(x, branch, gate, weight, shift, scale, bias, eps)
    return _run_adaln_mid(x, branch, gate, weight, shift, scale, bias, eps, backend)[:2]


def adaln_tail(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    weight3: Tensor,
    weight1: Tensor,
    shift: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "fused",
) -> tuple[Tensor, Tensor]:
    """x2 = norm(x + gate (branch + bias)) weight3, y = norm(x2) weight1 (1 + scale) + shift; both (B, T, D)."""
    backend = _backend.resolve(backend, x, branch, gate, weight3, weight1, shift, scale, bias)
    _check(x, branch, (weight3, weight1), shift, scale, gate, bias)
    if backend == "eager":
        return adaln_tail_eager(x, branch, gate, weight3, weight1, shift, scale, bias, eps)
    return _run_adaln_tail(x, branch, gate, weight3, weight1, shift, scale, bias, eps, backend)[:2]
