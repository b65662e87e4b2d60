"""A machine that seems to have an H100, whose tensors have no data: what can be proven of it without one.

Fake tensors have a device and no data. A program on them raises when it mixes devices or reads a value back; here it
also raises when any operation meets a tensor of the CPU, which would be copied, with a wait, at every step. The
registered operations run their own code for GPUs up to the launch, whose arguments Triton compiles for sm_90 with the
specialisation that it would choose there; what they return has to look as their fake says.

Replaced, because only a GPU could answer: torch.cuda's properties, torch's choice of attention and convolutions, the
C++ updates of the optimizer (their checks are repeated), and autograd's engine, which wants a stream of the device.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar
from unittest import mock

import check_kernels  # first: it switches Triton's interpreter off
import graph_walk
import torch
import torch._inductor.config
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import scheduler
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import NoneAsConstantBuffer
from torch._library.custom_ops import OPDEFS
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import driver, jit

from unite_fast.layers import attention
from unite_kernels import multi_tensor

M = TypeVar("M", bound=torch.nn.Module)
DEVICE = torch.device("cuda", 0)
LARGEST_GRID = (2**31 - 1, 65535, 65535)


class OnTheGpu(TorchDispatchMode):
    """Raises at the first operation that meets a tensor of another device; registered operations run their own code."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.registered = self.graphs = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.operations += 1
        out = function(*args, **kwargs)
        if function.namespace == "unite_kernels":
            self.registered += 1
            said, out = out, OPDEFS[function._schema.name]._init_fn(*args, **kwargs)
            leaves = [[t for t in tree_leaves(x) if isinstance(t, Tensor)] for x in (said, out)]  # None: it only writes
            described = [[(t.shape, t.dtype, t.stride(), t.device) for t in tensors] for tensors in leaves]
            assert described[0] == described[1], f"{function}: its fake says {described[0]}, it gives {described[1]}"
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        devices = {t.device.type for t in tensors if t.numel()}  # of an empty one nothing is copied
        assert devices <= {"cuda"}, f"{function} meets tensors on {' and '.join(sorted(devices))}"
        return out


class Pointer:
    """A tensor as a launch sees it. Memory comes in blocks that are aligned to 512 bytes."""

    def __init__(self, tensor: Tensor) -> None:
        assert tensor.is_cuda
        self.dtype, self.place = tensor.dtype, tensor.storage_offset() * tensor.element_size()

    def data_ptr(self) -> int:
        return 1 << 20 | self.place

    def ptr_range(self) -> int:
        return 0


class Launches:
    """Stands in for ``JITFunction.run``: every launch is checked and compiled, and not done."""

    def __init__(self) -> None:
        self.run = jit.JITFunction.run
        self.count = 0
        self.scenario = ""
        self.kernels: dict[int, tuple[Any, dict[str, str]]] = {}

    def __call__(self, kernel: Any, *arguments: Any, grid: Sequence[int], warmup: bool, **options: Any) -> None:
        self.count += 1
        sizes = zip(grid, LARGEST_GRID, strict=False)
        assert all(0 < size <= most for size, most in sizes), f"{kernel.__name__}: grid {grid}"
        shown = [Pointer(a) if isinstance(a, Tensor) else a for a in arguments]
        compiled = self.run(kernel, *shown, grid=grid, warmup=True, **options)
        name = f"{kernel.__module__.split('.')[-1]}.{kernel.__name__}"
        self.kernels.setdefault(id(compiled), (compiled, {"name": name, "scenario": self.scenario}))

    def read(self) -> list[dict[str, Any]]:
        """Every compiled kernel: its name and sizes, which scenario wanted it first, what memory its code needs."""
        found = []
        for compiled, named in self.kernels.values():
            constants = [v for v in compiled.src.constants.values() if isinstance(v, int)]
            found.append(named | check_kernels.memory_of(compiled) | {"constants": constants})
        return found


class Updates:
    """Stands in for the C++ updates: the checks of csrc/cuda/multi_tensor.cu, and no update."""

    @staticmethod
    def check(model: Sequence[Tensor], *lists: Sequence[Tensor], updates: Sequence[Tensor] = ()) -> None:
        for group in (model, *lists, *([updates] if updates else [])):
            assert len(group) == len(model)
            for tensor, first in zip(group, model, strict=True):
                assert tensor.is_cuda
                assert tensor.is_contiguous()
                assert tensor.shape == first.shape
                half = group is updates and tensor.dtype == torch.bfloat16
                assert half or tensor.dtype == torch.float32, tensor.dtype

    def clip(self, tensors: Sequence[Tensor], most: float) -> tuple[Tensor, Tensor, Tensor]:
        self.check(tensors)
        new = tensors[0].new_empty
        return new(()), new(()), new((), dtype=torch.bool)

    def adamw_(self, params, grads, exp_avg, exp_avg_sq, step, lr, *rest) -> None:
        self.check(params, grads, exp_avg, exp_avg_sq, rest[6] or params)

    def muon_momentum_(self, grads, buffers, momentum, nesterov, coef, skip, out) -> None:
        self.check(grads, buffers, updates=out)

    def muon_apply_(self, params, updates, lr, scales, weight_decay, skip, ema, ema_decay) -> None:
        self.check(params, ema or params, updates=updates)

    def ema_(self, ema, params, weight, skip) -> None:
        self.check(ema, params)


