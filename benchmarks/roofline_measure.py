"""Ceilings of kernels: stated, or measured on a device by running a step's shapes through the vendor libraries, in the
layouts and dtypes of the step: a product's transposes and its output's dtype, attention's inputs as they lie."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from attention_inputs import queries_keys_values
from harness import copy_bandwidth, device_name, interleaved, quantiles
from step_work import Work
from torch.nn.attention import SDPBackend, sdpa_kernel

from unite_kernels import copied_linear

GEMMS, CONVS = 18, 4  # the shapes that take the most FLOPs are measured; others get the kind's mean
BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


@dataclass(frozen=True)
class Ceilings:
    """TFLOP/s of kinds of kernels and TB/s of memory. ``source`` says where they come from."""

    source: str
    gemm: float
    conv: float
    bandwidth: float  # TB/s, read and written
    attention: dict[int, tuple[float, float]] = field(default_factory=dict)  # tokens -> forward, backward; else gemm's
    gemms: dict[tuple, float] = field(default_factory=dict)  # by form and shape, where measured
    convs: dict[tuple[int, ...], float] = field(default_factory=dict)

    def rate(self, work: Work) -> float:
        if work.kind == "gemm":
            return self.gemms.get((work.form, *work.shape), self.gemm)
        if work.kind == "conv":
            return self.convs.get(work.shape, self.conv)
        if work.kind == "attention" and self.attention:
            tokens = min(self.attention, key=lambda t: abs(t - work.shape[2]))
            return self.attention[tokens][work.backward]
        return self.gemm

    def text(self) -> str:
        lines = [f"{self.source}: copy {self.bandwidth:.3g} TB/s, TFLOP/s: products {self.gemm:.3g} (weighted mean), "
                 f"convolutions {self.conv:.3g}"]  # fmt: skip
        lines += [f"  product {f:8}{'x'.join(map(str, s)):>20}  {r:8.3g}" for (f, *s), r in self.gemms.items()]
        lines += [
            f"  attention {t:>4} tokens  forward {f:8.3g}  backward {b:8.3g}" for t, (f, b) in self.attention.items()
        ]
        return "\n".join(lines)


def _rate(flops: float, times: list[float]) -> float:
    """TFLOP/s from milliseconds."""
    return flops / quantiles(times)["median"] / 1e9


def product(form: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype):
    """A call of one product of a linear layer as the step does it, from its ``form`` and ``shape`` (step_work.py)."""
    m, n, k = shape
    if form == "weight":  # dy^T x, both with the rows of the batch outside, into float32
        x, dy = torch.randn(k, m, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
        return lambda: copied_linear._weight_gradient(dy, x)
    a = torch.randn(m, k, device=device, dtype=dtype)
    if form == "input":  # dy W, W as it is stored
        w = torch.randn(k, n, device=device, dtype=dtype)
        return lambda: torch.mm(a, w)
    w = torch.randn(n, k, device=device, dtype=dtype)
    return lambda: F.linear(a, w)


def _products(work: list[Work], device: torch.device, dtype: torch.dtype, rounds: int) -> dict[tuple, float]:
    """TFLOP/s by form and shape, of those that take the most FLOPs."""
    weights: Counter[tuple] = Counter()
    for item in work:
        if item.kind == "gemm" and item.part != "update":
            weights[item.form, *item.shape] += item.flops * item.count
    rates = {}
    for form, *shape in [key for key, _ in weights.most_common(GEMMS)]:
        times = interleaved({"x": product(form, tuple(shape), device, dtype)}, device, rounds)["x"]
        rates[form, *shape] = _rate(2.0 * shape[0] * shape[1] * shape[2], times)
    return rates


def _attention(
    work: list[Work], device: torch.device, dtype: torch.dtype, rounds: int
) -> dict[int, tuple[float, float]]:
    """The fastest of torch's backends, forward and backward apart."""
    found = {}
    for shape, decoder in sorted({w.shape: w.part == "decode" for w in work if w.kind == "attention"}.items()):
        images, heads, tokens, size = shape
        flops = 4.0 * images * heads * tokens**2 * size
        q, k, v = queries_keys_values(shape, device, dtype, decoder=decoder)
        best = [0.0, 0.0]
        for backend in BACKENDS if device.type == "cuda" else (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
            with sdpa_kernel(backend):
                try:
                    out = F.scaled_dot_product_attention(q, k, v)
                except RuntimeError:  # this backend does not take these shapes here
                    continue
                grad = torch.randn_like(out)  # contiguous in the order of out
                forms = {
                    "forward": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q.detach(), k.detach(), v.detach()),
                    "backward": lambda o=out, g=grad, q=q, k=k, v=v: torch.autograd.grad(
                        o, (q, k, v), g, retain_graph=True
                    ),
                }
                times = interleaved(forms, device, rounds)
            best[0] = max(best[0], _rate(flops, times["forward"]))
            best[1] = max(best[1], _rate(2 * flops, times["backward"]))
        found[tokens] = (best[0], best[1])
    return found


