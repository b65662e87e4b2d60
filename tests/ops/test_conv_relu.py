"""Frozen convolutions with ReLU and pooling against torch's own, in their corners; the bytes they keep and move."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from checking import DEVICE
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from unite_kernels import conv_relu
from unite_kernels.conv_relu import conv_relu_stages, frozen

CHANNELS = ((3, 16, 8), (8, 24), (24, 136, 16))  # of each stage, in and out; 136 is more than a tile and no power of 2
BACKENDS = ("triton",) if DEVICE == "cuda" else ("eager", "triton")
SIZES = [(16, 8), (11, 14)]  # in the second, poolings lose a row


def parameters(dtype: torch.dtype) -> list[list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    stages = []
    for channels in CHANNELS:
        pairs = itertools.pairwise(channels)
        made = [(torch.randn(d, c, 3, 3, generator=generator) / (4.5 * c) ** 0.5, d) for c, d in pairs]
        stages.append([(w.to(DEVICE, dtype), torch.randn(d, generator=generator).to(DEVICE, dtype)) for w, d in made])
    return stages


def images(size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)


def plain(x: Tensor, stages: list[list[tuple[Tensor, Tensor]]]) -> list[Tensor]:
    """torch's operations, the bias apart, as torch adds it to cuDNN's result, which is rounded before."""
    maps = []
    for number, stage in enumerate(stages):
        x = F.max_pool2d(x, 2) if number else x
        for weight, bias in stage:
            x = (F.conv2d(x, weight, padding=1) + bias[:, None, None]).relu()
        maps.append(x)
    return maps


def results(size: tuple[int, int], dtype: torch.dtype, backend: str) -> list[Tensor]:
    """The maps and the input's gradient, of the same numbers in whatever dtype; backend: "plain" is torch's."""
    rounded = [[tuple(t.to(torch.bfloat16).to(dtype) for t in pair) for pair in stage] for stage in parameters(dtype)]
    x = images(size, torch.bfloat16).to(dtype).requires_grad_()
    if backend == "plain":
        maps = plain(x, rounded)
    else:
        maps = conv_relu_stages(x, [[frozen(*pair, dtype) for pair in stage] for stage in rounded], backend)
    generator = torch.Generator().manual_seed(2)
    gradients = [torch.randn(m.shape, generator=generator).bfloat16().to(m) for m in maps]
    return [*maps, *torch.autograd.grad(maps, x, gradients)]


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradient(size, backend):
    """float64 to its last digits (the kernels' arithmetic is float32); float32 as near to float64 as torch's own."""
    truth = results(size, torch.float64, "plain")
    for dtype in (torch.float64, torch.float32):
        found, own = (results(size, dtype, kind) for kind in (backend, "plain"))
        for true, ours, theirs in zip(truth, found, own, strict=True):
            digits = 2**-49 if dtype == torch.float64 and backend == "eager" else 2**-21
            allowed = 2 * (theirs.double() - true).abs().max() + digits * true.abs().max()
            assert (ours.double() - true).abs().max() <= allowed
            assert ours.dtype == dtype


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_differs_no_more_than_torch(backend):
    """On average: a pixel near zero, or two equal maxima, send a gradient elsewhere after any rounding."""
    truth = results(SIZES[0], torch.float64, "plain")
    found, own = (results(SIZES[0], torch.bfloat16, kind) for kind in (backend, "plain"))
    for true, ours, theirs in zip(truth, found, own, strict=True):
        assert (ours.double() - true).norm() <= 1.25 * (theirs.double() - true).norm() + 1e-3 * true.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_ties_and_nan_go_where_torch_sends_them(backend):
    """The gradient of equal maxima is the first's; a zero has none; NaN is passed on, and so is its gradient."""
    y = torch.tensor([[1.0, 1.0, 0.0, 2.0, 3.0], [1.0, 1.0, 2.0, 2.0, 3.0], [0.0, 0.0, -1.0, float("nan"), 5.0]])
    y = y[None, None].repeat(1, 8, 1, 1).to(DEVICE)  # 3 x 5: the last row and column are in no window
    expected = y.clone().requires_grad_()
    relu = (expected * 1.0).relu()
    pooled = F.max_pool2d(relu, 2)
    dmap, dpooled = torch.rand_like(relu), torch.rand_like(pooled)
    (dy,) = torch.autograd.grad([relu, pooled], expected, [dmap, dpooled])
    ours = y.clone(memory_format=torch.channels_last)
    bias = torch.zeros(8, device=DEVICE)
    found = conv_relu._relu_pool_fwd(ours, bias, backend)
    torch.testing.assert_close([ours, found], [relu.detach(), pooled.detach()], equal_nan=True, rtol=0, atol=0)
    gradient = conv_relu._relu_pool_bwd(ours, dmap, dpooled.contiguous(memory_format=torch.channels_last), backend)
    torch.testing.assert_close(gradient, dy, rtol=0, atol=0)
    bits = conv_relu._relu_finish(y.clone(memory_format=torch.channels_last), bias, True, backend)
    masked = dmap.clone(memory_format=torch.channels_last)
    conv_relu._relu_mask(masked, bits, backend)
    torch.testing.assert_close(masked, torch.where(y <= 0, 0.0, dmap), rtol=0, atol=0)


def test_bits_are_packed_in_order():
    on = torch.rand(4096, generator=torch.Generator().manual_seed(0)) < 0.5
    weights = 2 ** torch.arange(8)
    assert torch.equal(conv_relu.pack(on), (on.view(-1, 8) * weights).sum(1).to(torch.uint8))
    assert torch.equal(conv_relu.unpack(conv_relu.pack(on)), on)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_keeps_its_outputs_and_a_bit_of_all_else(backend):
    """Nothing where no gradient is wanted."""
    kept: dict[int, int] = {}
    inner = sum(2 * d * 16 * 8 >> 2 * i for i, channels in enumerate(CHANNELS) for d in channels[1:-1])

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    stages = [[frozen(*pair, torch.float32) for pair in stage] for stage in parameters(torch.float32)]
    x = images(SIZES[0], torch.float32)
    with saved_tensors_hooks(pack, lambda t: t):
        conv_relu_stages(x, stages, backend)
        assert not kept
        maps = conv_relu_stages(x.requires_grad_(), stages, backend)
    assert sum(kept.values()) == sum(m.nbytes for m in maps) + inner // 8


@pytest.mark.skipif(DEVICE == "cuda", reason="counts loads and stores in Triton's interpreter")
def test_bytes_moved():
    """Per element of y in bfloat16, the bias of 2 bytes aside, which every program reads again."""
    import importlib.util
    from pathlib import Path

    spec = importlib.util.spec_from_file_location(
        "bytes_moved", Path(__file__).resolve().parents[2] / "benchmarks/bytes.py"
    )
    counting = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(counting)
    y = torch.ones(2, 64, 16, 16, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    bias, n = torch.zeros(64, dtype=torch.bfloat16), y.numel()

    def moved(call) -> float:
        with counting.Counter() as counter:
            call()
        return counter.moved / n

    bits, pooled = conv_relu._relu_finish(y, bias, True, "triton"), conv_relu._relu_pool_fwd(y, bias, "triton")
    assert moved(lambda: conv_relu._relu_finish(y, bias, True, "triton")) == 4.125 + 2
    assert moved(lambda: conv_relu._relu_pool_fwd(y, bias, "triton")) == 4.5 + 2
    assert moved(lambda: conv_relu._relu_mask(y, bits, "triton")) == 4.125
    assert moved(lambda: conv_relu._relu_pool_bwd(y, y, pooled, "triton")) == 6.5
    assert moved(lambda: conv_relu._relu_pool_bwd(y, y, None, "triton")) == 6.0


def test_registered_operations():
    y = torch.randn(1, 8, 4, 4, device=DEVICE).contiguous(memory_format=torch.channels_last)
    bias = torch.ones(8, device=DEVICE)
    torch.library.opcheck(conv_relu._relu_finish, (y, bias, True, "triton"))
    torch.library.opcheck(conv_relu._relu_pool_fwd, (y, bias, "triton"))
    bits, pooled = conv_relu._relu_finish(y, bias, True, "triton"), conv_relu._relu_pool_fwd(y, bias, "triton")
    torch.library.opcheck(conv_relu._relu_mask, (y, bits, "triton"))
    torch.library.opcheck(conv_relu._relu_pool_bwd, (y, y, pooled, "triton"))


def test_bad_input_is_named():
    weight, bias = torch.zeros(8, 3, 3, 3, device=DEVICE), torch.zeros(8, device=DEVICE)
    stages = [[frozen(weight, bias, torch.float32)]]
    x = torch.zeros(1, 3, 4, 4, device=DEVICE)
    with pytest.raises(ValueError, match="multiple of 8"):
        frozen(weight[:7], bias[:7], torch.float32)
    with pytest.raises(ValueError, match="bias must have shape"):
        frozen(weight, bias[:4], torch.float32)
    with pytest.raises(ValueError, match=r"x must have shape \(B, 3, H, W\)"):
        conv_relu_stages(x[:, :2], stages)
    with pytest.raises(TypeError, match="as the weights are"):
        conv_relu_stages(x.double(), stages)
    with pytest.raises(ValueError, match="2 poolings leave nothing of 3 x 4"):
        conv_relu_stages(x[:, :, :3], stages * 3)
    with pytest.raises(ValueError, match="no backend 'cpp'"):
        conv_relu_stages(x, stages, "cpp")
    with pytest.raises(ValueError, match="at least one"):
        conv_relu_stages(x, [[]])
