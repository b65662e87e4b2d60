"""The official UNITE code and ours, side by side: equal weights, equal draws, equal losses, then time.

    python benchmarks/compare_official.py --official-dir PATH [--device cuda --precision bf16 --batch 64]

PATH is the user's own clone of the official repository with its requirements installed; nothing of it is kept here.
One process holds both models at Base/Base. First both compute the same step from the same draws: when the losses or
the gradient norm differ, no time is taken. Then forward + backward, the optimizer step (clip, AdamW, Muon, EMA) and
sampling (Heun with guidance) are timed in turn within each round. The official code runs as it is and, unless
--no-compile is given, with its encoder and decoder compiled and LPIPS in channels_last, the fair expert's baseline.
LPIPS has random weights unless --vgg names torchvision's file; its dropout is off on both sides.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from harness import interleaved, quantiles, ratio, record
from official import Official, replayed, wake
from torch import Tensor

from unite_fast import interop, objective
from unite_fast.config import EncoderConfig, ModelConfig, ObjectiveConfig, OptimConfig
from unite_fast.losses import Perceptual
from unite_fast.model.unite import UNITE
from unite_fast.optim.optimizer import Optimizer
from unite_fast.runtime import precision
from unite_fast.runtime.flops import training_flops
from unite_fast.sampling import sample

LR = 1e-4
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}  # of losses and gradient norm, relative


class Ours:
    """Our model with the official one's weights, and the options that are fastest on the device."""

    def __init__(self, official: Official, device: torch.device, recipe: str) -> None:
        self.device, self.recipe = device, recipe
        weights = interop.clean_keys(official.model.state_dict())
        self.model = UNITE(ModelConfig(encoder=EncoderConfig())).to(device)
        interop.load_weights(self.model, weights, "the official model")
        self.model.train()
        self.model.encoder.backend = "fused"
        self.perceptual = Perceptual(None, backend="fused").to(device)
        source = official.model.lpips_loss
        trunk = self.perceptual.net.net
        trunk.load_state_dict(dict(zip(trunk.state_dict(), source.net.state_dict().values(), strict=True)))
        for i in range(5):
            self.perceptual.net.lins[i].model[-1].load_state_dict(getattr(source, f"lin{i}").model[-1].state_dict())
        self.objective = ObjectiveConfig(flow_steps=official.model.flow_steps_per_recon)
        self.optimizer = Optimizer(self.model, OptimConfig(), "fused")

    def draws(self, samples: Tensor) -> objective.SeededDraws:
        return objective.SeededDraws(self.model, self.objective, 0, samples)

    def step(self, images: Tensor, labels: Tensor, draws: objective.Draws | objective.SeededDraws) -> dict[str, Tensor]:
        """Gradients and losses of one micro-batch; all flow steps pass the network as one batch, as officially."""
        with precision.autocast(self.recipe, self.device):
            return objective.backward(
                self.model, images, labels, draws, self.objective, self.perceptual, 1.0, self.objective.flow_steps
            )


def check_losses(official: Official, ours: Ours, images: Tensor, labels: Tensor, recipe: str) -> dict[str, float]:
    """Relative differences of losses and gradient norm from equal draws. Ends the program when one is too large."""
    draws = objective.Draws.make(ours.model, ours.objective, 0, torch.arange(len(labels), device=images.device))
    with replayed(official, draws), precision.autocast(recipe, images.device):
        reference = official.losses(images, labels)
    reference["total"].backward()
    result = ours.step(images, labels, draws)
    norms = []
    for model in (official.model, ours.model):
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        norms.append(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))))
        model.zero_grad()
    reference["grad_norm"], result["grad_norm"] = norms
    differences = {
        name: abs(result[name].item() - value.item()) / max(abs(value.item()), 1e-12)
        for name, value in reference.items()
    }
    for name, difference in differences.items():
        values = f"official {reference[name].item():.6f}  ours {result[name].item():.6f}"
        print(f"  {name:10} {values}  off by {difference:.1e}", flush=True)
        if not difference < TOLERANCE[recipe]:
            raise SystemExit(f"{name} differs by {difference:.2g} (relative): no time is taken")
    return differences


def training_variants(
    official: Official, ours: Ours, images: Tensor, labels: Tensor, recipe: str, expert: Official | None
) -> dict[str, Callable[[], object]]:
    samples = torch.arange(len(labels), device=images.device)

    def theirs(code: Official) -> Callable[[], object]:
        def step() -> None:
            with precision.autocast(recipe, images.device):
                loss = code.losses(images, labels)["total"]
            code.model.zero_grad()
            loss.backward()

        return step

    def mine() -> None:
        for parameter in ours.optimizer.parameters.values():
            parameter.grad = None
        ours.step(images, labels, ours.draws(samples))

    return {"ours": mine, "official": theirs(official)} | ({"compiled": theirs(expert)} if expert else {})


