"""The multi-tensor update (clip, AdamW, Muon without Newton-Schulz, EMA) against torch._foreach and a Python loop.

Run by bench_kernels.py. Lists: every parameter of the digits demo, or of UNITE-B (on a CPU every eighth tensor).
"""

from __future__ import annotations

import math

import torch
from harness import ROOT, interleaved, quantiles, require_equal
from torch import Tensor

from unite_fast.config import ModelConfig, yaml_text
from unite_fast.model.unite import UNITE
from unite_fast.optim.groups import split_parameters
from unite_kernels import multi_tensor

SAMPLED = 8
State = dict[
    str, list[Tensor]
]  # Muon's parameters mp, gradients mg, buffers b, EMA me, updates u; AdamW's vp vg m v ve


def parameter_shapes(shape: str, device: torch.device) -> tuple[list[torch.Size], list[torch.Size]]:
    """Shapes of Muon's matrices and of AdamW's tensors."""
    config = yaml_text.load(ROOT / "configs" / "digits.yaml").model if shape == "digits" else ModelConfig()
    with torch.device("meta"):
        muon, adamw = split_parameters(UNITE(config))
    keep = SAMPLED if shape == "base" and device.type == "cpu" else 1
    return [p.shape for p in muon.values()][::keep], [p.shape for p in adamw.values()][::keep]


def loop_update(state: State, lr: float) -> None:
    """A Python loop over tensors with the arithmetic of torch.optim's single-tensor forms."""
    grads = [*state["mg"], *state["vg"]]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads]))
    coef = (3.0 / (norm + 1e-6)).clamp(max=1.0)
    for p, g, m, v, e in zip(*(state[k] for k in ("vp", "vg", "m", "v", "ve")), strict=True):
        g = g * coef
        m.lerp_(g, 0.1)
        v.mul_(0.999).addcmul_(g, g, value=0.001)
        p.addcdiv_(m, (v.sqrt() / math.sqrt(0.001)).add_(1e-6), value=-lr / 0.1)
        e.lerp_(p, 0.0022)
    for p, g, b, e in zip(*(state[k] for k in ("mp", "mg", "b", "me")), strict=True):
        g = g * coef
        b.lerp_(g, 0.05)
        update = g.lerp(b, 0.95)
        p.add_(update, alpha=-lr * 0.2 * math.sqrt(max(p.shape)))
        e.lerp_(p, 0.0022)


def library_update(state: State, lr: Tensor, backend: str) -> None:
    _, coef, _ = multi_tensor.clip([*state["mg"], *state["vg"]], 3.0, backend)
    moments = (state["m"], state["v"], torch.zeros_like(lr), lr)
    shared = {"ema_decay": 0.9978, "backend": backend}
    multi_tensor.adamw_step_(state["vp"], state["vg"], *moments, clip_coef=coef, ema=state["ve"], **shared)
    multi_tensor.muon_momentum_(state["mg"], state["b"], clip_coef=coef, out=state["u"], backend=backend)
    scales = [0.2 * math.sqrt(max(p.shape)) for p in state["mp"]]
    multi_tensor.muon_apply_(state["mp"], state["u"], lr, scales, ema=state["me"], **shared)


def least_bytes(state: State) -> int:
    """Norm 4; AdamW with EMA 36; Muon momentum 12 and apply with EMA 16, and the update written and read."""
    muon, adamw, update = (sum(t.numel() for t in state[k]) for k in ("mp", "vp", "u"))
    return (4 + 36) * adamw + (4 + 12 + 16) * muon + 2 * state["u"][0].element_size() * update


def bench_update(shape: str, device: torch.device, rounds: int) -> tuple[dict[str, list[float]], float, dict]:
    """Times of "fused", "foreach" and "loop"; GB/s of the least traffic; the sizes."""
    matrices, others = parameter_shapes(shape, device)

    def fresh() -> State:
        generator = torch.Generator(device).manual_seed(0)
        lists = dict.fromkeys(("mp", "mg", "b", "me", "u"), matrices) | dict.fromkeys(
            ("vp", "vg", "m", "v", "ve"), others
        )
        state = {k: [torch.randn(s, generator=generator, device=device) for s in shapes] for k, shapes in lists.items()}
        return state | {"v": [v.abs() for v in state["v"]]}

    lr = torch.tensor(1e-4, device=device)
    loop, fused, foreach = fresh(), fresh(), fresh()
    loop_update(loop, 1e-4)
    library_update(fused, lr, "fused")
    for key in set(loop) - {"u"}:
        require_equal(f"multi-tensor update, list {key}", fused[key], loop[key], 1e-5)
    variants = {
        "fused": lambda: library_update(fused, lr, "fused"),
        "foreach": lambda: library_update(foreach, lr, "eager"),
        "loop": lambda: loop_update(loop, 1e-4),
    }
    times = interleaved(variants, device, rounds)
    elements = sum(s.numel() for s in (*matrices, *others))
    sizes = {"muon_tensors": len(matrices), "adamw_tensors": len(others), "elements": elements}
    return times, least_bytes(fused) / quantiles(times["fused"])["median"] / 1e6, sizes
