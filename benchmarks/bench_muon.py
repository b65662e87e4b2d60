"""Muon's whole update, sharded or not, and its Newton-Schulz forms, against torch.optim.Muon in one run.

    python benchmarks/bench_muon.py --device cuda             UNITE-B's matrices
    python benchmarks/bench_muon.py                           the digits demo's, on this CPU

update: our Optimizer (clip, Muon batched by shape, AdamW, EMA) against what the official code does: clip_grad_norm_,
torch.optim.Muon and torch.optim.AdamW, which go through the tensors one by one, and an EMA in a loop.
forms: Newton-Schulz alone, by bench_newton_schulz.py. sharded: Newton-Schulz of the matrices of one of RANKS ranks
against all of them: what sharding can save, before communication. Both optimizers' parameters are compared after one
step before anything is timed. Rows go to benchmarks/results/<device>/muon.jsonl.
"""

from __future__ import annotations

import argparse
import copy

import torch
from bench_newton_schulz import bench_newton_schulz
from bench_update import parameter_shapes
from harness import interleaved, launches, quantiles, ratio, record
from torch import Tensor, nn

from unite_fast.config import OptimConfig
from unite_fast.optim.groups import optimizer_of
from unite_fast.optim.optimizer import Optimizer
from unite_kernels.newton_schulz import newton_schulz

RANKS = 8
LR = 1e-4
# Largest difference of an update over its largest element: matrices pass a bfloat16 iteration, vectors do not.
AGREE = {"matrix": 5e-2, "vector": 1e-4}


class Tensors(nn.Module):
    """The model's parameters without the model."""

    def __init__(self, matrices: list[torch.Size], others: list[torch.Size], device: torch.device) -> None:
        super().__init__()
        generator = torch.Generator(device).manual_seed(0)

        def parameters(shapes: list[torch.Size], tag: str) -> nn.ParameterList:
            made = [nn.Parameter(torch.randn(s, generator=generator, device=device) * 0.02) for s in shapes]
            for parameter in made:
                parameter.optimizer = tag  # type: ignore[attr-defined]
            return nn.ParameterList(made)

        self.matrices, self.others = parameters(matrices, "muon"), parameters(others, "adamw")

    def set_gradients(self, gradients: list[Tensor]) -> None:
        for parameter, gradient in zip(self.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()


class Theirs:
    """torch's optimizers as the official code uses them."""

    def __init__(self, model: Tensors, config: OptimConfig) -> None:
        self.model, self.config = model, config
        self.muon = torch.optim.Muon(
            list(model.matrices), lr=LR, momentum=config.muon_momentum, weight_decay=0.0, nesterov=True, eps=1e-6,
            ns_steps=config.newton_schulz_steps, adjust_lr_fn="match_rms_adamw",
        )  # fmt: skip
        self.adamw = torch.optim.AdamW(list(model.others), lr=LR, betas=config.betas, eps=config.eps, weight_decay=0.0)
        self.ema = [p.detach().clone() for p in model.parameters()]

    def step(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.muon.step()
        self.adamw.step()
        with torch.no_grad():
            for average, parameter in zip(self.ema, self.model.parameters(), strict=True):
                average.mul_(self.config.ema_decay).add_(parameter, alpha=1 - self.config.ema_decay)


def bench_optimizers(shape: str, device: torch.device, rounds: int) -> dict:
    """The row of whole updates. Gradients are given anew to both in every call, at equal cost."""
    config = OptimConfig(newton_schulz_dtype="bf16")  # torch.optim.Muon has no other
    first = Tensors(*parameter_shapes(shape, device), device)
    models = {"ours": first, "ours_eager": copy.deepcopy(first), "torch": copy.deepcopy(first)}
    for model in models.values():
        for parameter, source in zip(model.parameters(), first.parameters(), strict=True):
            parameter.optimizer = source.optimizer  # type: ignore[attr-defined]
    before = [p.detach().clone() for p in first.parameters()]
    generator = torch.Generator(device).manual_seed(1)
    gradients = [torch.randn(p.shape, generator=generator, device=device) for p in before]
    ours = {name: Optimizer(models[name], config, backend)
            for name, backend in (("ours", "fused"), ("ours_eager", "eager"))}  # fmt: skip
    theirs = Theirs(models["torch"], config)
    forms = {name: (lambda o=o, m=models[name]: (m.set_gradients(gradients), o.step(LR))) for name, o in ours.items()}
    forms["torch"] = lambda: (models["torch"].set_gradients(gradients), theirs.step())
    for form in forms.values():
        form()
    for name in ours:
        for old, a, b in zip(before, models[name].parameters(), models["torch"].parameters(), strict=True):
            expected = b.detach() - old
            error = float((a.detach() - b.detach()).abs().max() / expected.abs().max())
            if not error < AGREE["matrix" if optimizer_of(a) == "muon" else "vector"]:
                shape_of = "x".join(map(str, a.shape))
                raise SystemExit(f"{name}: an update of {shape_of} is off by {error:.2g}; no speed is reported")
    times = interleaved(forms, device, rounds)
    return report(
        "update", shape, times, "ours", {"launches": {n: launches(f, device) for n, f in forms.items()}}, rounds
    )


def bench_sharded(shape: str, device: torch.device, rounds: int) -> dict:
    """Newton-Schulz of every RANKS-th matrix of each shape against all matrices."""
    generator = torch.Generator(device).manual_seed(0)
    counts: dict[tuple[int, ...], int] = {}
    for s in parameter_shapes(shape, device)[0]:
        counts[tuple(s)] = counts.get(tuple(s), 0) + 1
    whole = [torch.randn(n, *s, generator=generator, device=device) for s, n in counts.items()]
    share = [g[: -(-len(g) // RANKS)] for g in whole]  # the rank that has the most
    forms = {"one_rank": lambda: [newton_schulz(g) for g in share], "all": lambda: [newton_schulz(g) for g in whole]}
    sizes = {"ranks": RANKS, "matrices": sum(map(len, whole)), "of_one_rank": sum(map(len, share))}
    return report(f"newton_schulz, 1/{RANKS}", shape, interleaved(forms, device, rounds), "one_rank", sizes, rounds)


def report(name: str, shape: str, times: dict[str, list[float]], ours: str, sizes: dict, rounds: int) -> dict:
    """Prints a line of ratios and returns the row."""
    faster = {other: ratio(times, other, ours) for other in times if other != ours}
    said = "".join(f"  {o} {r['median']:.2f}x ({r['p20']:.2f}..{r['p80']:.2f})" for o, r in faster.items())
    print(f"{name:20}{shape:8}{ours}: 1{said}", flush=True)
    ms = {variant: quantiles(values) for variant, values in times.items()}
    return {"component": name, "shape": shape, "ms": ms, "faster_than": faster, "sizes": sizes, "n": rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=("digits", "base"), help="digits on a CPU, base on a GPU")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-record", action="store_true", help="print only")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    shape = arguments.shape or ("base" if device.type == "cuda" else "digits")
    if device.type == "cpu":
        torch.set_flush_denormal(True)

    def forms() -> dict:
        times, sizes = bench_newton_schulz(shape, device, arguments.rounds)
        return report("newton_schulz", shape, times, "fused", sizes, arguments.rounds)

    for measure in (
        lambda: bench_optimizers(shape, device, arguments.rounds),
        forms,
        lambda: bench_sharded(shape, device, arguments.rounds),
    ):
        row = measure()
        if not arguments.no_record:  # at once: what follows may run out of time
            print(f"1 row in {record('muon', device, [row]).name}", flush=True)


if __name__ == "__main__":
    main()