def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """The kernel that torch would choose: cuDNN's in half precision, the memory-efficient one in float32."""
    wanted = torch.is_grad_enabled()
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
    if q.dtype == torch.float32:
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, wanted)[0]
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, attn_mask, wanted)[0]


def convolve(input: Tensor, *arguments: Any, **options: Any) -> torch._C._ConvBackend:
    """cuDNN's convolutions, and with them their layouts, which torch would not choose where cuDNN finds no device."""
    return torch._C._ConvBackend.Cudnn


@contextlib.contextmanager
def gpu(launches: Launches) -> Iterator[OnTheGpu]:
    """That machine, until the end of the block; what it gives is entered around what is to be watched."""
    driver.set_active(check_kernels.CompileOnly())
    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (fake_tensor, "init_gpu_context", lambda device: None),
            (torch.cuda, "device_of", lambda tensor: contextlib.nullcontext()),
            (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
            (torch.cuda, "get_device_properties", lambda device=None: PROPERTIES),
            (torch.cuda, "is_bf16_supported", lambda including_emulation=True: True),
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (Tensor, "backward", graph_walk.backward),
            (torch.autograd, "grad", graph_walk.grad),
            (attention, "trial", lambda *arguments: ""),
            (attention.F, "scaled_dot_product_attention", attend),
            (torch._C, "_select_conv_backend", convolve),
            (multi_tensor, "_compiled", lambda backend, tensors: None if backend == "eager" else Updates()),
            (jit.JITFunction, "run", lambda *arguments, **options: launches(*arguments, **options)),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(fake_tensor.FakeTensorMode())
        yield OnTheGpu()


def moved(module: M) -> M:
    """``module.to(DEVICE)``, which fake tensors do not allow; what is no parameter or buffer stays behind, as there."""

    def there(value: Tensor) -> Tensor:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=DEVICE)

    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                made = torch.nn.Parameter(there(value), value.requires_grad)
                vars(made).update(vars(value) | vars(made))  # with the optimizer's tags
                part._parameters[name] = made
        part._buffers.update({name: there(value) for name, value in part._buffers.items()})
    return module


# What Inductor and the launches read of an H100.
PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, L2_cache_size=50 << 20,
    shared_memory_per_multiprocessor=233472, shared_memory_per_block=49152, shared_memory_per_block_optin=232448,
)  # fmt: skip


@contextlib.contextmanager
def code_generator(modules: list[str]) -> Iterator[None]:
    """Within ``gpu``: torch.compile lowers and writes the code of every graph for CUDA, into ``modules``, and calling
    the graph gives new tensors. What would be tried out on a device (padding, folded constants) is switched off."""

    def keep(lowering: GraphLowering) -> types.SimpleNamespace:
        code = lowering.codegen()[0]
        modules.append(getattr(code, "value", code))
        outputs = list(lowering.graph_outputs)

        def made(output: Any) -> Tensor | None:
            if isinstance(output, NoneAsConstantBuffer):
                return None
            size, stride = ([int(n) for n in numbers] for numbers in (output.get_size(), output.get_stride()))
            return torch.empty_strided(size, stride, dtype=output.get_dtype(), device=DEVICE)

        def call(arguments: list[Tensor]) -> list[Tensor | None]:
            arguments.clear()
            return [made(output) for output in outputs]

        return types.SimpleNamespace(call=call, __file__="", __name__="generated")

    properties = staticmethod(lambda device=None: PROPERTIES)
    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (torch.cuda, "current_device", lambda: 0),
            (CudaInterface, "get_device_properties", properties),
            (CudaInterface, "is_bf16_supported", staticmethod(lambda including_emulation=False: True)),
            (CudaInterface, "get_compute_capability", staticmethod(lambda device=None: 90)),
            (CudaInterface, "exchange_device", staticmethod(lambda device: 0)),
            (CudaInterface, "maybe_exchange_device", staticmethod(lambda device: 0)),
            (CudaInterface.Worker, "get_device_properties", properties),
            (CudaInterface.Worker, "current_device", staticmethod(lambda: 0)),
            (scheduler, "has_triton", lambda: True),
            (GraphLowering, "compile_to_module", keep),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        quiet = {
            "shape_padding": False,
            "joint_graph_constant_folding": False,
            "force_disable_caches": True,
            "compile_threads": 1,  # with more, a process of torch 2.11 may hang at its end
        }
        stack.enter_context(torch._inductor.config.patch(quiet))
        yield