def _convolutions(
    work: list[Work], device: torch.device, dtype: torch.dtype, rounds: int
) -> dict[tuple[int, ...], float]:
    weights = Counter({w.shape: w.flops for w in work if w.kind == "conv" and not w.backward})
    rates = {}
    for shape in [s for s, _ in weights.most_common(CONVS)]:
        images, cin, cout, side = shape
        x = torch.randn(images, cin, side, side, device=device, dtype=dtype).contiguous(
            memory_format=torch.channels_last
        )
        w = torch.randn(cout, cin, 3, 3, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
        times = interleaved({"conv": lambda x=x, w=w: F.conv2d(x, w, padding=1)}, device, rounds)["conv"]
        rates[shape] = _rate(2.0 * 9 * cin * cout * images * side**2, times)
    return rates


def fp8_layers(work: list[Work], device: torch.device, rounds: int) -> Iterator[dict]:
    """Of the widest layers: milliseconds of forward and backward in bfloat16 ("half"), in float8 with the quantisation
    around the products ("scaled"), and of the two float8 products alone ("products")."""
    layers = Counter({w.shape: w.flops * w.count for w in work if w.form == "forward" and w.part != "update"})
    for shape in [s for s, _ in layers.most_common(8) if not any(n % copied_linear.MULTIPLE for n in s)]:
        times = interleaved(_fp8_calls(shape, device), device, rounds)
        yield {"shape": shape, "ms": {name: quantiles(values)["median"] for name, values in times.items()}}


def _fp8_calls(shape: tuple[int, ...], device: torch.device) -> dict[str, Callable[[], object]]:
    rows, outputs, inputs = shape
    x = torch.randn(rows, inputs, device=device).bfloat16().requires_grad_()
    weight, dy = torch.randn(outputs, inputs, device=device), torch.randn(rows, outputs, device=device).bfloat16()
    half, e4m3, one = weight.bfloat16(), torch.float8_e4m3fn, torch.ones((), device=device)
    copy, transposed = (torch.empty(s, dtype=e4m3, device=device) for s in ((outputs, inputs), (inputs, outputs)))
    scaled = (copy, torch.empty_like(one), transposed, torch.empty_like(one))
    copied_linear.write_scaled_(weight, *scaled)
    x8, dy8 = copied_linear.quantise(x.detach(), e4m3)[0], copied_linear.quantise(dy, torch.float8_e5m2)[0]

    def in_half() -> object:
        y = copied_linear.half_linear(x, weight, None, half, None, (0, outputs))
        return torch.autograd.grad(y, x, dy)

    def in_float8() -> object:
        y = copied_linear.scaled_linear(x, weight, None, scaled, None, (0, outputs))
        return torch.autograd.grad(y, x, dy)

    def products() -> object:
        y = torch._scaled_mm(x8, copy.t(), one, one, out_dtype=x.dtype, use_fast_accum=True)
        return y, torch._scaled_mm(dy8, transposed.t(), one, one, out_dtype=x.dtype)

    return {"half": in_half, "scaled": in_float8, "products": products}


def rows(work: list[Work], device: torch.device, dtype: torch.dtype, rounds: int) -> Iterator[dict]:
    """Every ceiling as a row, one by one, each as soon as it is measured."""
    yield {"kind": "copy", "tb_per_s": copy_bandwidth(device, 3 * rounds) / 1e3}
    side = 8192 if device.type == "cuda" else 64
    flat = product("forward", (side, side, side), device, dtype)
    yield {"kind": "product", "form": "square", "shape": (side,) * 3,
           "tflops": _rate(2.0 * side**3, interleaved({"x": flat}, device, rounds)["x"])}  # fmt: skip
    for (form, *shape), rate in _products(work, device, dtype, rounds).items():
        yield {"kind": "product", "form": form, "shape": shape, "tflops": rate}
    for tokens, (forward, backward) in _attention(work, device, dtype, rounds).items():
        yield {"kind": "attention", "tokens": tokens, "tflops": {"forward": forward, "backward": backward}}
    for shape, rate in _convolutions(work, device, dtype, rounds).items():
        yield {"kind": "convolution", "shape": shape, "tflops": rate}
    for row in fp8_layers(work, device, rounds):
        yield {"kind": "fp8"} | row


def measured_ceilings(work: list[Work], device: torch.device, rounds: int = 5) -> Ceilings:
    """Ceilings of this device for the kernels of ``work``, bfloat16 on a GPU and float32 on a CPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    gemms, convs = _products(work, device, dtype, rounds), _convolutions(work, device, dtype, rounds)
    spent: dict[str, float] = {"gemm": 0.0, "conv": 0.0}
    flops = dict(spent)
    for item in work:
        rates = {"gemm": gemms, "conv": convs}.get(item.kind, {})
        rate = rates.get((item.form, *item.shape) if item.kind == "gemm" else item.shape)
        if rate:
            spent[item.kind] += item.flops * item.count / rate
            flops[item.kind] += item.flops * item.count
    mean = {kind: flops[kind] / spent[kind] if spent[kind] else 0.0 for kind in spent}
    return Ceilings(
        f"measured on {device_name(device)}, {str(dtype).removeprefix('torch.')}",
        mean["gemm"],
        mean["conv"] or mean["gemm"],
        copy_bandwidth(device) / 1e3,
        _attention(work, device, dtype, rounds),
        gemms,
        convs,
    )
