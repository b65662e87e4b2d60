"""Kernels against eager torch and torch.compile, forward and backward, as ratios measured side by side in one run.

    python benchmarks/bench_kernels.py                     every component on this machine's CPU, float32
    python benchmarks/bench_kernels.py --device cuda       all of them on the GPU, bfloat16, with GB/s
    python benchmarks/bench_kernels.py --only adaln_mid    one component

Each kernel is compared with the eager result before it is timed; a component that is wrong prints no speed. Rows go to
benchmarks/results/<device>/kernels.jsonl. GB/s counts the least traffic of the operation (docs/DESIGN.md: residual
elements of 4 bytes, branch elements of 2 on the GPU and 4 on the CPU), not what a kernel happens to move.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch._dynamo
import torch._functorch.config
from bench_corruption import bench_corruption
from bench_lpips_head import bench_lpips_head
from bench_newton_schulz import bench_newton_schulz
from bench_update import bench_update
from direct_cpu import direct
from harness import copy_bandwidth, interleaved, quantiles, ratio, record, require_equal
from torch import Tensor

from unite_kernels import extension
from unite_kernels.adaln import adaln, adaln_mid, adaln_tail
from unite_kernels.qk_norm_rope import qk_norm_rope
from unite_kernels.swiglu import swiglu


@dataclass(frozen=True)
class Sizes:
    """batch, tokens, width D, heads, hidden width F of the MLP."""

    batch: int
    tokens: int
    width: int
    heads: int
    hidden: int


# "digits": the demo's encoder; "base": UNITE-B's tokenization pass; "flow": the rows of three of its flow passes.
SIZES = {
    "cpu": {"digits": Sizes(64, 17, 64, 4, 256), "base": Sizes(8, 544, 768, 12, 2048)},
    "cuda": {"base": Sizes(64, 544, 768, 12, 2048), "flow": Sizes(192, 288, 768, 12, 2048)},
}


# Components with a file of their own; the LPIPS head has kernels on a GPU alone.
OTHERS = {
    "cpu": ("update", "corruption", "newton_schulz"),
    "cuda": ("update", "corruption", "newton_schulz", "lpips_head"),
}
SLOW = ("cpu", "base")  # where Newton-Schulz would take minutes


@dataclass(frozen=True)
class Component:
    """A public operation: ``call(inputs, backend)``; least bytes of a row forward and backward from (sizes, r, b),
    r and b being the bytes of a residual and of a branch element."""

    call: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: Callable[[Sizes, Callable, torch.dtype], list[Tensor]]
    forward_bytes: Callable[[Sizes, int, int], int]
    backward_bytes: Callable[[Sizes, int, int], int]
    constant_inputs: int = 0  # trailing inputs without a gradient


def _modulations(s: Sizes, randn: Callable, count: int) -> list[Tensor]:
    return list((randn(s.batch, count * s.width) * 0.3).chunk(count, dim=-1))


def _residual_inputs(s: Sizes, randn: Callable, dtype: torch.dtype, norms: int) -> list[Tensor]:
    gate, shift, scale = _modulations(s, randn, 3)
    rows = s.batch, s.tokens, s.width
    weights, bias = [randn(s.width) * 0.1 + 1 for _ in range(norms)], randn(s.width) * 0.1
    return [randn(*rows), randn(*rows).to(dtype), gate, *weights, shift, scale, bias]


def _qk_inputs(s: Sizes, randn: Callable, dtype: torch.dtype) -> list[Tensor]:
    head_dim = s.width // s.heads
    angle = randn(s.tokens, head_dim // 2)
    weights, bias = [randn(head_dim) * 0.1 + 1 for _ in range(2)], randn(3 * s.width) * 0.1
    return [randn(s.batch, s.tokens, 3 * s.width).to(dtype), *weights, bias, angle.cos(), angle.sin()]


COMPONENTS = {
    "adaln": Component(
        lambda i, backend, s: adaln(*i, backend=backend),
        lambda s, randn, dtype: [randn(s.batch, s.tokens, s.width), randn(s.width), *_modulations(s, randn, 2)],
        lambda s, r, b: 2 * r * s.width,
        lambda s, r, b: 3 * r * s.width,
    ),
    "adaln_mid": Component(
        lambda i, backend, s: adaln_mid(*i, backend=backend),
        lambda s, randn, dtype: _residual_inputs(s, randn, dtype, 1),
        lambda s, r, b: (2 * r + 2 * b) * s.width,
        lambda s, r, b: (3 * r + 3 * b) * s.width,
    ),
    "adaln_tail": Component(
        lambda i, backend, s: adaln_tail(*i, backend=backend),
        lambda s, randn, dtype: _residual_inputs(s, randn, dtype, 2),
        lambda s, r, b: (2 * r + 2 * b) * s.width,
        lambda s, r, b: (3 * r + 3 * b) * s.width,
    ),
    "qk_norm_rope": Component(
        lambda i, backend, s: qk_norm_rope(i[0], i[1:3], *i[4:], s.heads, bias=i[3], backend=backend),
        _qk_inputs,
        lambda s, r, b: 4 * b * s.width,
        lambda s, r, b: 8 * b * s.width,
        constant_inputs=2,
    ),
    "swiglu": Component(
        lambda i, backend, s: swiglu(*i, backend=backend),
        lambda s, randn, dtype: [randn(s.batch, s.tokens, 2 * s.hidden).to(dtype), randn(2 * s.hidden)],
        lambda s, r, b: 3 * b * s.hidden,
        lambda s, r, b: 5 * b * s.hidden,
    ),
}


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


class Passes:
    """Forward, backward, and both, of one form of a component."""

    def __init__(self, function: Callable, component: Component, inputs: list[Tensor], gradients: list[Tensor]) -> None:
        wanted = len(inputs) - component.constant_inputs
        self.function, self.gradients = function, gradients
        self.inputs = [x.detach().clone().requires_grad_(i < wanted) for i, x in enumerate(inputs)]
        self.leaves = self.inputs[:wanted]
        self.outputs = _as_tuple(function(self.inputs))

    def forward(self) -> None:
        self.outputs_again()

    def outputs_again(self) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return _as_tuple(self.function(self.inputs))

    def backward(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.outputs, self.leaves, self.gradients, retain_graph=True)

    def both(self) -> None:
        torch.autograd.grad(_as_tuple(self.function(self.inputs)), self.leaves, self.gradients)


def bench_component(name: str, shape: str, device: torch.device, rounds: int, bandwidth: float) -> list[dict]:
    component, sizes = COMPONENTS[name], SIZES[device.type][shape]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    inputs = component.inputs(sizes, randn, dtype)
    forms = {form: (lambda i, b=form: component.call(i, b, sizes)) for form in ("fused", "eager")}
    if device.type == "cpu":
        forms["direct"] = direct(name, sizes.heads)
    torch._dynamo.reset()  # else the shared code above meets the limit of recompilations and runs eagerly
    forms["compile"] = torch.compile(forms["eager"], dynamic=False, fullgraph=True)
    outputs = _as_tuple(forms["eager"](inputs))
    gradients = [randn(*o.shape).to(o.dtype) for o in outputs]
    passes = {form: Passes(f, component, inputs, gradients) for form, f in forms.items()}
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    ours, reference = ([*p.outputs, *p.backward()] for p in (passes["fused"], passes["eager"]))
    require_equal(name, ours, reference, tolerance)
    residual = 2 if dtype == torch.bfloat16 and inputs[0].dtype == dtype else 4
    least = {"fwd": component.forward_bytes, "bwd": component.backward_bytes}
    rows = []
    for kind in ("fwd", "bwd", "fwd+bwd"):
        method = {"fwd": "forward", "bwd": "backward", "fwd+bwd": "both"}[kind]
        times = interleaved({form: getattr(p, method) for form, p in passes.items()}, device, rounds)
        bytes_ = sum(f(sizes, residual, dtype.itemsize) for k, f in least.items() if k in kind.split("+"))
        rate = bytes_ * sizes.batch * sizes.tokens / quantiles(times["fused"])["median"] / 1e6
        rows.append(report(f"{name} {kind}", shape, times, rate, bandwidth))
        rows[-1] |= {"sizes": vars(sizes), "dtype": str(dtype).removeprefix("torch."), "n": rounds}
    return rows


def passes_of(name: str, sizes: Sizes, device: torch.device, backend: str) -> Passes:
    """The passes of one component from random inputs, bfloat16 on a GPU, by one backend alone."""
    component, dtype = COMPONENTS[name], torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    def function(inputs: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
        return component.call(inputs, backend, sizes)

    passes = Passes(function, component, component.inputs(sizes, randn, dtype), [])
    passes.gradients = [randn(*o.shape).to(o.dtype) for o in passes.outputs]
    return passes


def bench_others(name: str, shape: str, device: torch.device, rounds: int, bandwidth: float) -> list[dict]:
    """The components with a file of their own."""
    if name == "update":
        results = {"multi-tensor update": bench_update(shape, device, rounds)}
    elif name == "corruption":
        results = {name: bench_corruption(shape, device, rounds)}
    elif name == "lpips_head":
        results = {f"{name} {kind}": r for kind, r in bench_lpips_head(device, rounds).items()}
    else:
        times, sizes = bench_newton_schulz(shape, device, rounds)
        results = {name: (times, None, sizes)}
    rows = []
    for label, (times, rate, sizes) in results.items():
        rows.append(report(label, shape, times, rate, bandwidth) | {"sizes": sizes, "n": rounds})
        rows[-1]["dtype"] = "bfloat16" if name in ("newton_schulz", "lpips_head") else "float32"
    return rows


def report(name: str, shape: str, times: dict[str, list[float]], rate: float | None, bandwidth: float) -> dict:
    """Prints a line and returns the row of one comparison; ``rate`` in GB/s, None where bytes are not the measure."""
    speedups = {other: ratio(times, other, "fused") for other in times if other != "fused"}
    compared = "".join(f"  {o} {r['median']:5.2f}x ({r['p20']:.2f}..{r['p80']:.2f})" for o, r in speedups.items())
    median = quantiles(times["fused"])["median"]
    speed = " " * 26 if rate is None else f"{rate:7.1f} GB/s = {rate / bandwidth:4.2f} copy"
    print(f"{name:22} {shape:6} {median:9.3f} ms  {speed} {compared}", flush=True)
    milliseconds = {variant: quantiles(values) for variant, values in times.items()}
    rates = {"gb_per_s": None if rate is None else round(rate, 2), "copy_gb_per_s": round(bandwidth, 2)}
    return {"component": name, "shape": shape, "ms": milliseconds, "faster_than": speedups} | rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", choices=(*COMPONENTS, *OTHERS["cuda"]), help="one component")
    parser.add_argument("--shape", help="one set of shapes")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-record", action="store_true", help="print only")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch._functorch.config.donated_buffer = False  # a compiled backward may then run more than once
    device = torch.device(arguments.device)
    shapes = tuple(SIZES[device.type])
    if arguments.shape not in (None, *shapes):
        parser.error(f"--shape on {device.type} is one of {', '.join(shapes)}")
    if device.type == "cpu":
        extension.load_cpu()
    elif arguments.only in (None, "update"):  # the others are Triton's there
        extension.load_cuda()
    bandwidth = copy_bandwidth(device)
    print(
        f"copy {bandwidth:.1f} GB/s; a fused kernel's time, then how many times slower the other forms are (p20..p80)"
    )
    print("fused is the public function; direct the C++ calls without the registered operation around them")
    for shape in (arguments.shape,) if arguments.shape else shapes:
        rows = []
        for name in COMPONENTS:
            if arguments.only in (None, name):
                rows += bench_component(name, shape, device, arguments.rounds, bandwidth)
        for name in OTHERS[device.type] if shape != "flow" else ():
            if arguments.only in (None, name) and not (name == "newton_schulz" and (device.type, shape) == SLOW):
                rows += bench_others(name, shape, device, arguments.rounds, bandwidth)
        if rows and not arguments.no_record:  # at once: another shape may not fit, or time may run out
            path = record("kernels", device, rows)
            print(f"{len(rows)} rows in {path.relative_to(path.parents[3])}", flush=True)


if __name__ == "__main__":
    main()
