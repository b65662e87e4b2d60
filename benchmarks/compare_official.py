"""The official UNITE code and ours, side by side: equal weights, equal draws, equal losses, then time.

    python benchmarks/compare_official.py --official-dir PATH [--device cuda --precision bf16 --batch 64]

PATH is the user's own clone of the official repository with its requirements installed; nothing of it is kept here.
One process holds both models at Base/Base. First both compute the same step from the same draws: when the losses or
the gradient norm differ, no time is taken. Then forward + backward, the optimizer step (clip, AdamW, Muon, EMA), on a
GPU both together, and sampling (Heun with guidance) are timed in turn within each round. The official code runs as it
is and, unless --no-compile is given, with its encoder and decoder compiled and LPIPS in channels_last, the fair
expert's baseline. Ours takes further options as overrides: efficiency.compile=all efficiency.cuda_graph=step. LPIPS has
random weights unless --vgg names torchvision's file; its dropout is off on both sides.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import interleaved, quantiles, ratio, record
from official import Official, replayed, wake
from torch import Tensor

from unite_fast import interop, objective, run
from unite_fast.config import Config, yaml_text
from unite_fast.data import Batch
from unite_fast.efficiency import compiling, precision
from unite_fast.modality.lpips import Perceptual
from unite_fast.model.flops import training_flops
from unite_fast.parallel.distributed import Ranks
from unite_fast.plan.throughput import IMAGENET
from unite_fast.sampling import sample
from unite_fast.training.step import TrainStep

LR = 1e-4
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}  # of losses and gradient norm, relative


class Ours:
    """Our training step with the official model's weights."""

    def __init__(self, official: Official, device: torch.device, config: Config) -> None:
        self.config, self.ranks = config, Ranks(0, 1, device)
        self.state = run.fresh_state(config, self.ranks)
        self.model = self.state.model.train()
        interop.load_weights(self.model, interop.clean_keys(official.model.state_dict()), "the official model")
        for name, value in self.state.optimizer.ema.items():
            value.copy_(self.state.optimizer.parameters[name].detach())
        perceptual = Perceptual(None, backend=config.efficiency.kernels).to(device)
        source, trunk = official.model.lpips_loss, perceptual.net.net
        trunk.load_state_dict(dict(zip(trunk.state_dict(), source.net.state_dict().values(), strict=True)))
        for i in range(5):
            perceptual.net.lins[i].model[-1].load_state_dict(getattr(source, f"lin{i}").model[-1].state_dict())
        if config.efficiency.compile == "all":
            perceptual.compile_trunk(compiling.region)
        batch = config.train.global_batch
        self.step = TrainStep(config, self.ranks, (batch, 1), IMAGENET, perceptual)
        self.step.prepare(self.state)

    def gradients(self, batch: Batch) -> dict[str, Tensor]:
        """Losses and gradients of one batch, from no gradients."""
        if self.step.graphs is not None:
            self.step.graphs.gradients.begin()
        else:
            for parameter in self.state.optimizer.parameters.values():
                parameter.grad = None
        losses = self.step.accumulate(self.state, batch, 1)
        if self.step.graphs is not None:
            self.step.graphs.gradients.keep()
        return losses


def check_losses(official: Official, ours: Ours, batch: Batch, recipe: str) -> dict[str, float]:
    """Relative differences of losses and gradient norm from equal draws. Ends the program when one is too large."""
    images, labels, samples = batch
    draws = objective.Draws.make(ours.model, ours.config.objective, ours.config.seed, samples)
    with replayed(official, draws), precision.autocast(recipe, images.device):
        reference = official.losses(images, labels)
    reference["total"].backward()
    result = ours.gradients(batch)  # its own draws: a function of the seed and the samples, the same numbers
    norms = []
    for model in (official.model, ours.model):
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        norms.append(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))))
    official.model.zero_grad()
    reference["grad_norm"], result["grad_norm"] = norms
    differences = {
        name: abs(result[name].item() - value.item()) / max(abs(value.item()), 1e-12)
        for name, value in reference.items()
    }
    for name, difference in differences.items():
        values = f"official {reference[name].item():.6f}  ours {result[name].item():.6f}"
        print(f"  {name:10} {values}  off by {difference:.1e}", flush=True)
        # LPIPS with random heads can come close to 0: it is held to the total.
        if not difference < TOLERANCE[recipe] and name != "lpips":
            raise SystemExit(f"{name} differs by {difference:.2g} (relative): no time is taken")
    return differences


def backward_of(code: Official, batch: Batch, recipe: str) -> Callable[[], None]:
    def step() -> None:
        with precision.autocast(recipe, batch.images.device):
            loss = code.losses(batch.images, batch.labels)["total"]
        code.model.zero_grad()
        loss.backward()

    return step


def update_variants(official: Official, ours: Ours) -> dict[str, Callable[[], object]]:
    """Both optimizers on gradients that stay as they are."""
    optimizer = ours.state.optimizer
    saved = {name: p.grad for name, p in optimizer.parameters.items()}
    lr = torch.tensor(LR, device=ours.ranks.device)

    def mine() -> None:
        for name, parameter in optimizer.parameters.items():
            parameter.grad = saved[name]
        optimizer.step(lr)

    return {"ours": mine, "official": official.update}


