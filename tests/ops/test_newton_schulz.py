"""Newton-Schulz: torch.optim.Muon's bits in the plain form, float64 truth in every form."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from checking import DEVICE
from torch.optim._muon import _zeropower_via_newtonschulz as muon_reference

from unite_kernels import newton_schulz as forms
from unite_kernels.newton_schulz import COEFFICIENTS, newton_schulz

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


def by(form: str, g: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """``newton_schulz`` in one form, whatever the sizes."""
    with mock.patch.object(forms, "form_of", return_value=getattr(forms, form)):
        return newton_schulz(g, dtype=dtype)


@pytest.mark.skipif(DEVICE == "cuda", reason="there a batched product is another kernel, with another order of sums")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["_plain", "_separate"])
def test_form_has_the_bits_of_torch_muon(shape, form):
    g = matrices(*shape)
    expected = torch.stack([muon_reference(m, COEFFICIENTS, 5, 1e-7) for m in g])
    assert torch.equal(by(form, g), expected)
    assert torch.equal(by(form, g[0]), expected[0])


@pytest.mark.skipif(DEVICE == "cuda", reason="elsewhere there is one form")
def test_the_form_that_sizes_choose_on_a_cpu():
    chosen = {
        ((2, 256, 300), torch.float32): "_separate",
        ((2, 256, 300), torch.bfloat16): "_separate",
        ((2, 256, 1024), torch.bfloat16): "_separate",
        ((2, 256, 1024), torch.float32): "_gram",
        ((2, 64, 192), torch.float32): "_gram",
        ((2, 64, 192), torch.bfloat16): "_plain",
        ((2, 64, 64), torch.float32): "_plain",
    }
    for (shape, dtype), form in chosen.items():
        assert forms.form_of(torch.empty(shape, dtype=dtype)) is getattr(forms, form), (shape, dtype)


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("shape", [*SHAPES, (2, 256, 300), (1, 500, 200)])
@pytest.mark.parametrize("form", ["_separate", "_gram"])
def test_float32_forms_agree_with_float64(shape, form):
    g = matrices(*shape)
    error = (by(form, g, torch.float32).double() - truth(g)).abs().max()
    plain = (by("_plain", g, torch.float32).double() - truth(g)).abs().max()
    assert error <= 2 * plain + 8 * 2**-24


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("form", ["_plain", "_separate"])
def test_bfloat16_error_is_no_larger_than_that_of_torch_muon(form):
    """The mean ratio over shapes and seeds; one matrix may be rounded 3 % worse or better by the order of its sums."""
    ratios = []
    for shape in SHAPES:
        for seed in range(3):
            g = matrices(*shape, seed)
            expected = truth(g)
            reference = torch.stack([muon_reference(m, COEFFICIENTS, 5, 1e-7) for m in g]).double()
            error = (by(form, g).double() - expected).norm()
            ratios.append((error / (reference - expected).norm()).item())
    assert sum(ratios) / len(ratios) <= 1.02, ratios


def test_zero_gradient_stays_zero():
    assert torch.equal(newton_schulz(torch.zeros(2, 4, 8, device=DEVICE)).cpu(), torch.zeros(2, 4, 8).bfloat16())


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="rows, cols"):
        newton_schulz(torch.zeros(2))
    with pytest.raises(TypeError, match="float32 or bfloat16"):
        newton_schulz(torch.zeros(2, 2), dtype=torch.float16)
