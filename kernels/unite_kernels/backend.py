"""Which implementation runs: resolved once per call from the configured name and the tensors' device.

    eager    plain torch operations; the reference, any device
    triton   the Triton kernels; CUDA tensors, or CPU tensors in Triton's interpreter (TRITON_INTERPRET=1)
    cpp      the vectorised C++ operations; CPU tensors
    fused    triton on CUDA tensors, cpp on CPU tensors

What was asked for and is not there is an error saying why; nothing falls back silently.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor

BACKENDS = ("eager", "fused", "triton", "cpp")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


# Constants, so that compiled code sees no call. Triton likewise decides when a kernel is defined.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
HAS_TRITON = find_spec("triton") is not None


_on_a_gpu = False


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Within it "fused" is Triton's on tensors of the CPU, too, which must have no data (fake tensors): what operations
    keep and return can then be counted where there is no GPU."""
    global _on_a_gpu
    _on_a_gpu = True
    try:
        yield
    finally:
        _on_a_gpu = False


def fused(device: torch.device) -> str:
    """What "fused" is on ``device``."""
    return "cpp" if device.type == "cpu" and not _on_a_gpu else "triton"


def resolve(backend: str, *tensors: Tensor | None) -> str:
    """``backend`` for these tensors: "eager", "triton" or "cpp". Raises if unknown, absent, or on several devices."""
    device = tensors[0].device
    for tensor in tensors[1:]:
        if tensor is not None and tensor.device != device:
            raise RuntimeError(f"tensors are on different devices: {device} and {tensor.device}")
    return _resolve(backend, device)


def _resolve(backend: str, device: torch.device) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"unknown kernel backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    if backend == "eager":
        return "eager"
    if backend == "fused":
        backend = fused(device)
    if backend == "cpp" and device.type != "cpu":
        raise RuntimeError(f"backend 'cpp' runs on CPU tensors, not {device.type}: use 'fused' or 'triton'")
    if backend == "triton":
        if not HAS_TRITON:
            raise RuntimeError("backend 'triton' needs the package triton, which is not installed: use 'eager'")
        if device.type != "cuda" and not INTERPRETING and not _on_a_gpu:
            raise RuntimeError(
                f"backend 'triton' runs on CUDA tensors, not {device.type}: use 'fused', or set TRITON_INTERPRET=1"
            )
    return backend


def obstacle(backend: str, device: torch.device, update: bool = False) -> str:
    """Why ``backend`` cannot run on ``device``, a CPU or a GPU; empty if it can. Loads the library that it needs.

    update: with the operations of ``multi_tensor``, which are C++ on GPUs as well.
    """
    from . import extension

    try:
        resolved = _resolve(backend, device)
    except RuntimeError as error:
        return str(error)
    compiled = resolved == "cpp" or (update and resolved == "triton")
    return extension.obstacle(device.type) if compiled else ""


def best(device: torch.device, update: bool = False) -> str:
    """ "fused" where what that needs is installed, else "eager". update: as in ``obstacle``.

    A library that is there and cannot be used is no reason for "eager": its ``obstacle`` says how to mend it.
    """
    from . import extension

    try:
        resolved = _resolve("fused", device)
    except RuntimeError:
        return "eager"
    compiled = resolved == "cpp" or update
    return "fused" if not compiled or extension.is_built(device.type) else "eager"


def settled(backend: str, device: torch.device) -> str:
    """``backend``, and for "auto" what is ``best``."""
    return best(device) if backend == "auto" else backend


def has_tiles() -> bool:
    """Whether this CPU has units for products in bfloat16 (AMX), several times as fast as those in float32."""
    return getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


@functools.cache
def cpu_op(name: str):
    """The C++ operation ``name``, loading its library on first use. Raises RuntimeError when it is not built or old."""
    from .extension import BUILD, load_cpu

    load_cpu()
    if not hasattr(torch.ops.unite_kernels_cpu, name):
        raise RuntimeError(f"_C_cpu.so is older than this code and has no {name}; run `{BUILD}`")
    return getattr(torch.ops.unite_kernels_cpu, name)


# --- registered operations, called directly ---------------------------------------------------------------------------
#
# torch's way through a registered operation and its gradient takes 100 us of a CPU, several times what the C++ takes on
# a small model. Where nothing looks at what is registered (the compiler, fake tensors, a dispatch mode), C++ is called
# as it stands, with an autograd.Function of the same gradient.


def _unobserved(inputs: tuple) -> bool:
    """Whether a call with these inputs, the last of which is the backend, may go past the registered operation."""
    if torch.compiler.is_compiling() or inputs[-1] != "cpp" or torch._C._len_torch_dispatch_stack():
        return False
    return type(inputs[0]) in (Tensor, torch.nn.Parameter)


def direct(op: Callable) -> Callable:
    """``op`` of torch.library.custom_op, whose last argument is the backend, as a function without gradients."""
    body = op._init_fn  # type: ignore[attr-defined]
    return lambda *inputs: body(*inputs) if _unobserved(inputs) else op(*inputs)


def differentiable(op: Callable, setup: Callable, backward: Callable) -> Callable:
    """As ``direct``, with a gradient: ``setup`` and ``backward`` as of ``register_autograd``, which is called here."""
    op.register_autograd(backward, setup_context=setup)  # type: ignore[attr-defined]
    body = op._init_fn  # type: ignore[attr-defined]

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(*inputs):
            return body(*inputs)

        @staticmethod
        def setup_context(ctx, inputs, output):
            setup(ctx, inputs, output)

        @staticmethod
        def backward(ctx, *gradients):
            return backward(ctx, *gradients)

    return lambda *inputs: Direct.apply(*inputs) if _unobserved(inputs) else op(*inputs)


def check_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, not {tensor.dtype}")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, not {tuple(tensor.shape)}")


def check_contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous: call .contiguous() on it")


def check_rows(name: str, tensor: Tensor) -> None:
    """Rows may be apart (a chunk of a wider matrix), but a row's elements must be adjacent."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
        raise ValueError(f"{name} must have adjacent elements in its last dimension, not stride {tensor.stride(-1)}")