def update_variants(official: Official, ours: Ours) -> dict[str, Callable[[], object]]:
    """Both optimizers on gradients that stay as they are."""
    saved = {name: p.grad for name, p in ours.optimizer.parameters.items()}

    def mine() -> None:
        for name, parameter in ours.optimizer.parameters.items():
            parameter.grad = saved[name]
        ours.optimizer.step(LR)

    return {"ours": mine, "official": official.update}


def sampling_variants(
    official: Official, ours: Ours, labels: Tensor, steps: int, recipe: str
) -> dict[str, Callable[[], Tensor]]:
    device = labels.device
    noise = torch.randn(len(labels), *ours.model.latent_shape, generator=torch.Generator().manual_seed(0)).to(device)
    guidance = (3.4, (0.1, 1.0))

    def theirs() -> Tensor:
        with torch.no_grad(), precision.autocast(recipe, device):
            return official.sample(labels, noise, steps, *guidance)

    def mine() -> Tensor:
        with precision.autocast(recipe, device):
            return sample(ours.model, labels, noise, "heun", steps, *guidance)

    return {"ours": mine, "official": theirs}


def report(what: str, times: dict[str, list[float]], rows: list[dict], **facts: object) -> None:
    """Prints and keeps one comparison; times in milliseconds."""
    medians = {name: quantiles(values)["median"] for name, values in times.items()}
    ratios = {name: ratio(times, name, "ours") for name in times if name != "ours"}
    listed = "  ".join(f"{n} {r['median']:.2f}x ({r['p20']:.2f} to {r['p80']:.2f})" for n, r in ratios.items())
    print(f"{what:18} ours {medians['ours'] / 1e3:8.3f} s; slower: {listed}", flush=True)
    rows.append({"component": what, "ms": medians, "faster_than": ratios, "n": len(times["ours"])} | facts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official-dir", type=Path, required=True, help="clone of the official repository")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--flow-steps", type=int, default=3)
    parser.add_argument("--sample-steps", type=int, default=50, help="0: no sampling")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vgg", type=Path, help="torchvision's vgg16-397923af.pth")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled baseline out")
    parser.add_argument("--no-record", action="store_true", help="print only")
    arguments = parser.parse_args()
    device, recipe = torch.device(arguments.device), arguments.precision
    precision.setup(device)
    trunk = torch.load(arguments.vgg, weights_only=True) if arguments.vgg else None
    torch.manual_seed(0)
    official = Official(arguments.official_dir.resolve(), device, arguments.flow_steps, trunk)
    wake(official.model)
    official.prepare()
    ours = Ours(official, device, recipe)
    images = torch.rand(arguments.batch, 3, 256, 256, device=device)
    labels = torch.arange(arguments.batch, device=device) * 37 % 1000
    print(f"Base/Base, batch {arguments.batch}, N = {arguments.flow_steps}, {recipe}, one step from equal draws:")
    differences = check_losses(official, ours, images, labels, recipe)
    flops = training_flops(ours.model.config, arguments.flow_steps, True)["total"] * arguments.batch
    facts = {"batch": arguments.batch, "flow_steps": arguments.flow_steps, "precision": recipe}
    rows: list[dict] = []
    expert = None
    if not arguments.no_compile:
        expert = Official(arguments.official_dir.resolve(), device, arguments.flow_steps, trunk)
        expert.model.load_state_dict(official.model.state_dict())
        expert.prepare()
        expert.model.encoder.compile()
        expert.model.decoder.compile()
        expert.model.lpips_loss.to(memory_format=torch.channels_last)
    training = training_variants(official, ours, images, labels, recipe, expert)
    times = interleaved(training, device, arguments.rounds, sample_ms=1.0, warmup=1)
    report("forward + backward", times, rows, flops=flops, differences=differences, **facts)
    times = interleaved(update_variants(official, ours), device, arguments.rounds, sample_ms=1.0, warmup=1)
    report("optimizer step", times, rows, **facts)
    if arguments.sample_steps:
        del expert, training
        variants = sampling_variants(official, ours, labels, arguments.sample_steps, recipe)
        mine, theirs = (variants[name]() for name in ("ours", "official"))
        apart = (mine - theirs.clamp(0, 1)).abs().max().item()
        print(f"  samples differ by at most {apart:.1e} of the gray range")
        times = interleaved(variants, device, max(1, arguments.rounds // 2), sample_ms=1.0, warmup=0)
        report("sampling", times, rows, steps=arguments.sample_steps, difference=apart, **facts)
    if not arguments.no_record:
        path = record("official", device, rows)
        print(f"{len(rows)} rows in {path.relative_to(path.parents[3])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
