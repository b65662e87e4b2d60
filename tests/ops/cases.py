"""One case per operation, shared by the tests, the byte counter, the compiler check and the benchmarks.

A case makes the tensors of a public call. Shape letters: B samples, T tokens, D width, F hidden width of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from unite_kernels import adaln, conv_relu, copied_linear, corruption, lpips_head, qk_norm_rope, swiglu


@dataclass(frozen=True)
class Case:
    call: Callable  # call(tensors by name, backend) -> tuple of outputs
    tensors: Callable  # tensors(batch, tokens, width, big, small) -> dict; big and small are dtypes
    minimum: Callable  # minimum(batch, tokens, width, r, e) -> (forward, backward) bytes, r residual, e branch bytes


def _rows(batch: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(batch, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _big(batch: int, tokens: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, width, generator=generator).to(dtype)


def _weight(width: int, seed: int) -> Tensor:
    return 1.0 + 0.2 * torch.randn(width, generator=torch.Generator().manual_seed(seed))


def _adaln_tensors(batch, tokens, width, residual, branch):
    rows = {name: _rows(batch, width, branch, i) for i, name in enumerate(("shift", "scale"))}
    return {"x": _big(batch, tokens, width, residual, 2), "weight": _weight(width, 3), **rows}


def _mid_tensors(batch, tokens, width, residual, branch):
    more = {"branch": _big(batch, tokens, width, branch, 4), "gate": _rows(batch, width, branch, 5)}
    more["bias"] = _rows(1, width, torch.float32, 12)[0]
    return {**_adaln_tensors(batch, tokens, width, residual, branch), **more}


def _tail_tensors(batch, tokens, width, residual, branch):
    tensors = _mid_tensors(batch, tokens, width, residual, branch)
    tensors["weight1"] = tensors.pop("weight")
    return {**tensors, "weight3": _weight(width, 6)}


def heads_of(width: int) -> int:
    """The model's heads: 12 of 64 at 768, 16 of 64 at 1024, 16 of 72 at 1152."""
    return {768: 12, 1024: 16, 1152: 16}.get(width, 3)


def _qk_tensors(batch, tokens, width, _residual, branch):
    head_dim = width // heads_of(width)
    angle = torch.arange(tokens)[:, None] * 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    tensors = {"x": _big(batch, tokens, 3 * width, branch, 7), "q_weight": _weight(head_dim, 8)}
    tensors["bias"] = _rows(1, 3 * width, torch.float32, 13)[0]
    return {**tensors, "k_weight": _weight(head_dim, 9), "cos": angle.cos(), "sin": angle.sin()}


def _swiglu_tensors(batch, tokens, width, _residual, branch):
    hidden = int(2 / 3 * 4 * width)
    return {"x": _big(batch, tokens, 2 * hidden, branch, 10), "bias": _big(1, 1, 2 * hidden, torch.float32, 11)[0, 0]}


def _qk_call(t: dict[str, Tensor], backend: str):
    weights, prefix = (t["q_weight"], t["k_weight"]), min(2, t["x"].shape[1])
    arguments = (t["x"], weights, t["cos"], t["sin"], _qk_heads(t), prefix, t["bias"])
    return qk_norm_rope.qk_norm_rope(*arguments, backend=backend)


ADALN = ("x", "weight", "shift", "scale")
MID = ("x", "branch", "gate", "weight", "shift", "scale", "bias")
TAIL = ("x", "branch", "gate", "weight3", "weight1", "shift", "scale", "bias")

CASES = {
    "adaln": Case(
        lambda t, backend: (adaln.adaln(*(t[n] for n in ADALN), backend=backend),),
        _adaln_tensors,
        lambda b, t, d, r, e: (b * t * d * 2 * r, b * t * d * 3 * r),
    ),
    "adaln_mid": Case(
        lambda t, backend: adaln.adaln_mid(*(t[n] for n in MID), backend=backend),
        _mid_tensors,
        lambda b, t, d, r, e: (b * t * d * (2 * r + 2 * e), b * t * d * (3 * r + 3 * e)),
    ),
    "adaln_tail": Case(
        lambda t, backend: adaln.adaln_tail(*(t[n] for n in TAIL), backend=backend),
        _tail_tensors,
        lambda b, t, d, r, e: (b * t * d * (2 * r + 2 * e), b * t * d * (3 * r + 3 * e)),
    ),
    "qk_norm_rope": Case(_qk_call, _qk_tensors, lambda b, t, d, r, e: (b * t * d * 4 * e, b * t * d * 8 * e)),
    "swiglu": Case(
        lambda t, backend: (swiglu.swiglu(t["x"], t["bias"], backend=backend),),
        _swiglu_tensors,
        lambda b, t, d, r, e: (b * t * int(8 / 3 * d) * 3 * e, b * t * int(8 / 3 * d) * 5 * e),
    ),
}

COMPILED = (*CASES, "corruption", "lpips_head", "conv_relu")


