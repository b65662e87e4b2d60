"""Ceilings of kernels: stated, or measured on a device by running the shapes of a step through the vendor libraries."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from harness import copy_bandwidth, device_name, interleaved, quantiles
from step_work import Work
from torch.nn.attention import SDPBackend, sdpa_kernel

GEMMS, CONVS = 12, 4  # the shapes that take the most FLOPs are measured; others get the kind's mean
BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


@dataclass(frozen=True)
class Ceilings:
    """TFLOP/s of kinds of kernels and TB/s of memory. ``source`` says where they come from."""

    source: str
    gemm: float
    conv: float
    bandwidth: float  # TB/s, read and written
    attention: dict[int, tuple[float, float]] = field(default_factory=dict)  # tokens -> forward, backward; else gemm's
    gemms: dict[tuple[int, ...], float] = field(default_factory=dict)  # by shape, where measured
    convs: dict[tuple[int, ...], float] = field(default_factory=dict)

    def rate(self, work: Work) -> float:
        if work.kind == "gemm":
            return self.gemms.get(work.shape, self.gemm)
        if work.kind == "conv":
            return self.convs.get(work.shape, self.conv)
        if work.kind == "attention" and self.attention:
            tokens = min(self.attention, key=lambda t: abs(t - work.shape[2]))
            return self.attention[tokens][work.backward]
        return self.gemm

    def text(self) -> str:
        lines = [f"{self.source}: copy {self.bandwidth:.3g} TB/s, TFLOP/s: products {self.gemm:.3g} (weighted mean), "
                 f"convolutions {self.conv:.3g}"]  # fmt: skip
        lines += [f"  product {'x'.join(map(str, s)):>20}  {r:8.3g}" for s, r in self.gemms.items()]
        lines += [
            f"  attention {t:>4} tokens  forward {f:8.3g}  backward {b:8.3g}" for t, (f, b) in self.attention.items()
        ]
        return "\n".join(lines)


def _rate(flops: float, times: list[float]) -> float:
    """TFLOP/s from milliseconds."""
    return flops / quantiles(times)["median"] / 1e9


def _products(work: list[Work], device: torch.device, dtype: torch.dtype, rounds: int) -> dict[tuple[int, ...], float]:
    weights: Counter[tuple[int, ...]] = Counter()
    for item in work:
        if item.kind == "gemm" and item.part != "update":
            weights[item.shape] += item.flops * item.count
    rates = {}
    for shape in [s for s, _ in weights.most_common(GEMMS)]:
        rows, columns, depth = shape
        a, b = (torch.randn(s, device=device, dtype=dtype) for s in ((rows, depth), (columns, depth)))
        times = interleaved({"linear": lambda a=a, b=b: F.linear(a, b)}, device, rounds)["linear"]
        rates[shape] = _rate(2.0 * rows * columns * depth, times)
    return rates


def _attention(
    work: list[Work], device: torch.device, dtype: torch.dtype, rounds: int
) -> dict[int, tuple[float, float]]:
    """The fastest of torch's backends, forward and backward apart."""
    found = {}
    for shape in sorted({w.shape for w in work if w.kind == "attention"}):
        images, heads, tokens, size = shape
        flops = 4.0 * images * heads * tokens**2 * size
        q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
        best = [0.0, 0.0]
        for backend in BACKENDS if device.type == "cuda" else (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
            with sdpa_kernel(backend):
                try:
                    out = F.scaled_dot_product_attention(q, k, v)
                except RuntimeError:  # this backend does not take these shapes here
                    continue
                grad = torch.randn_like(out)
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


def measured_ceilings(work: list[Work], device: torch.device, rounds: int = 5) -> Ceilings:
    """Ceilings of this device for the kernels of ``work``, bfloat16 on a GPU and float32 on a CPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    gemms, convs = _products(work, device, dtype, rounds), _convolutions(work, device, dtype, rounds)
    spent: dict[str, float] = {"gemm": 0.0, "conv": 0.0}
    flops = dict(spent)
    for item in work:
        rate = {"gemm": gemms, "conv": convs}.get(item.kind, {}).get(item.shape)
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
