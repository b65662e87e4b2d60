"""The error budget of an operation: its values and every gradient against float64."""

from __future__ import annotations

import torch
from torch import Tensor

# Where the operations are tested, and which kernels run there. Cases are made on the CPU and moved.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("triton",) if DEVICE == "cuda" else ("triton", "cpp")


def on_device(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.to(DEVICE) for name, t in tensors.items()}


def values_and_gradients(call, tensors: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """Outputs and gradients by name, on DEVICE. Output gradients are fixed by a seed, in each output's dtype."""
    leaves = {n: t.detach().clone().requires_grad_(t.is_floating_point()) for n, t in on_device(tensors).items()}
    for name in ("cos", "sin"):
        if name in leaves:
            leaves[name].requires_grad_(False)
    outputs = call(leaves, backend)
    generator = torch.Generator().manual_seed(99)
    grads = [torch.randn(o.shape, generator=generator).bfloat16().to(o) for o in outputs]
    wanted = {name: t for name, t in leaves.items() if t.requires_grad}
    found = torch.autograd.grad(outputs, list(wanted.values()), grads)
    results = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    return results | {f"gradient of {name}": g for name, g in zip(wanted, found, strict=True)}


def check_budget(call, tensors: dict[str, Tensor], backend: str, truth_call=None) -> None:
    """error(kernel) <= 2 error(eager, same dtypes) + atol, both against float64. atol: 8 float32 roundings."""
    in_double = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
    truth = values_and_gradients(truth_call or call, in_double, "eager")
    eager = values_and_gradients(call, tensors, "eager")
    kernel = values_and_gradients(call, tensors, backend)
    assert kernel.keys() == eager.keys() == truth.keys()
    for name, true in truth.items():
        assert kernel[name].dtype == eager[name].dtype, name
        assert kernel[name].shape == eager[name].shape, name
        allowed = 2 * (eager[name].double() - true).abs().max() + 8 * 2**-24 * max(1.0, true.abs().max())
        error = (kernel[name].double() - true).abs().max()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"  # also false for NaN