@contextmanager
def training_programs() -> Iterator[None]:
    """Programs take about the rows that they take at a training batch, however small the batch."""
    with mock.patch("unite_kernels.launches.slots_of", return_value=2):
        yield


def launch_width(name: str, width: int) -> int:
    """Of the model's width, what the table of launches calls the width of an operation."""
    return int(8 / 3 * width) if name == "swiglu" else width


def launch_model_shape(name: str, width: int) -> None:
    """Launches the Triton kernels of one operation, forward and backward, at the model's dtypes and a small batch."""
    if name == "corruption":
        z, samples = torch.zeros(2, 256, 32), torch.arange(2)
        corruption._tokenizer_draws(samples, 7, z[0].numel(), 0.3, "triton")
        corruption._noise_injection(z, samples, 7, 0.5, 0.7, 1.0, "triton")
        for uniform in (False, True):
            corruption._flow_corruption(z, samples, samples, 7, 3, uniform, 0.0, 1.0, 0.5, 0.1, 1000, "triton")
        return
    if name == "lpips_head":
        for channels in (64, 512):
            f = torch.zeros(1, channels, 4, 4, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
            lpips_head._lpips_head_fwd(f, f, torch.zeros(channels), "triton")
            lpips_head._lpips_head_bwd(torch.zeros(1), f, f, torch.zeros(channels), False, True, "triton")
        return
    if name == "conv_relu":
        for channels in (64, 512):
            y = torch.zeros(1, channels, 4, 4, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
            bias = torch.zeros(channels, dtype=torch.bfloat16)
            conv_relu._relu_mask(y, conv_relu._relu_finish(y, bias, True, "triton"), "triton")
            conv_relu._relu_finish(y, bias, False, "triton")
            pooled = conv_relu._relu_pool_fwd(y, bias, "triton")
            for gradient in (pooled, None):
                conv_relu._relu_pool_bwd(y, y, gradient, "triton")
        return
    residual = torch.bfloat16 if name == "adaln" else torch.float32
    tensors = CASES[name].tensors(32, 32, width, residual, torch.bfloat16)
    if name == "swiglu":  # in bfloat16 its halves are padded (copied_linear.py)
        hidden = -(-launch_width(name, width) // copied_linear.MULTIPLE) * copied_linear.MULTIPLE
        tensors = {"x": tensors["x"].new_zeros(32, 32, 2 * hidden), "bias": torch.zeros(2 * hidden)}
    with training_programs():
        for step in launches(name, tensors):
            step()


def launches(name: str, t: dict[str, Tensor]) -> tuple[Callable, Callable]:
    """The registered operation with its Triton kernels, whatever the device: (forward, backward), in this order."""
    saved = []

    def forward():
        saved.extend(FORWARD[name](t))

    return forward, lambda: BACKWARD[name](t, *saved)


def _qk_heads(t: dict[str, Tensor]) -> int:
    return t["x"].shape[2] // (3 * t["q_weight"].numel())


def _qk_arguments(t: dict[str, Tensor]) -> tuple:
    return t["x"], [t["q_weight"], t["k_weight"]], t["cos"], t["sin"]


def _qk_backward(t: dict[str, Tensor], out: Tensor, rstd: Tensor):
    grads = [*out.unbind(), out[0]]
    return qk_norm_rope._qk_norm_rope_bwd(grads, *_qk_arguments(t), rstd, _qk_heads(t), 2, True, "triton")


FORWARD = {
    "adaln": lambda t: adaln._adaln_fwd(*(t[n] for n in ADALN), 1e-6, "triton"),
    "adaln_mid": lambda t: adaln._adaln_mid_fwd(*(t[n] for n in MID), 1e-6, "triton"),
    "adaln_tail": lambda t: adaln._adaln_tail_fwd(*(t[n] for n in TAIL), 1e-6, "triton"),
    "qk_norm_rope": lambda t: qk_norm_rope._qk_norm_rope_fwd(*_qk_arguments(t), _qk_heads(t), 2, 1e-6, "triton"),
    "swiglu": lambda t: (swiglu._swiglu_fwd(t["x"], t["bias"], "triton"),),
}
# The outputs stand in for their gradients: they have the shapes and dtypes.
BACKWARD = {
    "adaln": lambda t, y, rstd: adaln._adaln_bwd(y, t["x"], t["weight"], t["scale"], rstd, "triton"),
    "adaln_mid": lambda t, x1, y, rstd: adaln._adaln_mid_bwd(
        x1, y, x1, *(t[n] for n in ("branch", "gate", "weight", "scale", "bias")), rstd, "triton"
    ),
    "adaln_tail": lambda t, x2, y, rstd3, rstd1: adaln._adaln_tail_bwd(
        x2, y, *(t[n] for n in (*TAIL[:5], "scale", "bias")), rstd3, rstd1, "triton"
    ),
    "qk_norm_rope": _qk_backward,
    "swiglu": lambda t, y: swiglu._swiglu_bwd(y, t["x"], t["bias"], "triton"),
}
