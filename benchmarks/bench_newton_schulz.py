"""Newton-Schulz of all of Muon's matrices, batched by shape, against torch.optim.Muon's function per tensor.

Run by bench_kernels.py. "fused" is what the optimizer takes.
"""

from __future__ import annotations

from collections import Counter

import torch
from bench_update import parameter_shapes
from harness import interleaved, launches
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz as torch_muon

from unite_kernels.newton_schulz import COEFFICIENTS, newton_schulz

WORST = 1.1  # times torch.optim.Muon's error against float64, for a speed to be reported


def exact(g: Tensor) -> Tensor:
    a, b, c = COEFFICIENTS
    x = g.double()
    x = x.mT if x.shape[0] > x.shape[1] else x
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if g.shape[0] > g.shape[1] else x


def error_over_muon(g: Tensor) -> float:
    """Error of ours over torch.optim.Muon's, for one matrix."""
    truth = exact(g)
    ours, theirs = newton_schulz(g), torch_muon(g, COEFFICIENTS, 5, 1e-7)
    return ((ours.double() - truth).norm() / (theirs.double() - truth).norm()).item()


def bench_newton_schulz(shape: str, device: torch.device, rounds: int) -> tuple[dict[str, list[float]], dict]:
    """Times of "fused" and "torch_muon"; sizes and the error."""
    generator = torch.Generator(device).manual_seed(0)
    counts = Counter(tuple(s) for s in parameter_shapes(shape, device)[0])
    batches = [torch.randn(n, *s, generator=generator, device=device) for s, n in counts.items()]
    error = max(error_over_muon(g[0]) for g in batches)
    if not error <= WORST:
        raise SystemExit(f"newton_schulz: {error:.2f} times Muon's error, no speed is reported")
    variants = {
        "fused": lambda: [newton_schulz(g) for g in batches],
        "torch_muon": lambda: [torch_muon(m, COEFFICIENTS, 5, 1e-7) for g in batches for m in g],
    }
    sizes = {"matrices": {"x".join(map(str, s)): n for s, n in counts.items()}, "error_over_muon": error}
    sizes["launches"] = launches(variants["fused"], device)
    return interleaved(variants, device, rounds), sizes
