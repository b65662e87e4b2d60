"""Noise injection and flow corruption: the kernels' bits, statistics, gradients and errors."""

from __future__ import annotations

import pytest
import torch
from checking import BACKENDS, DEVICE

from unite_kernels import corruption, philox

SAMPLES = torch.tensor([0, 3, 2**33 + 5, 77, 1000])
SEED = 2**40 + 3
# The reference draws on the CPU, also when a GPU's bits are compared with it.


def place(backend: str) -> str:
    return "cpu" if backend in ("eager", "cpp") else DEVICE


def latents(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def flow(z, samples, law, backend, steps=3):
    z, labels, samples = (t.to(place(backend)) for t in (z, torch.arange(len(z)), samples))
    found = corruption.flow_corruption(z, labels, samples, SEED, steps, law, -0.3, 1.2, 0.5, 0.4, 1000, backend)
    return tuple(t.cpu() for t in found)


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("law", corruption.LAWS)
@pytest.mark.parametrize("shape", [(5, 7, 9), (1, 63), (3, 17, 32), (2, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_flow_corruption_has_the_reference_bits(law, shape, backend):
    z = latents(*shape)
    samples = SAMPLES[: len(z)]
    for found, expected in zip(flow(z, samples, law, backend), flow(z, samples, law, "eager"), strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("shape", [(5, 7, 9), (1, 63), (3, 17, 32)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_injection_has_the_reference_bits_and_gradient(shape, backend):
    results = []
    for kind in ("eager", backend):
        z = latents(*shape).requires_grad_()
        out = corruption.noise_injection(
            z.to(place(kind)), SAMPLES[: len(z)].to(place(kind)), 5, 0.5, 0.7, 1.0, kind
        ).cpu()
        results.append((out, *torch.autograd.grad(out, z, torch.ones_like(out))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("shape", [(7, 9), (63,), (17, 32), (), (1,)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_tokenizer_draws_have_the_reference_bits(shape, backend):
    found = corruption.draw_tokenizer(SEED, SAMPLES.to(place(backend)), shape, 0.7, backend)
    for ours, expected in zip(found, corruption.draw_tokenizer(SEED, SAMPLES, shape, 0.7), strict=True):
        assert torch.equal(ours.cpu(), expected)


@pytest.mark.parametrize("backend", [*BACKENDS, "eager"])
def test_numbers_do_not_depend_on_the_batch_split(backend):
    z = latents(5, 7, 9)
    whole = flow(z, SAMPLES, "logit_normal", backend)
    parts = [flow(z[i : i + 1], SAMPLES[i : i + 1], "logit_normal", backend) for i in range(5)]
    assert torch.equal(whole[0], torch.cat([p[0] for p in parts], 1))
    assert torch.equal(whole[1], torch.cat([p[1] for p in parts], 1))
    fewer = flow(z, SAMPLES, "logit_normal", backend, steps=2)
    assert torch.equal(whole[0][:2], fewer[0])


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_stream_numbers_are_all_different(kind):
    """Two kinds of draw, or two flow steps, never share their numbers."""
    numbers = {k: v for k, v in vars(corruption).items() if k.isupper() and isinstance(v, int)}
    kinds = [v for k, v in numbers.items() if k != "STREAMS_PER_STEP"]
    assert sorted(kinds) == list(range(8))
    draw = getattr(philox, kind)
    rows = torch.stack([draw(1, 16 * step + k, SAMPLES, (4,)).flatten() for step in range(3) for k in kinds])
    assert len(rows.unique(dim=0)) == len(rows)


def test_draws_follow_their_laws():
    samples = torch.arange(4000)
    t, noise, dropped = corruption.draw_flow(1, samples, 2, (4,), "logit_normal", 0.0, 1.0, 0.5, 0.1)
    s = t / (0.5 + 0.5 * t)  # undo the shift t = a s / (1 + (a - 1) s), a = 1/2
    logits = torch.log(s / (1 - s))
    assert logits.mean().abs() < 5 / 8000**0.5
    assert (logits.std() - 1).abs() < 5 / 8000**0.5
    assert (dropped.float().mean() - 0.1).abs() < 5 * 0.3 / 8000**0.5
    assert (noise.std() - 1).abs() < 0.03
    mask, t, _ = corruption.draw_noising(1, samples, (1,), 0.5, 0.7, 1.0)
    assert (mask.float().mean() - 0.5).abs() < 5 * 0.5 / 4000**0.5
    assert t.min() >= 0.7
    assert t.max() <= 1.0
    assert (t.mean() - 0.85).abs() < 5 * 0.0866 / 4000**0.5


def test_blend_takes_given_noise():
    z, noise, t = latents(2, 3), torch.ones(4, 2, 3), torch.tensor([[0.0, 1.0]] * 4)
    out = corruption.blend(z, t, noise)
    assert torch.equal(out[0, 0], noise[0, 0])
    assert torch.equal(out[3, 1], z[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_registered_ops(backend):
    z, samples = latents(2, 12).to(DEVICE), SAMPLES[:2].to(DEVICE)
    torch.library.opcheck(corruption._noise_injection, (z.requires_grad_(), samples, 5, 0.5, 0.7, 1.0, backend))
    torch.library.opcheck(corruption._tokenizer_draws, (samples, 5, 12, 0.7, backend))
    flow_arguments = (z.detach(), samples, samples, 5, 2, False, 0.0, 1.0, 0.5, 0.1, 10, backend)
    torch.library.opcheck(corruption._flow_corruption, flow_arguments)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("kind", ["uniform", "normal", "logistic"])
def test_the_reference_has_the_same_bits_on_a_gpu(kind):
    if kind == "logistic":
        cpu, gpu = (philox.logistic(latents(999).to(d) * 5) for d in ("cpu", DEVICE))
    else:
        cpu, gpu = (getattr(philox, kind)(SEED, 4, SAMPLES.to(d), (63,)) for d in ("cpu", DEVICE))
    assert torch.equal(cpu, gpu.cpu())


def test_bad_input_is_named():
    z = latents(2, 4)
    with pytest.raises(ValueError, match="unknown time law 'cosine'"):
        flow(z, SAMPLES[:2], "cosine", "triton")
    with pytest.raises(ValueError, match="detached"):
        flow(z.requires_grad_(), SAMPLES[:2], "uniform", "triton")
    with pytest.raises(TypeError, match="samples must be int64"):
        flow(z.detach(), SAMPLES[:2].int(), "uniform", "triton")
    with pytest.raises(TypeError, match="samples must be int64"):
        corruption.draw_tokenizer(1, SAMPLES.double(), (3,), 0.7, "triton" if DEVICE == "cpu" else "eager")
    with pytest.raises(ValueError, match="samples must have shape"):
        flow(z.detach(), SAMPLES[:3], "uniform", "triton")
    with pytest.raises(ValueError, match="seed must be"):
        corruption.noise_injection(z.detach().to(DEVICE), SAMPLES[:2].to(DEVICE), -1, 0.5, 0.7, 1.0, "triton")
