"""Attention by large products on CPUs: what tests/test_attention.py, which holds it to float64, does not reach."""

from __future__ import annotations

import pytest
import torch

from unite_kernels import attention as module
from unite_kernels.attention import attention

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for CPUs")


def inputs(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 3, 5, 16), (2, 3, 7, 16), (2, 3, 7, 16)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def gradients(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    y = attention(*tensors)
    return [y, *torch.autograd.grad(y.float().square().sum(), tensors)]


@pytest.mark.parametrize("heads", [1, 4, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_may_pass_a_few_at_a_time(monkeypatch, heads, dtype):
    """Their number, of which 4 leaves a rest of 2, changes nothing."""
    whole = gradients(inputs(dtype))
    monkeypatch.setattr(module, "BUFFER", heads * 5 * 7 * dtype.itemsize)
    for a, b in zip(gradients(inputs(dtype)), whole, strict=True):
        torch.testing.assert_close(a, b)


def test_large_scores():
    """Scores of thousands, whose exponentials would overflow."""
    q, k, v = inputs()
    tensors = [(100 * q).detach().requires_grad_(), (100 * k).detach().requires_grad_(), v]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    expected = torch.nn.functional.scaled_dot_product_attention(*exact)
    expected = [expected, *torch.autograd.grad(expected.square().sum(), exact)]
    for a, b in zip(gradients(tensors), expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4)


def test_registered_op():
    torch.library.opcheck(module._attention_fwd, tuple(inputs()))


def test_bad_input_is_named():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="v must have shape"):
        attention(q, k, v[:, :, :3])
    with pytest.raises(TypeError, match="k must be float32 or bfloat16 and have the dtype of q"):
        attention(q, k.bfloat16(), v)
    with pytest.raises(ValueError, match="q must have shape"):
        attention(q[0], k, v)
