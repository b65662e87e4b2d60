"""Multi-tensor updates: eager and compiled, against torch.optim and float64 truth over several steps."""

import math

import pytest
import torch
from torch import nn

from unite_kernels import multi_tensor

SHAPES = [(1,), (63,), (7, 199), (160, 211), (3, 5, 2)]  # 160 x 211 spans chunks, the last one partial
MATRICES = [(5, 3), (24, 65), (130, 131)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
BACKENDS = ["eager", "fused"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def draws(shapes, seed, device="cpu", scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(s, generator=generator) * scale).to(device) for s in shapes]


def scalar(value, device="cpu"):
    return torch.tensor(value, device=device)


def zeros(tensors):
    return [torch.zeros_like(t) for t in tensors]


def relative(ours, truth):
    """Largest error over all tensors, relative to the largest value of the truth."""
    scale = max(t.abs().max().item() for t in truth)
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(ours, truth, strict=True)) / scale


def test_norm_and_clip(backend, device):
    grads = draws(SHAPES, 0, device, 3.0)
    truth = math.sqrt(sum(g.double().square().sum().item() for g in grads))
    norm, coef, skip = multi_tensor.clip(grads, 2.5, backend)
    assert norm.item() == pytest.approx(truth, rel=1e-6)
    assert coef.item() == pytest.approx(2.5 / (truth + 1e-6), rel=1e-6)
    assert not skip.item()
    assert norm.shape == coef.shape == skip.shape == ()
    assert multi_tensor.clip(grads, 1e6, backend)[1].item() == 1.0
    params = [nn.Parameter(g) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    assert norm.item() == pytest.approx(nn.utils.clip_grad_norm_(params, 2.5).item(), rel=1e-6)
    assert relative([g * coef for g in grads], [p.grad for p in params]) < 1e-6


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_value_that_is_not_finite_sets_skip(backend, device, value):
    grads = draws(SHAPES, 0, device)
    grads[3][-1, -1] = value
    norm, _, skip = multi_tensor.clip(grads, 1.0, backend)
    assert skip.item()
    assert not math.isfinite(norm.item())


def test_norm_does_not_depend_on_how_often_it_runs(device):
    grads = draws([(1000, 999)], 0, device)
    first, second = (multi_tensor.clip(grads, 1.0, "fused")[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_follows_torch(backend, device, weight_decay):
    params = draws(SHAPES, 1, device)
    reference = [nn.Parameter(p.double()) for p in params]
    optimizer = torch.optim.AdamW(reference, lr=3e-3, eps=1e-6, weight_decay=weight_decay)
    exp_avg, exp_avg_sq, ema = zeros(params), zeros(params), [p.clone() for p in params]
    truth_ema = [e.double() for e in ema]
    step, lr = scalar(0.0, device), scalar(3e-3, device)
    for i in range(4):
        grads = draws(SHAPES, 10 + i, device, 2.0)
        for p, g in zip(reference, grads, strict=True):
            p.grad = g.double()
        nn.utils.clip_grad_norm_(reference, 3.0)
        optimizer.step()
        for e, p in zip(truth_ema, reference, strict=True):
            e.lerp_(p.detach(), 1 - 0.9)
        _, coef, skip = multi_tensor.clip(grads, 3.0, backend)
        multi_tensor.adamw_step_(
            params,
            grads,
            exp_avg,
            exp_avg_sq,
            step,
            lr,
            (0.9, 0.999),
            1e-6,
            weight_decay,
            coef,
            skip,
            ema,
            0.9,
            backend,
        )
    state = [optimizer.state[p] for p in reference]
    assert step.item() == 4
    assert relative(params, [p.detach() for p in reference]) < 1e-6
    assert relative(exp_avg, [s["exp_avg"] for s in state]) < 1e-6
    assert relative(exp_avg_sq, [s["exp_avg_sq"] for s in state]) < 1e-6
    assert relative(ema, truth_ema) < 1e-6


def test_adamw_without_clip_skip_or_ema(backend, device):
    params, grads = draws(SHAPES, 1, device), draws(SHAPES, 2, device)
    reference = [nn.Parameter(p.double()) for p in params]
    for p, g in zip(reference, grads, strict=True):
        p.grad = g.double()
    torch.optim.AdamW(reference, lr=0.01, eps=1e-6, weight_decay=0.0).step()
    moments = zeros(params), zeros(params)
    multi_tensor.adamw_step_(params, grads, *moments, scalar(0.0, device), scalar(0.01, device), backend=backend)
    assert relative(params, [p.detach() for p in reference]) < 1e-6


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_muon_follows_torch(monkeypatch, backend, device, weight_decay, nesterov):
    """torch.optim.Muon, its Newton-Schulz replaced by a halving on both sides, so that only our part is compared."""
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", lambda grad, *_: grad * 0.5)
    params = draws(MATRICES, 1, device)
    reference = [nn.Parameter(p.double()) for p in params]
    optimizer = torch.optim.Muon(
        reference, lr=0.02, weight_decay=weight_decay, nesterov=nesterov, adjust_lr_fn="match_rms_adamw"
    )
    buffers, ema = zeros(params), [p.clone() for p in params]
    truth_ema = [e.double() for e in ema]
    scales = [0.2 * math.sqrt(max(p.shape)) for p in params]
    lr = scalar(0.02, device)
    for i in range(4):
        grads = draws(MATRICES, 10 + i, device)
        for p, g in zip(reference, grads, strict=True):
            p.grad = g.double()
        nn.utils.clip_grad_norm_(reference, 3.0)
        optimizer.step()
        for e, p in zip(truth_ema, reference, strict=True):
            e.lerp_(p.detach(), 1 - 0.9)
        _, coef, skip = multi_tensor.clip(grads, 3.0, backend)
        updates = multi_tensor.muon_momentum_(grads, buffers, 0.95, nesterov, coef, skip, backend=backend)
        halves = [u * 0.5 for u in updates]
        multi_tensor.muon_apply_(params, halves, lr, scales, weight_decay, skip, ema, 0.9, backend)
    assert relative(params, [p.detach() for p in reference]) < 1e-6
    assert relative(buffers, [optimizer.state[p]["momentum_buffer"] for p in reference]) < 1e-6
    assert relative(ema, truth_ema) < 1e-6


def test_muon_bfloat16_updates_into_slices_of_a_batch(backend, device):
    """An odd slice of a bfloat16 batch begins at an address that is no multiple of a vector."""
    shape = (5, 7)
    grads, params = draws([shape] * 3, 1, device), draws([shape] * 3, 2, device)
    batch = torch.full((3, *shape), math.nan, device=device, dtype=torch.bfloat16)
    buffers = draws([shape] * 3, 3, device)
    expected = [g.double().lerp(b.double().lerp(g.double(), 0.1), 0.9) for g, b in zip(grads, buffers, strict=True)]
    out = multi_tensor.muon_momentum_(grads, buffers, 0.9, out=list(batch.unbind(0)), backend=backend)
    assert out[1].data_ptr() == batch[1].data_ptr()
    assert (batch.double() - torch.stack(expected)).abs().max() < 2**-8 * 4
    truth = [p.double() - 0.1 * 2.0 * u.double() for p, u in zip(params, out, strict=True)]
    multi_tensor.muon_apply_(params, out, scalar(0.1, device), [2.0] * 3, backend=backend)
    assert relative(params, truth) < 1e-6


def test_ema_alone(backend, device):
    ema, params = draws(SHAPES, 1, device), draws(SHAPES, 2, device)
    truth = [e.double().lerp(p.double(), 0.25) for e, p in zip(ema, params, strict=True)]
    multi_tensor.ema_lerp_(ema, params, 0.75, backend=backend)
    assert relative(ema, truth) < 1e-6
    truth = [e.double().lerp(p.double(), 0.125) for e, p in zip(ema, params, strict=True)]
    on_device = torch.tensor(0.875, dtype=torch.float64, device=device)
    multi_tensor.ema_lerp_(ema, params, on_device, backend=backend)
    assert relative(ema, truth) < 1e-6


def test_skip_leaves_everything_as_it_was(backend, device):
    lists = [draws(MATRICES, seed, device) for seed in range(5)]
    params, exp_avg, exp_avg_sq, ema, buffers = lists
    before = [[t.clone() for t in group] for group in lists]
    grads = [torch.full_like(p, math.nan) for p in params]
    step, lr = scalar(5.0, device), scalar(0.1, device)
    _, coef, skip = multi_tensor.clip(grads, 1.0, backend)
    shared = {"skip": skip, "ema": ema, "ema_decay": 0.9, "backend": backend}
    multi_tensor.adamw_step_(params, grads, exp_avg, exp_avg_sq, step, lr, clip_coef=coef, **shared)
    updates = multi_tensor.muon_momentum_(grads, buffers, clip_coef=coef, skip=skip, backend=backend)
    multi_tensor.muon_apply_(params, updates, lr, [1.0] * 3, **shared)
    multi_tensor.ema_lerp_(ema, grads, 0.9, skip, backend)
    assert step.item() == 5
    for group, old in zip(lists, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(group, old, strict=True))


def test_more_tensors_than_one_cuda_launch_takes(backend, device):
    params = draws([(i % 5 + 1,) for i in range(1100)], 1, device)
    ema = zeros(params)
    multi_tensor.ema_lerp_(ema, params, 0.5, backend=backend)
    assert all(torch.equal(e, p * 0.5) for e, p in zip(ema, params, strict=True))
    flat = torch.cat(params).double()
    assert multi_tensor.clip(params, 1.0, backend)[0].item() == pytest.approx(flat.norm().item(), rel=1e-6)


def test_empty_tensors_are_allowed(backend):
    ema, params = [torch.zeros(0, 3), torch.zeros(2)], [torch.ones(0, 3), torch.ones(2)]
    multi_tensor.ema_lerp_(ema, params, 0.5, backend=backend)
    assert torch.equal(ema[1], torch.full((2,), 0.5))


def adamw(backend, **changes):
    arguments = {name: [torch.ones(4, 3), torch.ones(5)] for name in ("params", "grads", "exp_avg", "exp_avg_sq")}
    arguments |= {"step": scalar(0.0), "lr": scalar(0.1), "backend": backend}
    multi_tensor.adamw_step_(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"params": []}, "empty"),
        ({"grads": [torch.ones(4, 3)]}, "2 params but 1 grads|grads has 1 tensors, expected 2"),
        ({"grads": [torch.ones(4, 3), torch.ones(6)]}, "grads.* has shape"),
        ({"exp_avg": [torch.ones(3, 4), torch.ones(5)]}, "exp_avg.* has shape"),
        ({"grads": [torch.ones(4, 3).half(), torch.ones(5)]}, "grads.* must be .*float32"),
        ({"ema": [torch.ones(4, 3)]}, "ema"),
        ({"lr": 0.1}, "lr must be a 0-d"),
        ({"step": torch.zeros(1)}, "step must be a 0-d"),
        ({"lr": torch.tensor(0.1, dtype=torch.float64)}, "lr must be a 0-d"),
        ({"skip": torch.tensor(0.0)}, "skip must be a 0-d torch.bool"),
        ({"clip_coef": torch.ones((), device="meta")}, "clip_coef is on meta"),
    ],
)
def test_bad_input_is_named(backend, changes, message):
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
        adamw(backend, **changes)


def test_fused_refuses_what_it_cannot_stride_over():
    with pytest.raises(RuntimeError, match="grads must be contiguous"):
        adamw("fused", grads=[torch.ones(3, 4).T, torch.ones(5)])


def test_unknown_backend_and_missing_scale_are_named(backend):
    with pytest.raises(ValueError, match="unknown kernel backend 'fast'"):
        multi_tensor.clip([torch.ones(2)], 1.0, "fast")
    with pytest.raises((RuntimeError, ValueError), match="1 params but 2 scales"):
        multi_tensor.muon_apply_([torch.ones(2, 2)], [torch.ones(2, 2)], scalar(0.1), [1.0, 2.0], backend=backend)
