"""Newton-Schulz: torch.optim.Muon's bits in the plain form, float64 truth in every form."""

from __future__ import annotations

import pytest
import torch
from checking import DEVICE
from torch.optim._muon import _zeropower_via_newtonschulz as muon_reference

from unite_kernels.launches import launch_of
from unite_kernels.newton_schulz import COEFFICIENTS, OPS, newton_schulz, symmetric_product

SHAPES = [(1, 16, 64), (3, 64, 16), (2, 63, 199), (1, 130, 70), (2, 3, 5)]


def matrices(batch: int, rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, rows, cols, generator=torch.Generator().manual_seed(rows + 1000 * seed)).to(DEVICE)


def truth(g: torch.Tensor, steps: int = 5) -> torch.Tensor:
    a, b, c = COEFFICIENTS
    x = g.double()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


@pytest.mark.skipif(DEVICE == "cuda", reason="there a batched product is another kernel, with another order of sums")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["plain", "separate"])
def test_form_has_the_bits_of_torch_muon(shape, method):
    g = matrices(*shape)
    expected = torch.stack([muon_reference(m, COEFFICIENTS, 5, 1e-7) for m in g])
    assert torch.equal(newton_schulz(g, method=method), expected)
    assert torch.equal(newton_schulz(g[0], method=method), expected[0])


@pytest.mark.skipif(DEVICE == "cuda", reason="the form is for CPUs")
@pytest.mark.parametrize("shape", [(2, 256, 300), (1, 500, 200)])
def test_large_matrices_on_a_cpu_are_taken_one_by_one(shape):
    g = matrices(*shape)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(newton_schulz(g, dtype=dtype), newton_schulz(g, dtype=dtype, method="separate"))
    error = (newton_schulz(g, dtype=torch.float32).double() - truth(g)).abs().max()
    plain = (newton_schulz(g, dtype=torch.float32, method="plain").double() - truth(g)).abs().max()
    assert error <= 2 * plain + 8 * 2**-24


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["plain", "separate", "symmetric", "gram"])
def test_float32_forms_agree_with_float64(shape, method):
    g = matrices(*shape)
    error = (newton_schulz(g, dtype=torch.float32, method=method).double() - truth(g)).abs().max()
    plain = (newton_schulz(g, dtype=torch.float32, method="plain").double() - truth(g)).abs().max()
    assert error <= 2 * plain + 8 * 2**-24


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("method", ["plain", "separate", "symmetric", "gram"])
def test_bfloat16_error_is_no_larger_than_that_of_torch_muon(method):
    """The mean ratio over shapes and seeds; one matrix may be rounded 3 % worse or better by the order of its sums."""
    ratios = []
    for shape in SHAPES:
        for seed in range(3):
            g = matrices(*shape, seed)
            expected = truth(g)
            reference = torch.stack([muon_reference(m, COEFFICIENTS, 5, 1e-7) for m in g]).double()
            error = (newton_schulz(g, method=method).double() - expected).norm()
            ratios.append((error / (reference - expected).norm()).item())
    assert sum(ratios) / len(ratios) <= 1.02, ratios


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [5, 64, 200, 300])
def test_symmetric_product(dtype, n):
    x = matrices(2, n, 37).to(dtype)
    addend = torch.bmm(x, x.mT)
    addend = (addend + addend.mT) / 2
    found = symmetric_product(x, addend, alpha=0.5, beta=-2.0)
    tile = torch.arange(n, device=DEVICE) // launch_of(OPS[dtype], "forward", n, x.device).columns
    mirrored = tile[:, None] != tile[None, :]  # inside a tile of the diagonal the order of summation may differ
    assert torch.equal(found[:, mirrored], found.mT[:, mirrored])
    exact = 0.5 * x.double() @ x.double().mT - 2.0 * addend.double()
    eager = torch.baddbmm(addend, x, x.mT, beta=-2.0, alpha=0.5)
    error, allowed = (found - exact).abs().max(), 2 * (eager - exact).abs().max() + 8 * 2**-24 * exact.abs().max()
    assert error <= allowed


def test_registered_op():
    from unite_kernels.newton_schulz import _symmetric_product

    torch.library.opcheck(_symmetric_product, (matrices(2, 9, 5), None, 1.0, 0.0))


def test_zero_gradient_stays_zero():
    assert torch.equal(newton_schulz(torch.zeros(2, 4, 8, device=DEVICE)).cpu(), torch.zeros(2, 4, 8).bfloat16())


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="unknown method 'fast'"):
        newton_schulz(torch.zeros(2, 2), method="fast")
    with pytest.raises(ValueError, match="rows, cols"):
        newton_schulz(torch.zeros(2))
    with pytest.raises(TypeError, match="float32 or bfloat16"):
        newton_schulz(torch.zeros(2, 2), dtype=torch.float16)