def sampling_variants(
    official: Official, ours: Ours, labels: Tensor, steps: int, recipe: str
) -> dict[str, Callable[[], Tensor]]:
    device = labels.device
    # The updates that were timed followed gradients of different draws.
    interop.load_weights(ours.model, interop.clean_keys(official.model.state_dict()), "the official model")
    noise = torch.randn(len(labels), *ours.model.latent_shape, generator=torch.Generator().manual_seed(0)).to(device)
    guidance = (3.4, (0.1, 1.0))

    def theirs() -> Tensor:
        with torch.no_grad(), precision.autocast(recipe, device):
            return official.sample(labels, noise, steps, *guidance)

    def mine() -> Tensor:
        with precision.autocast(recipe, device):
            return sample(ours.model, labels, noise, "heun", steps, *guidance)

    return {"ours": mine, "official": theirs}


def compiled(official: Official, arguments: argparse.Namespace, device: torch.device, trunk: Any) -> Official:
    """The official code as an expert would run it, with the same weights."""
    expert = Official(arguments.official_dir.resolve(), device, arguments.flow_steps, trunk)
    expert.model.load_state_dict(official.model.state_dict())
    expert.prepare()
    expert.model.encoder.compile()
    expert.model.decoder.compile()
    expert.model.lpips_loss.to(memory_format=torch.channels_last)
    return expert


def report(what: str, times: dict[str, list[float]], device: torch.device | None, **facts: object) -> None:
    """Prints one comparison and, with a device, adds it to the recorded rows; times in milliseconds."""
    medians = {name: quantiles(values)["median"] for name, values in times.items()}
    ratios = {name: ratio(times, name, "ours") for name in times if name != "ours"}
    listed = "  ".join(f"{n} {r['median']:.2f}x ({r['p20']:.2f} to {r['p80']:.2f})" for n, r in ratios.items())
    print(f"{what:18} ours {medians['ours'] / 1e3:8.3f} s; slower: {listed}", flush=True)
    if device is not None:
        record("official", device, [
            {"component": what, "ms": medians, "faster_than": ratios, "n": len(times["ours"])} | facts
        ])  # fmt: skip


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
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of our configuration")
    arguments = parser.parse_intermixed_args()
    device, recipe, size = torch.device(arguments.device), arguments.precision, arguments.batch
    precision.setup(device)
    trunk = torch.load(arguments.vgg, weights_only=True) if arguments.vgg else None
    torch.manual_seed(0)
    official = Official(arguments.official_dir.resolve(), device, arguments.flow_steps, trunk)
    wake(official.model)
    official.prepare()
    # All flow steps pass the network as one batch, as officially.
    ours = Ours(official, device, yaml_text.load(None, [
        f"train.global_batch={size}", f"train.micro_batch={size}", f"efficiency.precision={recipe}",
        f"objective.flow_steps={arguments.flow_steps}", f"efficiency.flow_mini_batch={arguments.flow_steps}",
        "efficiency.kernels=fused", *arguments.overrides,
    ]))  # fmt: skip
    labels = torch.arange(size, device=device) * 37 % 1000
    batch = Batch(torch.rand(size, 3, 256, 256, device=device), labels, torch.arange(size, device=device))
    print(f"Base/Base, batch {size}, N = {arguments.flow_steps}, {recipe}, one step from equal draws:")
    differences = check_losses(official, ours, batch, recipe)
    flops = training_flops(ours.model.config, arguments.flow_steps, True)["total"] * size
    facts = {"batch": size, "flow_steps": arguments.flow_steps, "precision": recipe, "overrides": arguments.overrides}
    recorded = None if arguments.no_record else device
    passes: dict[str, Callable[[], object]] = {
        "ours": lambda: ours.gradients(batch), "official": backward_of(official, batch, recipe),
    }  # fmt: skip
    expert = None if arguments.no_compile else compiled(official, arguments, device, trunk)
    if expert is not None:
        passes["compiled"] = backward_of(expert, batch, recipe)
    times = interleaved(passes, device, arguments.rounds, sample_ms=1.0, warmup=1)
    report("forward + backward", times, recorded, flops=flops, differences=differences, **facts)
    times = interleaved(update_variants(official, ours), device, arguments.rounds, sample_ms=1.0, warmup=1)
    report("optimizer step", times, recorded, **facts)
    steps: dict[str, Callable[[], object]] = {"ours": lambda: ours.step(ours.state, batch)}
    if device.type == "cuda":
        for name, code in {"official": official, "compiled": expert}.items():
            if code is not None:
                steps[name] = lambda c=code, p=passes[name]: (p(), c.update())
        times = interleaved(steps, device, arguments.rounds)
        report("whole step", times, recorded, flops=flops, **facts)
    if arguments.sample_steps:
        del expert, passes, steps
        variants = sampling_variants(official, ours, labels, arguments.sample_steps, recipe)
        mine, theirs = (variants[name]() for name in ("ours", "official"))
        apart = (mine - theirs.clamp(0, 1)).abs().max().item()
        print(f"  samples differ by at most {apart:.1e} of the gray range")
        times = interleaved(variants, device, max(1, arguments.rounds // 2), sample_ms=1.0, warmup=0)
        report("sampling", times, recorded, steps=arguments.sample_steps, difference=apart, **facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
