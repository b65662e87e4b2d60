"""Linear layers from low-precision copies: products and gradients against float64, with padding and without."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from checking import DEVICE
from torch import Tensor

from unite_kernels.copied_linear import (
    half_linear,
    own_part,
    padded_shape,
    quantise,
    scaled_linear,
    with_weight_gradient,
    write_scaled_,
)

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
OLD_CPU = DEVICE == "cpu" and tuple(int(x) for x in torch.__version__.split(".")[:2]) < (2, 13)
ROWWISE = pytest.param(True, marks=pytest.mark.skipif(OLD_CPU, reason="a scale per row on CPUs needs torch 2.13"))


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("magnitude", [1e-12, 1.0, 1e8])
def test_quantised_values_come_back(dtype, per_row, magnitude):
    x = torch.randn(9, 33, generator=torch.Generator().manual_seed(0)) * magnitude
    x[4] *= 1e-3
    values, factors = quantise(x, dtype, per_row)
    assert values.dtype == dtype
    assert factors.shape == ((9, 1) if per_row else ())
    step = 2.0 ** -(4 if dtype == E4M3 else 3)  # half the distance of neighbours, relative
    floor = torch.finfo(dtype).smallest_normal * factors  # below it the distance is absolute
    assert ((values.float() * factors - x).abs() <= step * x.abs() + floor).all()
    largest = x.abs().amax(1, keepdim=True) if per_row else x.abs().amax()
    torch.testing.assert_close(factors * torch.finfo(dtype).max, largest, rtol=1e-6, atol=0)


def test_quantising_nothing_and_what_is_not_finite():
    values, factors = quantise(torch.zeros(4, 4), E4M3)
    assert (values.float() * factors == 0).all()
    for bad in (torch.inf, torch.nan):
        x = torch.ones(4, 4)
        x[1, 2] = bad
        values, factors = quantise(x, E4M3)
        assert (values.float() * factors).isnan().all()
        values, factors = quantise(x, E5M2, per_row=True)
        assert (values.float() * factors).isnan().any(1).tolist() == [False, True, False, False]


def layer(k: int, n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(k + n)
    weight = torch.randn(n, k, generator=generator) / k**0.5
    return weight.to(DEVICE).requires_grad_(), torch.randn(n, generator=generator).to(DEVICE).requires_grad_()


def copies_of(weight: Tensor, per_row: bool, shape=None, groups: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, k = shape or weight.shape
    made = (
        torch.empty(n, k, dtype=E4M3, device=DEVICE),
        torch.full((n, 1) if per_row else (), torch.nan, device=DEVICE),
        torch.empty(k, n, dtype=E4M3, device=DEVICE),
        torch.full((k, 1) if per_row else (), torch.nan, device=DEVICE),
    )
    write_scaled_(weight.detach(), *made, groups)
    return made


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Relative distances."""
    return [float((a.double() - b).norm().detach() / b.norm().detach()) for a, b in zip(found, exact, strict=True)]


