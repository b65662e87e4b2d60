"""The random draws of a step (tokenizer, noise injection, three corrupted flow steps, label drop) against eager.

Run by bench_kernels.py. Latents: the digits demo's, or UNITE-B's 256 registers of 32.
"""

from __future__ import annotations

import torch
from harness import interleaved, launches, quantiles, require_equal
from torch import Tensor

from unite_kernels import corruption

SIZES = {
    "cpu": {"digits": (64, 16, 16), "base": (8, 256, 32)},
    "cuda": {"base": (64, 256, 32)},
}
STEPS = 3


def draws(z: Tensor, labels: Tensor, samples: Tensor, backend: str) -> list[Tensor]:
    noise, t = corruption.draw_tokenizer(5, samples, tuple(z.shape[1:]), 0.3, backend)
    noised = corruption.noise_injection(z, samples, 5, 0.5, 0.7, 1.0, backend)
    flow = corruption.flow_corruption(z, labels, samples, 5, STEPS, "logit_normal", 0.0, 1.0, 0.5, 0.1, 1000, backend)
    return [noise, t, noised, *flow]


def bench_corruption(shape: str, device: torch.device, rounds: int) -> tuple[dict[str, list[float]], float, dict]:
    """Times of "fused" and "eager"; GB/s of the least traffic (float32 latents); the sizes and, on a GPU, launches."""
    size = SIZES[device.type][shape]
    z = torch.randn(size, generator=torch.Generator(device).manual_seed(0), device=device)
    samples = torch.arange(size[0], device=device)
    labels = samples % 1000
    require_equal("draws", *([x.float() for x in draws(z, labels, samples, b)] for b in ("fused", "eager")), 1e-6)
    variants = {b: (lambda b=b: draws(z, labels, samples, b)) for b in ("fused", "eager")}
    times = interleaved(variants, device, rounds)
    least = 4 * z.numel() * (1 + 2 + 1 + STEPS)
    sizes = {"latents": size, "steps": STEPS, "launches": launches(variants["fused"], device)}
    return times, least / quantiles(times["fused"])["median"] / 1e6, sizes
