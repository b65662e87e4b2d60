"""A linear layer in two parts: against float64, in every way that the model calls it."""

from __future__ import annotations

import pytest
import torch
from checking import DEVICE, check_budget
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from unite_kernels.split_linear import split_linear, split_linear_eager


def tensors(dtype: torch.dtype = torch.float32, rows: tuple[int, ...] = (3, 5)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (*rows, 24), "weight": (66, 24), "bias": (22,)}
    return {name: torch.randn(s, generator=generator).to(DEVICE, dtype) for name, s in shapes.items()}


def call(t: dict[str, torch.Tensor], backend: str = "fused") -> tuple[torch.Tensor, torch.Tensor]:
    return (split_linear_eager if backend == "eager" else split_linear)(t["x"], t["weight"], t["bias"], 44)


def gradients(outputs, t: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Gradients of x, weight and bias for fixed, strided gradients of the two outputs."""
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(o.shape[::-1], generator=generator).to(o).permute(*reversed(range(o.ndim))) for o in outputs]
    return torch.autograd.grad(outputs, list(t.values()), grads)


def leaves(**options) -> dict[str, torch.Tensor]:
    return {name: value.requires_grad_() for name, value in tensors(**options).items()}


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [(3, 5), (1, 1), (7,)])
def test_values_and_gradients(dtype, rows):
    check_budget(call, tensors(dtype, rows), "fused")


@pytest.mark.usefixtures("nan_filled")
def test_autocast_gives_its_dtype_and_full_precision_gradients():
    t = leaves()
    exact = gradients(call({name: value.double() for name, value in t.items()}, "eager"), t)
    with torch.autocast(DEVICE, torch.bfloat16):
        outputs, eager = call(t), call(t, "eager")
    assert [o.dtype for o in outputs] == [torch.bfloat16] * 2
    assert all(torch.equal(a, b) for a, b in zip(outputs, eager, strict=True))
    for found, reference, truth in zip(gradients(outputs, t), gradients(eager, t), exact, strict=True):
        assert found.dtype == torch.float32
        assert (found - truth).abs().max() <= 2 * (reference - truth).abs().max()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiles_without_graph_breaks_and_under_checkpointing(autocast, checkpointed):
    def run(t):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            return checkpoint(call, t, use_reentrant=False) if checkpointed else call(t)

    t = leaves()
    torch._dynamo.reset()
    found, expected = torch.compile(run, backend="aot_eager", fullgraph=True)(t), call_plainly(t, autocast)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(gradients(found, t), gradients(expected, t), strict=True))


def call_plainly(t: dict[str, torch.Tensor], autocast: bool):
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        return call(t)


def test_backward_adds_nothing_up():
    """Two products for dx, two for dW, one sum for db: no zero-padded slices, no additions of whole gradients."""
    seen = []

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    t = leaves()
    first, rest = call(t)
    dfirst, drest = torch.ones_like(first), torch.ones_like(rest)
    with Operations():
        torch.autograd.grad((first, rest), list(t.values()), (dfirst, drest))
    views = ("view", "slice", "t", "transpose", "permute", "detach", "empty_like", "new_empty")
    assert sorted(name for name in seen if name not in views) == ["addmm", "mm", "mm", "mm", "sum"]


def test_a_frozen_layer_has_the_gradient_of_x_alone():
    t = tensors()
    outputs = call(t | {"x": t["x"].requires_grad_()})
    (dx,) = torch.autograd.grad(outputs, t["x"], [torch.ones_like(o) for o in outputs])
    expected = t["weight"].sum(0).expand_as(dx)
    torch.testing.assert_close(dx.detach(), expected)


def test_bad_input_is_named():
    x, weight, bias = tensors().values()
    with pytest.raises(ValueError, match="must have shapes"):
        split_linear(x, weight.T, bias, 4)
    with pytest.raises(ValueError, match="split must be between 1 and 65"):
        split_linear(x, weight, bias, 66)
    with pytest.raises(ValueError, match=r"bias must have shape \(62,\), not \(22,\)"):
        split_linear(x, weight, bias, 4)
    with pytest.raises(TypeError, match="one dtype"):
        split_linear(x.bfloat16(), weight, bias, 44)
