"""The C++ operations against float64 truth, forward and every gradient, at the raw torch.ops level.

Budget: error <= 2 x (error of eager torch in the same dtype) + atol. Widths are no multiple of any vector length.
"""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from unite_kernels import corruption, extension, philox

EPS = 1e-6
WIDTHS = [(1, 1, 63), (2, 33, 199), (2, 70, 760)]  # batch, tokens, width; 33 and 70 leave a partial block of rows
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


@pytest.fixture(scope="module")
def ops():
    extension.load_cpu()
    return torch.ops.unite_kernels_cpu


def rms(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def adaln(x, weight, shift, scale):
    return rms(x, weight) * (1 + scale[:, None]) + shift[:, None]


def mid(x, branch, gate, weight, shift, scale, bias):
    x1 = x + gate[:, None] * (branch + bias)
    return x1, adaln(x1, weight, shift, scale)


def tail(x, branch, gate, weight3, weight1, shift, scale, bias):
    x2 = rms(x + gate[:, None] * (branch + bias), weight3)
    return x2, adaln(x2, weight1, shift, scale)


def qk_norm_rope(x, q_weight, k_weight, bias, cos, sin, heads, prefix):
    batch, tokens, _ = x.shape
    q, k, v = (x + (bias - bias.detach())).reshape(batch, tokens, 3, heads, -1).unbind(2)
    cos, sin = (table[: tokens - prefix].repeat_interleave(2, dim=-1)[:, None] for table in (cos, sin))

    def rotate(x):
        turned = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
        return torch.cat([x[:, :prefix], x[:, prefix:] * cos + turned[:, prefix:] * sin], dim=1)

    return tuple(part.flatten(2) for part in (rotate(rms(q, q_weight)), rotate(rms(k, k_weight)), v))


def swiglu(x, bias=None):
    a, b = (x if bias is None else x + bias).chunk(2, dim=-1)
    return torch.nn.functional.silu(a) * b


def evaluate(function, inputs, gradients, dtype):
    """Outputs of ``function`` and the gradients of ``inputs`` for output gradients ``gradients``, computed in dtype."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = torch.autograd.grad(outputs, leaves, [g.to(dtype) for g in gradients])
    return [*outputs, *grads]


def compare(names, ours, eager, truth, atol):
    assert len(ours) == len(eager) == len(truth) == len(names)
    for name, value, rough, exact in zip(names, ours, eager, truth, strict=True):
        assert value.shape == exact.shape, name
        error, allowed = ((x.double() - exact).abs().max().item() for x in (value, rough))
        limit = 2 * allowed + atol * max(1.0, exact.abs().max().item())
        assert error <= limit, f"{name}: error {error:.3g}, limit {limit:.3g}"


def draws(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def modulations(batch, width, count):
    """(batch, width) slices of one wider matrix, as the model makes them: rows are not adjacent."""
    (wide,) = draws((batch, count * width), seed=1)
    return list((wide * 0.3).chunk(count, dim=-1))


def tolerance(dtype):
    return 1e-6 if dtype == FLOAT32 else 1e-2


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize(("batch", "tokens", "width"), WIDTHS)
def test_adaln(ops, batch, tokens, width, dtype):
    x, dy, weight = draws((batch, tokens, width), (batch, tokens, width), (width,))
    x, dy = x.to(dtype), dy.to(dtype)
    shift, scale = modulations(batch, width, 2)
    y, rstd = ops.adaln_fwd(x, weight, shift, scale, EPS)
    dx, dweight, dshift, dscale = ops.adaln_bwd(dy, x, weight, scale, rstd)
    eager, truth = (evaluate(adaln, (x, weight, shift, scale), (dy,), d) for d in (dtype, torch.float64))
    names = ("y", "dx", "dweight", "dshift", "dscale")
    compare(names, (y, dx, dweight, dshift, dscale), eager, truth, tolerance(dtype))
    assert y.dtype == dx.dtype == dtype


@pytest.mark.parametrize("types", [(FLOAT32, FLOAT32), (FLOAT32, BFLOAT16), (BFLOAT16, BFLOAT16)])
@pytest.mark.parametrize(("batch", "tokens", "width"), WIDTHS)
def test_adaln_mid(ops, batch, tokens, width, types):
    residual, side = types
    x, branch, dx1, dy, weight, bias = draws(*[(batch, tokens, width)] * 4, (width,), (width,))
    x, dx1, branch, dy = x.to(residual), dx1.to(residual), branch.to(side), dy.to(side)
    gate, shift, scale = modulations(batch, width, 3)
    inputs = (x, branch, gate, weight, shift, scale, bias)
    x1, y, rstd = ops.adaln_mid_fwd(*inputs, EPS)
    grads = ops.adaln_mid_bwd(dx1, dy, x1, branch, gate, weight, scale, bias, rstd)
    eager, truth = (evaluate(mid, inputs, (dx1, dy), d) for d in (side, torch.float64))
    names = ("x1", "y", "dx", "dbranch", "dgate", "dweight", "dshift", "dscale", "dbias")
    compare(names, (x1, y, *grads), eager, truth, tolerance(side))
    assert (x1.dtype, y.dtype, grads[0].dtype, grads[1].dtype) == (residual, side, residual, side)


@pytest.mark.parametrize("types", [(FLOAT32, FLOAT32), (FLOAT32, BFLOAT16), (BFLOAT16, BFLOAT16)])
@pytest.mark.parametrize(("batch", "tokens", "width"), WIDTHS)
def test_adaln_tail(ops, batch, tokens, width, types):
    residual, side = types
    x, branch, dx2, dy, weight3, weight1, bias = draws(*[(batch, tokens, width)] * 4, *[(width,)] * 3)
    x, dx2, branch, dy = x.to(residual), dx2.to(residual), branch.to(side), dy.to(side)
    gate, shift, scale = modulations(batch, width, 3)
    weight3 = weight3 * 0.2 + 1  # a norm's weight; near zero the second norm would amplify any rounding
    inputs = (x, branch, gate, weight3, weight1, shift, scale, bias)
    x2, y, rstd3, rstd1 = ops.adaln_tail_fwd(*inputs, EPS)
    grads = ops.adaln_tail_bwd(dx2, dy, x, branch, gate, weight3, weight1, scale, bias, rstd3, rstd1)
    eager, truth = (evaluate(tail, inputs, (dx2, dy), d) for d in (side, torch.float64))
    names = ("x2", "y", "dx", "dbranch", "dgate", "dweight3", "dweight1", "dshift", "dscale", "dbias")
    compare(names, (x2, y, *grads), eager, truth, tolerance(side))
    assert (x2.dtype, y.dtype, grads[0].dtype, grads[1].dtype) == (residual, side, residual, side)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "head_dim", "prefix"), [(1, 1, 1, 2, 0), (2, 37, 3, 26, 5), (2, 40, 2, 64, 40)]
)
def test_qk_norm_rope(ops, batch, tokens, heads, head_dim, prefix, dtype):
    width = heads * head_dim
    part = batch, tokens, width
    shapes = (batch, tokens, 3 * width), part, part, part, (head_dim,), (head_dim,), (3 * width,)
    x, *grads, q_weight, k_weight, bias = draws(*shapes)
    x, grads = x.to(dtype), [grad.to(dtype) for grad in grads]
    angle = torch.arange(tokens + 3)[:, None] * 0.7 ** torch.arange(head_dim // 2)
    cos, sin = angle.cos(), angle.sin()
    weights = [q_weight, k_weight]
    out, rstd = ops.qk_norm_rope_fwd(x, weights, cos, sin, heads, prefix, EPS)
    dx, dweights, dbias = ops.qk_norm_rope_bwd(grads, x, weights, cos, sin, rstd, heads, prefix, True)

    def run(d):
        function = lambda x, q, k, b: qk_norm_rope(x, q, k, b, cos.to(d), sin.to(d), heads, prefix)  # noqa: E731
        return evaluate(function, (x, q_weight, k_weight, bias), grads, d)

    ours = (*out, x[..., 2 * width :], dx, *dweights, dbias)
    compare(("q", "k", "v", "dx", "dq", "dk", "dbias"), ours, run(dtype), run(torch.float64), tolerance(dtype))
    alone, dweights, dbias = ops.qk_norm_rope_bwd(
        grads[:1], x[..., :width].contiguous(), weights[:1], cos, sin, rstd[:1].contiguous(), heads, prefix, False
    )
    assert torch.equal(alone, dx[..., :width])
    assert dbias.numel() == 0


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(1, 2), (3, 33, 2 * 63), (70, 2 * 199)])
def test_swiglu(ops, shape, biased, dtype):
    x, dy, bias = draws(shape, (*shape[:-1], shape[-1] // 2), shape[-1:])
    x, dy = (4 * x).to(dtype), dy.to(dtype)
    inputs = (x, bias) if biased else (x,)
    y = ops.swiglu_fwd(x, bias if biased else None)
    dx, dbias = ops.swiglu_bwd(dy, x, bias if biased else None)
    eager, truth = (evaluate(swiglu, inputs, (dy,), d) for d in (dtype, torch.float64))
    ours = (y, dx, dbias) if biased else (y, dx)
    compare(("y", "dx", "dbias")[: len(ours)], ours, eager, truth, tolerance(dtype))
    assert biased or dbias.numel() == 0


def test_swiglu_saturates_and_carries_nan(ops):
    x = torch.tensor([[1e4, -1e4, math.inf, math.nan, 1.0, 1.0, 1.0, 1.0]])
    y = ops.swiglu_fwd(x, None)[0]
    assert y[0] == 1e4
    assert abs(y[1]) < 1e-30
    assert y[2] == math.inf
    assert y[3].isnan()


@pytest.mark.parametrize(("seed", "stream"), [(0, 0), (-1, 3), (2**63 - 1, 37), (1234567890123, 16 * 13 + 6)])
@pytest.mark.parametrize("count", [1, 3, 4, 255, 257, 4096 + 5])
def test_philox_bits(ops, seed, stream, count):
    samples = torch.tensor([0, 1, 7, 2**31 + 5, 2**40 + 3])
    normal, uniform = (getattr(ops, f"philox_{kind}")(seed, stream, samples, count) for kind in ("normal", "uniform"))
    assert torch.equal(normal.view(torch.int32), philox.normal(seed, stream, samples, (count,)).view(torch.int32))
    assert torch.equal(uniform, philox.uniform(seed, stream, samples, (count,)))


def test_philox_bits_of_many(ops):
    samples = torch.arange(64)
    ours, reference = ops.philox_normal(5, 6, samples, 20000), philox.normal(5, 6, samples, (20000,))
    assert torch.equal(ours.view(torch.int32), reference.view(torch.int32))


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("law", corruption.LAWS)
def test_flow_corruption(ops, law, dtype):
    samples, steps = torch.tensor([3, 4, 5, 2**35]), 3
    z, labels = draws((4, 9, 7))[0].to(dtype), torch.tensor([1, 2, 3, 4])
    uniform = law == "uniform"
    out, t, kept = ops.flow_corruption(z, labels, samples, 11, steps, uniform, -0.4, 1.2, 3.0, 0.5, 10)
    times, noise, drops = corruption.draw_flow(11, samples, steps, (9, 7), law, -0.4, 1.2, 3.0, 0.5)
    scale = times[..., None, None]
    assert torch.equal(t, times)
    assert torch.equal(kept, torch.where(drops, 10, labels))
    assert torch.equal(out, (z.float() * scale + noise * (1.0 - scale)).to(dtype))
    assert 0 < drops.sum() < drops.numel()


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_noise_injection(ops, dtype):
    samples = torch.arange(8)
    z = draws((8, 5, 13))[0].to(dtype)
    out, scale = ops.noise_injection(z, samples, 7, 0.5, 0.2, 0.9)
    mask, t, noise = corruption.draw_noising(7, samples, (5, 13), 0.5, 0.2, 0.9)
    wide = t[:, None, None]
    mixed = (z.float() * wide + noise * (1.0 - wide)).to(dtype)
    assert torch.equal(out, torch.where(mask[:, None, None], mixed, z))
    assert torch.equal(scale, torch.where(mask, t, 1.0))
    assert 0 < mask.sum() < 8


def test_thread_count_does_not_change_a_bit(ops):
    x, branch, dx, dy, w3, w1, bias = draws(*[(3, 100, 199)] * 4, *[(199,)] * 3)
    gate, shift, scale = modulations(3, 199, 3)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out = ops.adaln_tail_fwd(x, branch, gate, w3, w1, shift, scale, bias, EPS)
            back = ops.adaln_tail_bwd(dx, dy, x, branch, gate, w3, w1, scale, bias, out[2], out[3])
            mlp = ops.swiglu_bwd(dy[..., :99].contiguous(), x[..., :198].contiguous(), w1[:198].contiguous())
            results.append([*out, *back, *mlp, *ops.clip([x, branch], 1.0)])
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_empty_batch(ops):
    x, modulation, weight = torch.empty(0, 4, 8), torch.empty(0, 8), torch.ones(8)
    y, rstd = ops.adaln_fwd(x, weight, modulation, modulation, EPS)
    dx, dweight, dshift, _ = ops.adaln_bwd(x, x, weight, modulation, rstd)
    assert y.shape == dx.shape == x.shape
    assert dshift.shape == (0, 8)
    assert torch.equal(dweight, torch.zeros(8))
    assert ops.swiglu_fwd(torch.empty(0, 6), None).shape == (0, 3)
    assert ops.philox_normal(0, 0, torch.empty(0, dtype=torch.int64), 5).shape == (0, 5)


GOOD = {
    "x": torch.zeros(2, 3, 8),
    "branch": torch.zeros(2, 3, 8),
    "gate": torch.zeros(2, 8),
    "weight": torch.ones(8),
    "shift": torch.zeros(2, 8),
    "scale": torch.zeros(2, 8),
    "bias": torch.zeros(8),
}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(2, 3, 8, dtype=torch.float64), "x must be float32 or bfloat16"),
        ("x", torch.zeros(2, 8, 3).transpose(1, 2), "x must be contiguous"),
        ("x", torch.zeros(6, 8), "branch has shape"),
        ("branch", torch.zeros(2, 3, 7), "branch has shape"),
        ("branch", torch.zeros(2, 3, 8, dtype=torch.float16), "branch must be float32 or bfloat16"),
        ("gate", torch.zeros(3, 8), r"gate must have shape \(2, 8\), not \(3, 8\)"),
        ("gate", torch.zeros(8), r"gate must have shape \(2, 8\), not \(8\)"),
        ("weight", torch.ones(7), r"weight must have shape \(8\), not \(7\)"),
        ("weight", torch.ones(8, dtype=torch.int64), "weight must be float32 or bfloat16"),
        ("scale", torch.zeros(2, 8, 1), "scale must have shape"),
        ("bias", torch.zeros(7), r"bias must have shape \(8\), not \(7\)"),
    ],
)
def test_bad_adaln_arguments_are_named(ops, name, value, message):
    with pytest.raises(RuntimeError, match=f"adaln_mid_fwd: {message}"):
        ops.adaln_mid_fwd(*(GOOD | {name: value}).values(), EPS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o: o.adaln_bwd(GOOD["x"], GOOD["x"], GOOD["weight"], GOOD["scale"], torch.ones(6)), "rstd must have"),
        (
            lambda o: o.qk_norm_rope_fwd(
                torch.zeros(1, 4, 12), [torch.ones(3)] * 2, *[torch.ones(4, 1)] * 2, 2, 0, EPS
            ),
            "odd",
        ),
        (
            lambda o: o.qk_norm_rope_fwd(
                torch.zeros(1, 4, 16), [torch.ones(4)] * 2, *[torch.ones(2, 2)] * 2, 2, 0, EPS
            ),
            "2 positions for 4",
        ),
        (
            lambda o: o.qk_norm_rope_fwd(
                torch.zeros(1, 4, 17), [torch.ones(4)] * 2, *[torch.ones(4, 2)] * 2, 2, 0, EPS
            ),
            "16 or 24",
        ),
        (
            lambda o: o.qk_norm_rope_fwd(
                torch.zeros(1, 4, 16), [torch.ones(4)] * 2, *[torch.ones(4, 2)] * 2, 2, -1, EPS
            ),
            "prefix is negative",
        ),
        (lambda o: o.swiglu_fwd(torch.zeros(2, 5), None), "must be even"),
        (lambda o: o.swiglu_bwd(torch.zeros(2, 4), torch.zeros(2, 4), None), "dy must have shape"),
        (lambda o: o.philox_normal(0, 0, torch.zeros(2), 4), "samples must be int64"),
        (lambda o: o.philox_normal(0, 0, torch.zeros(2, dtype=torch.int64), -4), "count is negative"),
        (
            lambda o: o.noise_injection(torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64), 0, 0.5, 0.0, 1.0),
            "samples must have",
        ),
        (lambda o: o.ema_([torch.zeros(3)], [torch.zeros(4)], torch.tensor(0.1), None), "has shape"),
        (lambda o: o.ema_([torch.zeros(3)], [], torch.tensor(0.1), None), "expected 1"),
    ],
)
def test_bad_arguments_are_named(ops, call, message):
    with pytest.raises(RuntimeError, match=message):
        call(ops)


def test_import_loads_nothing_and_a_missing_library_says_why(tmp_path):
    """The package copied without its libraries: it imports, and asking for an operation names the command to run."""
    (package := tmp_path / "unite_kernels").mkdir()
    source = Path(extension.__file__).parent
    for name in ("__init__.py", "extension.py"):
        (package / name).write_text(Path(source, name).read_text())
    code = (
        "import torch, unite_kernels.extension as e\n"
        "assert not e.obstacle.cache_info().currsize\n"
        "assert [l.present for l in e.status().values()] == [False, False], e.status()\n"
        "try:\n    e.load_cpu()\n"
        "except RuntimeError as error:\n    assert 'FOLDER_OF_THE_SOURCES' in e.BUILD in str(error), error\n"
        "else:\n    raise AssertionError('loaded')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_status_names_a_reason_exactly_when_absent():
    for library in extension.status().values():
        assert library.present == (library.reason == "")
