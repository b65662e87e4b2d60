"""The LPIPS head over VGG16's five feature maps, forward and backward, against eager and torch.compile.

Run by bench_kernels.py on a GPU (there is no C++ form). Gradients of the second maps alone, as in training.
"""

from __future__ import annotations

import torch
from harness import interleaved, quantiles, require_equal
from torch import Tensor

from unite_kernels.lpips_head import lpips_head

CHANNELS = (64, 128, 256, 512, 512)
BATCH, SIDE = 32, 256  # images, and the side of the first map


def maps(batch: int, side: int, device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], ...]:
    generator = torch.Generator(device).manual_seed(0)

    def features(i: int, channels: int) -> Tensor:
        size = batch, channels, side >> i, side >> i
        f = torch.randn(size, generator=generator, device=device).relu() + 0.01
        return f.to(dtype).contiguous(memory_format=torch.channels_last)

    first, second = ([features(i, c) for i, c in enumerate(CHANNELS)] for _ in range(2))
    return first, [f.requires_grad_() for f in second], [torch.rand(c, device=device) for c in CHANNELS]


def bench_lpips_head(
    device: torch.device, rounds: int, batch: int = BATCH, side: int = SIDE
) -> dict[str, tuple[dict[str, list[float]], float, dict]]:
    """For "fwd" and "bwd": times of "fused", "eager" and "compile", GB/s of the least traffic, the sizes."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    first, second, weights = maps(batch, side, device, dtype)
    forms = {b: (lambda b=b: lpips_head(first, second, weights, b)) for b in ("fused", "eager")}
    torch._dynamo.reset()
    forms["compile"] = torch.compile(forms["eager"], dynamic=False, fullgraph=True)
    outputs = {name: form() for name, form in forms.items()}
    dout = torch.ones(batch, device=device)

    def backward(name: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs[name], second, dout, retain_graph=True)

    ours, reference = ([outputs[name], *backward(name)] for name in ("fused", "eager"))
    require_equal("lpips_head", ours, reference, 1e-4 if dtype == torch.float32 else 3e-2)
    elements = sum(f.numel() for f in first)
    sizes = {"batch": batch, "side": side, "channels": CHANNELS}

    def forward(name: str) -> Tensor:
        with torch.no_grad():
            return forms[name]()

    results = {}
    for kind, call, tensors in (("fwd", forward, 2), ("bwd", backward, 3)):
        times = interleaved({name: (lambda name=name, call=call: call(name)) for name in forms}, device, rounds)
        rate = tensors * dtype.itemsize * elements / quantiles(times["fused"])["median"] / 1e6
        results[kind] = times, rate, sizes
    return results