def with_gradients(y: Tensor, dy: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def setting(k: int, n: int, rows: tuple[int, ...]):
    """x, weight, bias, dy, and the float64 output and gradients for it."""
    weight, bias = layer(k, n)
    x = torch.randn(*rows, k, generator=torch.Generator().manual_seed(2)).to(DEVICE).requires_grad_()
    dy = torch.randn(*rows, n, generator=torch.Generator().manual_seed(3)).to(DEVICE) * 1e-6
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    return x, weight, bias, dy, with_gradients(F.linear(*exact), dy.double(), *exact)


@pytest.mark.parametrize(("k", "n", "rows"), [(32, 96, (3, 5)), (48, 64, (17,)), (64, 80, (2, 3, 7))])
def test_half_linear(k, n, rows):
    """At most the error of autocast's linear layer, and a weight gradient in float32."""
    x, weight, bias, dy, exact = setting(k, n, rows)
    copy, bias_copy = weight.detach().bfloat16(), bias.detach().bfloat16()
    ours = with_gradients(half_linear(x, weight, bias, copy, bias_copy, (0, n)), dy, x, weight, bias)
    with torch.autocast(DEVICE, torch.bfloat16):
        theirs = with_gradients(F.linear(x, weight, bias), dy, x, weight, bias)
    assert [t.dtype for t in ours] == [torch.bfloat16, torch.float32, torch.float32, torch.float32]
    for a, b in zip(errors(ours, exact), errors(theirs, exact), strict=True):
        assert a <= 1.2 * b
    y = half_linear(x, weight, None, copy, None, (0, n))
    torch.testing.assert_close(y, F.linear(x.bfloat16(), copy))


@pytest.mark.parametrize("per_row", [False, ROWWISE])
@pytest.mark.parametrize(("k", "n", "rows"), [(32, 96, (3, 5)), (48, 64, (17,)), (128, 256, (2, 3, 7))])
def test_scaled_linear(k, n, rows, per_row):
    x, weight, bias, dy, exact = setting(k, n, rows)
    copies, bias_copy = copies_of(weight, per_row), bias.detach().bfloat16()
    y = scaled_linear(x, weight, bias, copies, bias_copy, (0, n))
    assert y.is_contiguous()
    ours = with_gradients(y, dy, x, weight, bias)
    assert [t.dtype for t in ours] == [torch.bfloat16, torch.float32, torch.float32, torch.float32]
    y, dx, dweight, dbias = errors(ours, exact)
    assert y < 0.05  # two operands of 4 bits
    assert 0.005 < dx < (0.05 if per_row else 0.08)  # in float8: 3 bits of dy with one scale
    assert dweight < 0.006  # in bfloat16
    assert dbias < 0.006
    y = scaled_linear(x, weight, None, copies, None, (0, n))
    assert errors([y], [F.linear(x, weight).double()])[0] < 0.05


@pytest.mark.parametrize("kind", ["half", "tensor", pytest.param("row", marks=ROWWISE.marks)])
@pytest.mark.parametrize("wanted", [(0, 32), (32, 96), (16, 48)])
def test_some_of_the_columns(kind, wanted):
    """As the last block asks for them: queries of a few rows, then keys and values of all. The rest of dW is zero."""
    where = slice(*wanted)
    x, weight, bias, dy, _ = setting(32, 96, (3, 5))
    bias = bias.detach()[where].clone().requires_grad_()
    bias_copy = bias.detach().bfloat16()
    if kind == "half":
        y = half_linear(x, weight, bias, weight.detach().bfloat16(), bias_copy, wanted)
    else:
        y = scaled_linear(x, weight, bias, copies_of(weight, kind == "row"), bias_copy, wanted)
    assert y.is_contiguous()
    found = with_gradients(y, dy[..., where], x, weight, bias)
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    expected = with_gradients(F.linear(exact[0], exact[1][where], exact[2]), dy[..., where].double(), *exact)
    assert max(errors(found, expected)) < (0.01 if kind == "half" else 0.08)
    others = torch.ones(96, dtype=torch.bool, device=DEVICE)
    others[where] = False
    assert (found[2][others] == 0).all()


@pytest.mark.parametrize("kind", ["half", "tensor", pytest.param("row", marks=ROWWISE.marks)])
@pytest.mark.parametrize("groups", [1, 2])
def test_padded_copies(kind, groups):
    """42 rows in groups and 33 columns, both padded: the own part of y and of every gradient as without padding."""
    x, weight, bias, dy, exact = setting(33, 42, (3, 5))
    shape = padded_shape(weight.shape, groups, columns=True)
    assert shape == ({1: 48, 2: 64}[groups], 48)
    bias_copy = bias.detach().new_zeros(shape[0]).bfloat16()
    own_part(bias_copy, bias.shape, groups).copy_(bias.detach().unflatten(0, (groups, -1)))
    wide = F.pad(x, (0, 15))
    if kind == "half":
        copy = weight.detach().new_zeros(shape).bfloat16()
        own_part(copy, weight.shape, groups).copy_(weight.detach().unflatten(0, (groups, -1)))
        y = half_linear(wide, weight, bias, copy, bias_copy, (0, shape[0]), groups)
    else:
        copies = copies_of(weight, kind == "row", shape, groups)
        y = scaled_linear(wide, weight, bias, copies, bias_copy, (0, shape[0]), groups)
    halves = y.unflatten(-1, (groups, -1))
    assert (halves[..., 42 // groups :] == 0).all()
    found = with_gradients(halves[..., : 42 // groups].flatten(-2), dy, x, weight, bias)
    assert [t.shape for t in found] == [t.shape for t in exact]
    assert max(errors(found, exact)) < (0.01 if kind == "half" else 0.08)


def test_scaled_gradients_below_the_range_of_half_precision():
    """A gradient of 1e-12, as a mean over many pixels gives, is not lost: its scale comes from its own values."""
    x, weight, bias, dy, exact = setting(64, 64, (5,))
    y = scaled_linear(x, weight, bias, copies_of(weight, False), bias.detach().bfloat16(), (0, 64))
    _, dx, dweight, _ = with_gradients(y, dy * 1e-12, x, weight, bias)
    scaled = [exact[1] * 1e-12, exact[2] * 1e-12]
    assert max(errors([dx, dweight], scaled)) < 0.08


@pytest.mark.parametrize("kind", ["half", "tensor", pytest.param("row", marks=ROWWISE.marks)])
def test_compiled_in_one_graph(kind):
    x, weight, bias, dy, _ = setting(32, 96, (3, 5))
    bias_copy = bias.detach().bfloat16()
    copies = copies_of(weight, kind == "row")

    def call(x: Tensor) -> Tensor:
        if kind == "half":
            return half_linear(x, weight, bias, weight.detach().bfloat16(), bias_copy, (0, 96))
        return scaled_linear(x, weight, bias, copies, bias_copy, (0, 96))

    eager = with_gradients(call(x), dy, x, weight, bias)
    torch._dynamo.reset()
    compiled = with_gradients(torch.compile(call, backend="aot_eager", fullgraph=True)(x), dy, x, weight, bias)
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2 * float(b.detach().abs().max()))


def test_weight_gradient_beside_another_product():
    """What Transformer Engine's layers get: their own output and input gradient, our weight gradient."""
    x, weight, bias, dy, exact = setting(32, 48, (3, 5))
    half = x.bfloat16()
    y = F.linear(half, weight.detach().bfloat16(), bias.detach().bfloat16())
    ours = with_gradients(with_weight_gradient(y, half, weight, bias), dy, x, weight, bias)
    assert max(errors(ours, exact)) < 0.01
