"""Every attention backend of this machine against float64: masks, fewer queries than keys, packed sequences, errors."""

from __future__ import annotations

import dataclasses
import math
from typing import get_args, get_type_hints

import pytest
import torch
from support import TINY, command
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from unite_fast import config, doctor
from unite_fast.base.errors import UserError
from unite_fast.config import ENCODER_SIZES, ModelConfig
from unite_fast.config.yaml_text import from_dict, parse_yaml
from unite_fast.layers import attention as module
from unite_fast.layers.attention import attention, attention_varlen
from unite_fast.model.flops import attentions
from unite_fast.model.unite import UNITE

SIZES = [(20, 2, 16)]  # (keys, heads, head size)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")
DTYPES = (torch.bfloat16,) if DEVICE.type == "cuda" else (torch.float32, torch.bfloat16)
RUNNABLE = [b for b in module.BACKENDS if not module.obstacle(b, DEVICE, True, 64)]


def reference(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    weights = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if key_mask is not None:
        weights = weights.masked_fill(~key_mask[:, None, None], -math.inf)
    return weights.softmax(-1) @ v


def inputs(t: int, s: int, e: int, dtype: torch.dtype, b: int = 2, h: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(t * s + e)
    shapes = (b, t, h, e), (b, s, h, e), (b, s, h, e)
    return [torch.randn(x, generator=generator).to(DEVICE, dtype).transpose(1, 2).requires_grad_() for x in shapes]


def require_close(call, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> None:
    """Output and gradients of ``call(q, k, v)`` are as near to float64 as rounding to the dtype allows."""
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = reference(*exact, key_mask)
    dy = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(DEVICE)
    truth = [expected, *torch.autograd.grad(expected, exact, dy)]
    y = call(q, k, v)
    assert y.shape == expected.shape
    assert y.dtype == q.dtype
    found = [y, *torch.autograd.grad(y, (q, k, v), dy.to(y.dtype))]
    for a, b in zip(found, truth, strict=True):
        error = (a.double() - b).norm() / b.norm()
        assert error < (1e-5 if q.dtype == torch.float32 else 1.5e-2), error


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("e", [16, 64, 72])
@pytest.mark.parametrize(("t", "s"), [(9, 9), (5, 33), (33, 5)])
@pytest.mark.parametrize("backend", RUNNABLE)
def test_backends_agree_with_float64(backend, t, s, e, dtype):
    module.activate(backend)
    require_close(lambda q, k, v: attention(q, k, v, backend=backend), *inputs(t, s, e, dtype))


@pytest.mark.parametrize("backend", RUNNABLE)
def test_key_mask(backend):
    module.activate(backend)
    q, k, v = inputs(7, 21, 64, DTYPES[0])
    mask = torch.rand(2, 21, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.6
    mask[:, 3] = True
    require_close(lambda q, k, v: attention(q, k, v, mask, backend), q, k, v, mask)


def test_packing_a_key_mask():
    """The route of kernels without masks, with the packed part computed by one that this machine has."""
    q, k, v = inputs(7, 21, 16, DTYPES[0])
    mask = torch.rand(2, 21, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.3
    mask[:, 5] = True
    require_close(lambda q, k, v: module._packed(q, k, v, module.packed_keys(mask), "sdpa"), q, k, v, mask)


def test_hidden_keys_get_no_gradient_whatever_the_kernel_leaves_there(monkeypatch):
    """A packed kernel need not write the gradients of rows behind the last sequence."""

    class Careless(torch.autograd.Function):
        @staticmethod
        def forward(ctx, k, used):
            ctx.used = used
            return k.clone()

        @staticmethod
        def backward(ctx, dk):
            return torch.where(torch.arange(len(dk), device=dk.device)[:, None, None] < ctx.used, dk, math.nan), None

    exact = attention_varlen

    def careless(q, k, v, starts_q, starts_k, *rest):
        return exact(q, Careless.apply(k, starts_k[-1]), Careless.apply(v, starts_k[-1]), starts_q, starts_k, *rest)

    monkeypatch.setattr(module, "attention_varlen", careless)
    q, k, v = inputs(7, 21, 16, DTYPES[0])
    mask = torch.arange(21, device=DEVICE) % 3 != 1
    mask = mask.expand(2, 21)
    require_close(lambda q, k, v: module._packed(q, k, v, module.packed_keys(mask), "sdpa"), q, k, v, mask)
    gradient = torch.autograd.grad(module._packed(q, k, v, module.packed_keys(mask), "sdpa").float().sum(), k)[0]
    assert (gradient.transpose(1, 2)[~mask] == 0).all()


@pytest.mark.parametrize("backend", RUNNABLE)
def test_packed_sequences(backend):
    """Each sequence as if it stood alone; rows behind the last one are ignored."""
    module.activate(backend)
    lengths_q, lengths_k = (4, 1, 9), (6, 11, 2)
    starts = [torch.tensor([0, *n]).cumsum(0).to(DEVICE, torch.int32) for n in (lengths_q, lengths_k)]
    generator = torch.Generator().manual_seed(0)
    rows = sum(lengths_q) + 3, sum(lengths_k) + 2, sum(lengths_k) + 2
    q, k, v = (torch.randn(n, 2, 64, generator=generator).to(DEVICE, DTYPES[0]).requires_grad_() for n in rows)
    y = attention_varlen(q, k, v, *starts, max(lengths_q), max(lengths_k), backend)
    gradients = torch.autograd.grad(y[: sum(lengths_q)].float().square().sum(), (q, k, v))
    for i in range(3):
        own_q, own_k = slice(*starts[0][i : i + 2].tolist()), slice(*starts[1][i : i + 2].tolist())
        parts = [x[own].detach().double().requires_grad_() for x, own in ((q, own_q), (k, own_k), (v, own_k))]
        expected = reference(*(x.transpose(0, 1)[None] for x in parts))[0].transpose(0, 1)
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if DTYPES[0] == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(y[own_q].double(), expected, **tolerance)
        exact = torch.autograd.grad(expected.square().sum(), parts)
        for found, own, e in zip(gradients, (own_q, own_k, own_k), exact, strict=True):
            torch.testing.assert_close(found[own].double(), e, **tolerance)


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("masked", [False, True])
def test_compiled_in_one_graph(backend, masked):
    module.activate(backend)
    q, k, v = inputs(9, 12, 64, DTYPES[0])
    mask = torch.arange(12, device=DEVICE).expand(2, 12) < 7 if masked else None
    torch._dynamo.reset()
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    require_close(lambda q, k, v: compiled(q, k, v, mask, backend), q, k, v, mask)


def test_packing_never_waits_for_the_device():
    with FakeTensorMode():
        q, k, v = (torch.empty(2, 3, n, 16, requires_grad=True) for n in (7, 9, 9))
        y = module._packed(q, k, v, module.packed_keys(torch.empty(2, 9, dtype=torch.bool)), "sdpa")
        y.sum().backward()
    assert y.shape == (2, 3, 7, 16)


def test_sizes_of_the_published_models():
    assert {n for n, _, _ in attentions(ModelConfig())} == {256, 257, 288, 512, 544}
    xl = attentions(dataclasses.replace(ModelConfig(), encoder=ENCODER_SIZES["xl"]))
    assert {e for n, _, e in xl if n != 257} == {72}


def test_a_plan_goes_by_the_number_of_keys(monkeypatch):
    taken = []
    monkeypatch.setattr(module, "sdpa_kernel", lambda backend: taken.append(backend) or torch.no_grad())
    plan = ((16, "math"), (1 << 30, "flash"))
    for keys in (16, 17):
        attention(*inputs(4, keys, 16, torch.float32), backend=plan)
    assert taken == [module.SDPBackend.MATH, module.SDPBackend.FLASH_ATTENTION]


def test_table_of_preferences_is_complete():
    for rows in module.PREFERRED.values():
        assert rows[-1][0] >= 1 << 30
        assert [most for most, _ in rows] == sorted(most for most, _ in rows)
        assert {name for _, names in rows for name in names} <= set(module.BACKENDS)


@pytest.mark.parametrize(
    ("tiles", "half", "expected"), [(True, True, "products"), (True, False, "sdpa"), (False, True, "sdpa")]
)
def test_auto_on_cpus_goes_by_their_matrix_units(monkeypatch, tiles, half, expected):
    monkeypatch.setattr(module.kernels, "has_tiles", lambda: tiles)
    assert module.resolve("auto", SIZES, CPU, half) == expected


def test_what_cannot_run_says_why(tiny):
    assert module.resolve("math", SIZES, CPU, half=False) == "math"
    for name in ("efficient", "cudnn"):
        with pytest.raises(UserError, match=f"attention={name}: it needs a CUDA device; or choose auto"):
            module.resolve(name, SIZES, CPU, half=True)
    absent = [name for name in module.MODULES if module._missing(name)]
    for name in absent:
        mend = module.MODULES[name][1]
        result = command("train.py", "--config", tiny, "--dry-run", f"efficiency.attention={name}")
        assert result.returncode == 2
        assert f"efficiency.attention={name}" in result.stderr
        assert mend in result.stderr
        assert result.stderr.count("\n") == 1


def test_devices_and_sizes_that_a_kernel_does_not_know(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(module, "_missing", lambda backend: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert module.obstacle("products", cuda, True, 64) == "it is for CPUs"
    for name in set(module.BACKENDS) - {"products"}:
        assert module.obstacle(name, cuda, True, 64) == ""
        assert module.obstacle(name, cuda, True, 72) == ""
    assert "efficiency.precision=bf16" in module.obstacle("cudnn", cuda, False, 64)
    assert module.obstacle("efficient", cuda, False, 64) == ""
    assert "up to 128, this model's is 136" in module.obstacle("cudnn", cuda, True, 136)
    assert "multiples of 8" in module.obstacle("flash", cuda, True, 20)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert module.obstacle("fa3", cuda, True, 64) == "it needs sm_90, this device is sm_80"
    assert module.obstacle("flash", cuda, True, 64) == ""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "sm_75" in module.obstacle("flash", cuda, True, 64)


def test_a_trial_reports_what_the_kernel_says():
    assert module.trial("math", CPU, True, 5, 2, 16) == ""
    why = module.trial("cudnn", CPU, True, 5, 2, 16)
    assert "No available kernel" in why or "No viable backend" in why


def test_the_model_uses_what_was_resolved(tiny):
    settings = from_dict(parse_yaml(TINY, "tiny"))
    model = UNITE(settings.model)
    layers = [layer for layer in model.modules() if hasattr(layer, "attention")]
    assert {module.describe(layer.attention) for layer in layers} == {"sdpa"}
    for layer in layers:
        layer.attention = "math"
    taken = []
    original = module.sdpa_kernel
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "sdpa_kernel", lambda backend: taken.append(backend) or original(backend))
        model.decode(model.tokenize(torch.rand(1, 1, 8, 8)))
    assert len(taken) == settings.model.encoder.depth + settings.model.decoder.depth
    result = command("train.py", "--config", tiny, "--dry-run", "efficiency.attention=math")
    assert "attention math" in result.stdout
    names = get_args(get_type_hints(config.EfficiencyConfig)["attention"])
    assert sorted(names) == sorted(("auto", *module.BACKENDS))


def test_doctor_lists_the_backends():
    lines = [f for f in doctor.examine() if f.what.startswith("attention ")]
    assert [f.what.split()[1] for f in lines] == list(module.BACKENDS)
    assert lines[0].state == "OK"
    assert all(f.state in ("OK", "WARN") for f in lines)
    assert all("usable" in f.detail for f in lines if f.state == "OK")


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("encoder", ["base", "xl"])
def test_auto_runs_on_this_gpu(encoder):
    sizes = attentions(dataclasses.replace(ModelConfig(), encoder=ENCODER_SIZES[encoder]))
    plan = module.resolve("auto", sizes, DEVICE, half=True)
    for keys, heads, e in sizes:
        require_close(
            lambda q, k, v: attention(q, k, v, backend=plan), *inputs(keys, keys, e, torch.bfloat16, 2, heads)
        )
