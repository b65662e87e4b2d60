"""adaLN, QK-norm with RoPE, and SwiGLU: Triton kernels and C++ operations against float64, and as registered ops."""

from __future__ import annotations

import cases
import pytest
import torch
from checking import BACKENDS, DEVICE, check_budget, on_device, values_and_gradients
from torch.utils._python_dispatch import TorchDispatchMode

from unite_kernels import adaln, backend, qk_norm_rope, swiglu

BF16, FP32 = torch.bfloat16, torch.float32
# (batch, tokens, width): odd widths, tokens that are no power of two, batch 1, several backward programs per sample
SHAPES = [(2, 9, 63), (1, 5, 199), (3, 3, 760), (1, 67, 48)]


def shape_for(name: str, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    batch, tokens, width = shape
    return (batch, tokens, width - width % 6) if name == "qk_norm_rope" else shape  # 3 heads of even width


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("name", cases.CASES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernels", BACKENDS)
def test_float32_values_and_gradients(name, shape, kernels):
    case = cases.CASES[name]
    check_budget(case.call, case.tensors(*shape_for(name, shape), FP32, FP32), kernels, in_double(name))


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("name", cases.CASES)
@pytest.mark.parametrize("residual", [FP32, BF16])
@pytest.mark.parametrize("kernels", BACKENDS)
def test_bfloat16_values_and_gradients(name, residual, kernels):
    if name == "adaln" and residual == FP32:
        pytest.skip("adaln has one large dtype: the mixed case is the same as float32")
    case = cases.CASES[name]
    check_budget(case.call, case.tensors(*shape_for(name, (2, 9, 192)), residual, BF16), kernels, in_double(name))


def in_double(name: str):
    """The formula in float64; the eager forms compute in float32 whatever they are given."""

    def norm(u, weight):
        return u * torch.rsqrt(u.square().mean(-1, keepdim=True) + 1e-6) * weight

    def modulated(u, t, weight):
        return norm(u, weight) * (1 + t["scale"][:, None]) + t["shift"][:, None]

    def mid(t, _):
        x1 = t["x"] + t["gate"][:, None] * (t["branch"] + t["bias"])
        return x1, modulated(x1, t, t["weight"])

    def tail(t, _):
        x2 = norm(t["x"] + t["gate"][:, None] * (t["branch"] + t["bias"]), t["weight3"])
        return x2, modulated(x2, t, t["weight1"])

    def swiglu_(t, _):
        a, b = (t["x"] + t["bias"]).chunk(2, -1)
        return (a * torch.sigmoid(a) * b,)

    def qk(t, _):
        head_dim = t["q_weight"].numel()
        q, k, v = (t["x"] + t["bias"] - t["bias"].detach()).unflatten(-1, (3, -1, head_dim)).unbind(2)
        prefix = min(2, q.shape[1])
        turn = torch.polar(torch.ones_like(t["cos"]), torch.atan2(t["sin"], t["cos"]))[: q.shape[1] - prefix]

        def rotated(x, weight):
            x = norm(x, weight)
            pairs = torch.view_as_complex(x[:, prefix:].unflatten(-1, (-1, 2)).contiguous()) * turn[:, None]
            return torch.cat((x[:, :prefix], torch.view_as_real(pairs).flatten(-2)), 1)

        return rotated(q, t["q_weight"]).flatten(2), rotated(k, t["k_weight"]).flatten(2), v.flatten(2)

    plain = {"adaln": lambda t, _: (modulated(t["x"], t, t["weight"]),), "adaln_mid": mid, "adaln_tail": tail}
    return {**plain, "swiglu": swiglu_, "qk_norm_rope": qk}[name]


@pytest.mark.parametrize("kernels", BACKENDS)
def test_rows_of_a_wider_matrix(kernels):
    """shift, scale and gate are chunks of one projection: rows 6 D apart."""
    t = on_device(cases.CASES["adaln_mid"].tensors(2, 4, 64, FP32, FP32))
    expected = adaln.adaln_mid(*(t[n] for n in cases.MID), backend=kernels)
    t["gate"], t["shift"], t["scale"] = torch.cat((t["gate"], t["shift"], t["scale"]), 1).chunk(3, 1)
    found = adaln.adaln_mid(*(t[n] for n in cases.MID), backend=kernels)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("name", cases.CASES)
@pytest.mark.parametrize("kernels", BACKENDS)
def test_equal_runs_give_equal_bits(name, kernels):
    case = cases.CASES[name]
    tensors = case.tensors(*shape_for(name, (2, 19, 64)), FP32, FP32)
    first, second = (values_and_gradients(case.call, tensors, kernels) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("name", ["adaln_mid", "adaln_tail", "qk_norm_rope", "swiglu"])
@pytest.mark.parametrize("kernels", [*BACKENDS, "eager"])
def test_no_bias_is_a_bias_of_zero(name, kernels):
    case = cases.CASES[name]
    tensors = case.tensors(*shape_for(name, (2, 19, 64)), FP32, FP32)
    tensors["bias"] = torch.zeros_like(tensors["bias"])
    expected = values_and_gradients(case.call, tensors, kernels)
    del expected["gradient of bias"], tensors["bias"]
    found = values_and_gradients(lambda t, backend: case.call({**t, "bias": None}, backend), tensors, kernels)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize("kernels", BACKENDS)
def test_swiglu_without_bias(kernels):
    x = torch.randn(3, 5, 126, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    a, b = x.double().chunk(2, -1)
    torch.testing.assert_close(swiglu.swiglu(x, None, kernels).double(), a * torch.sigmoid(a) * b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", cases.CASES)
@pytest.mark.parametrize("kernels", BACKENDS)
def test_compiles_without_graph_breaks(name, kernels):
    case = cases.CASES[name]
    tensors = case.tensors(*shape_for(name, (2, 3, 48)), FP32, FP32)
    torch._dynamo.reset()  # the cases share one lambda's code, which may be compiled eight times
    compiled = torch.compile(lambda t: case.call(t, kernels), backend="aot_eager", fullgraph=True)
    found = values_and_gradients(lambda t, _: compiled(t), tensors, kernels)
    expected = values_and_gradients(case.call, tensors, kernels)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(("name", "biased"), [(name, b) for name in cases.CASES for b in (True, False)][1:])
@pytest.mark.parametrize("kernels", BACKENDS)
def test_registered_op(name, biased, kernels):
    t = on_device(cases.CASES[name].tensors(*shape_for(name, (2, 3, 48)), FP32, FP32))
    for key in t:  # the gradient of QK-norm is a function's around the operation
        t[key].requires_grad_(name != "qk_norm_rope")
    if not biased:
        t["bias"] = None
    op, arguments = {
        "adaln": lambda: (adaln._adaln_fwd, (*(t[n] for n in cases.ADALN), 1e-6)),
        "adaln_mid": lambda: (adaln._adaln_mid_fwd, (*(t[n] for n in cases.MID), 1e-6)),
        "adaln_tail": lambda: (adaln._adaln_tail_fwd, (*(t[n] for n in cases.TAIL), 1e-6)),
        "qk_norm_rope": lambda: (
            qk_norm_rope._qk_norm_rope_fwd,
            (t["x"], [t["q_weight"], t["k_weight"]], t["cos"], t["sin"], 3, 2, 1e-6),
        ),
        "swiglu": lambda: (swiglu._swiglu_fwd, (t["x"], t["bias"])),
    }[name]()
    torch.library.opcheck(op, (*arguments, kernels))


class Watched(TorchDispatchMode):
    """Sees what is dispatched, which keeps calls from going past the registered operations."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.name().split("::")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(DEVICE != "cpu", reason="C++ runs on CPU tensors")
@pytest.mark.parametrize("name", cases.CASES)
def test_cpp_called_directly_is_the_registered_operation(name):
    """The same bits and gradients, whether torch looks at the call or not."""
    case = cases.CASES[name]
    tensors = case.tensors(*shape_for(name, SHAPES[0]), FP32, FP32)
    direct = values_and_gradients(case.call, tensors, "cpp")
    with Watched() as watched:
        registered = values_and_gradients(case.call, tensors, "cpp")
    assert "unite_kernels" in watched.seen
    assert direct.keys() == registered.keys()
    assert all(torch.equal(direct[key], registered[key]) for key in direct)


@pytest.mark.skipif(DEVICE != "cpu", reason="C++ runs on CPU tensors")
def test_a_library_without_the_operation_is_an_old_one():
    with pytest.raises(RuntimeError, match="older than this code and has no adaln_of_tomorrow"):
        backend.cpu_op("adaln_of_tomorrow")


def test_bad_input_is_named():
    t = on_device(cases.CASES["adaln_mid"].tensors(2, 4, 64, FP32, FP32))

    def call(**changed):
        return adaln.adaln_mid(*({**t, **changed}[n] for n in cases.MID), backend="triton")

    with pytest.raises(TypeError, match="x must be float32"):
        call(x=t["x"].double())
    with pytest.raises(ValueError, match="branch must have shape"):
        call(branch=t["branch"][:, :3].contiguous())
    with pytest.raises(ValueError, match="x must be contiguous"):
        call(x=t["x"].transpose(0, 1).contiguous().transpose(0, 1))
    with pytest.raises(ValueError, match="adjacent elements"):
        call(gate=t["gate"].T.contiguous().T)
    with pytest.raises(TypeError, match="one dtype"):
        call(shift=t["shift"].bfloat16())
    with pytest.raises(ValueError, match=r"bias must have shape \(64,\), not \(63,\)"):
        call(bias=t["bias"][:63])
    with pytest.raises(TypeError, match="bias must be float32"):
        call(bias=t["bias"].double())
    with pytest.raises(RuntimeError, match="different devices"):
        call(gate=t["gate"].to("meta"))
    with pytest.raises(ValueError, match="width up to 2048"):
        adaln.adaln(torch.zeros(1, 1, 4096, device=DEVICE), *torch.zeros(3, 4096, device=DEVICE), backend="triton")
    with pytest.raises(ValueError, match="two equal halves"):
        swiglu.swiglu(torch.zeros(2, 5, device=DEVICE), backend="triton")
    q = on_device(cases.CASES["qk_norm_rope"].tensors(2, 4, 48, FP32, FP32))
    with pytest.raises(ValueError, match="cos must have shape"):
        qk_norm_rope.qk_norm_rope(q["x"], [q["q_weight"], q["k_weight"]], q["cos"][:1], q["sin"], 3)
    with pytest.raises(ValueError, match=r"x must have shape \(batch, tokens, 48 or 96\), which is 3 heads of"):
        qk_norm_rope.qk_norm_rope(q["x"], [q["q_weight"]], q["cos"], q["sin"], 3)
    with pytest.raises(ValueError, match=r"bias must have shape \(144,\), not \(48,\)"):
        cases.CASES["qk_norm_rope"].call({**q, "bias": q["bias"][:48]}, "triton")


def test_backend_choice():
    x = torch.zeros(1)
    assert backend.resolve("fused", x) == "cpp"
    assert backend.resolve("eager", x) == "eager"
    assert backend.resolve("triton", x.to(DEVICE)) == "triton"  # without a GPU: the interpreter is on
    assert backend.resolve("fused", x.to(DEVICE)) == BACKENDS[-1]
    with pytest.raises(ValueError, match="unknown kernel backend 'fast'"):
        backend.resolve("fast", x)
    with pytest.raises(RuntimeError, match="runs on CPU tensors"):
        backend.resolve("cpp", x.to("meta"))


def test_triton_on_a_cpu_tensor_without_the_interpreter_is_an_error(monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETING", False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        backend.resolve("triton", torch.zeros(1))
