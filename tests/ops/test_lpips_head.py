"""The LPIPS head against float64, against the lpips package's normalisation, and in its corners."""

from __future__ import annotations

import pytest
import torch
from checking import BACKENDS, DEVICE, check_budget

from unite_kernels import lpips_head

CHANNELS = (8, 63, 130)


def maps(batch: int, dtype: torch.dtype, layout: torch.memory_format) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    tensors = {}
    for i, channels in enumerate(CHANNELS):
        for side in "ab":
            f = torch.randn(batch, channels, 5 + i, 3, generator=generator).relu() + 0.01
            tensors[f"{side}{i}"] = f.to(DEVICE, dtype).contiguous(memory_format=layout)
    return tensors


WEIGHTS = [torch.rand(c, generator=torch.Generator().manual_seed(c)).to(DEVICE) for c in CHANNELS]


def call(t: dict[str, torch.Tensor], backend: str) -> tuple[torch.Tensor]:
    first, second = ([t[f"{side}{i}"] for i in range(len(CHANNELS))] for side in "ab")
    return (lpips_head.lpips_head(first, second, WEIGHTS, backend),)


def in_double(t: dict[str, torch.Tensor], _backend: str) -> tuple[torch.Tensor]:
    total = 0.0
    for i, weight in enumerate(WEIGHTS):
        u0, u1 = (f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10) for f in (t[f"a{i}"], t[f"b{i}"]))
        total = total + ((u0 - u1).square() * weight.double()[:, None, None]).sum(1).mean((1, 2))
    return (total,)


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients(batch, dtype, layout, backend):
    check_budget(call, maps(batch, dtype, layout), backend, in_double)


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_the_second_maps_alone(backend):
    t = maps(2, torch.float32, torch.channels_last)
    for name in t:
        t[name].requires_grad_(name.startswith("b"))
    wanted = [t[f"b{i}"] for i in range(3)]
    found, expected = (torch.autograd.grad(call(t, kind)[0].sum(), wanted) for kind in (backend, "eager"))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_position_of_zeros_has_finite_gradients(backend):
    f0 = torch.zeros(1, 4, 2, 2, device=DEVICE, requires_grad=True)
    f1 = torch.rand(1, 4, 2, 2, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()
    grads = torch.autograd.grad(
        lpips_head.lpips_head([f0], [f1], [torch.ones(4, device=DEVICE)], backend).sum(), (f0, f1)
    )
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_registered_op_and_compilation(backend):
    t = maps(1, torch.float32, torch.channels_last)
    tensors = t["a0"].requires_grad_(), t["b0"].requires_grad_(), WEIGHTS[0]
    torch.library.opcheck(lpips_head._lpips_head_fwd, (*tensors, backend))
    compiled = torch.compile(lambda t: call(t, backend)[0], backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(t), call(t, backend)[0])


def test_bad_input_is_named():
    f, ones = torch.zeros(1, 4, 2, 2, device=DEVICE), torch.ones(4, device=DEVICE)
    with pytest.raises(ValueError, match="equally many"):
        lpips_head.lpips_head([f], [f], [])
    with pytest.raises(ValueError, match="second features must have shape"):
        lpips_head.lpips_head([f], [f[:, :3]], [ones], "triton")
    with pytest.raises(ValueError, match="frozen"):
        lpips_head.lpips_head([f], [f], [ones.clone().requires_grad_()], "triton")
