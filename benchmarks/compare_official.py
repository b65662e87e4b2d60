"""The official UNITE code and ours, side by side: equal weights, equal draws, their losses, and time.

    python benchmarks/compare_official.py --official-dir PATH [--device cuda --precision bf16 --batch 64]

PATH is the user's own clone of the official repository with its requirements installed; nothing of it is kept here.
One process holds both models at Base/Base. First both compute the same step from the same draws; how far losses and
gradient norm are apart stands in every row beside the times, which are taken whatever it says. Then forward + backward
of one micro-batch and the optimizer step (clip, AdamW, Muon, EMA) are timed apart, in turn within each round, and
composed to images/s at 128 and 1,024 images per update; then sampling (Heun with guidance). The official code runs as
published and as an expert would run it (official.py); compilers, searches for algorithms and graph captures have ended
before the first sample. Ours takes further options as overrides: efficiency.compile=all efficiency.cuda_graph=step.

--batch takes several sizes, of which the first that fits into memory with both models is taken for all. LPIPS has
random weights unless --vgg names torchvision's file; its dropout is off on both sides. Exit status: 1 when losses
disagree.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import interleaved, quantiles, ratio, record
from official import FORMS, Official, replayed, wake
from torch import Tensor
from training import Origin, OurStep, composed, on, release

from unite_fast import interop, objective
from unite_fast.config import Config, SampleConfig, yaml_text
from unite_fast.data import Batch, batch_of_images
from unite_fast.efficiency import precision
from unite_fast.model.flops import training_flops
from unite_fast.model.unite import UNITE
from unite_fast.sampling import sample

TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}  # of losses and gradient norm, relative
PER_UPDATE = (128, 1024)
WARM = 2  # calls of every official form before its first sample


def origin_of(official: Official, config: Config) -> Origin:
    """Our model and VGG16 with the official weights."""
    model = on(official.device, UNITE, config.model)
    interop.load_weights(model, interop.clean_keys(official.model.state_dict()), "the official model")
    origin = Origin(config.model, official.device, perceptual=True, weights=model.state_dict())
    source, ours = official.model.lpips_loss, origin.perceptual
    trunk = ours.net.net
    trunk.load_state_dict(dict(zip(trunk.state_dict(), source.net.state_dict().values(), strict=True)))
    for i in range(5):
        ours.net.lins[i].model[-1].load_state_dict(getattr(source, f"lin{i}").model[-1].state_dict())
    return origin


def differences(official: Official, ours: OurStep, recipe: str) -> dict[str, float]:
    """Relative differences of losses and gradient norm of one step from equal draws; prints them. {}: not compared."""
    images, labels, samples = ours.batch.images, ours.batch.labels, ours.batch.samples
    draws = objective.Draws.make(ours.state.model, ours.config.objective, ours.config.seed, samples)
    half = torch.autocast(images.device.type, torch.bfloat16, enabled=recipe != "fp32")
    try:
        with replayed(official, draws), half:
            reference = official.losses(images, labels)
        reference["total"].backward()
    except (RuntimeError, SystemExit) as error:  # another version of it; time is taken all the same
        print(f"  not compared: {error}", flush=True)
        return {}
    result = dict(ours.fresh_passes())  # its own draws: a function of the seed and the samples, the same numbers
    norms = []
    for model in (official.model, ours.state.model):
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        norms.append(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))))
    official.model.zero_grad()
    reference["grad_norm"], result["grad_norm"] = norms
    found = {}
    for name, value in reference.items():
        found[name] = abs(result[name].item() - value.item()) / max(abs(value.item()), 1e-12)
        values = f"official {value.item():.6f}  ours {result[name].item():.6f}"
        print(f"  {name:10} {values}  off by {found[name]:.1e}", flush=True)
    return found


def agrees(found: dict[str, float], recipe: str) -> bool:
    """LPIPS with random heads can come close to 0: it is held to the total. What was not compared does not agree."""
    return bool(found) and all(value < TOLERANCE[recipe] for name, value in found.items() if name != "lpips")


def sampling_variants(
    official: Official, ours: OurStep, labels: Tensor, steps: int, recipe: str
) -> dict[str, Callable[[], Tensor]]:
    device, model = labels.device, ours.state.model
    # The updates that were timed followed gradients of different draws.
    interop.load_weights(model, interop.clean_keys(official.model.state_dict()), "the official model")
    noise = torch.randn(len(labels), *model.latent_shape, generator=torch.Generator().manual_seed(0)).to(device)
    how = SampleConfig("heun", steps, 3.4, (0.1, 1.0))

    def theirs() -> Tensor:
        with torch.no_grad(), precision.autocast(recipe, device):
            return official.sample(labels, noise, steps, how.cfg_scale, how.cfg_interval)

    def mine() -> Tensor:
        with precision.autocast(recipe, device):
            return sample(model, labels, how, noise=noise)

    return {"ours": mine, "official": theirs}


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


def report_steps(
    passes: dict[str, list[float]], update: dict[str, list[float]], batch: int, device: torch.device | None,
    **facts: object,
) -> None:  # fmt: skip
    """Whole steps, composed round by round."""
    for images in PER_UPDATE:
        rates = {}
        for form, times in passes.items():
            updates = update["ours" if form == "ours" else "official"]
            rates[form] = [composed(p, u, batch, images) for p, u in zip(times, updates, strict=True)]
        ratios = {form: ratio(rates, "ours", form) for form in rates if form != "ours"}
        medians = {form: quantiles(values)["median"] for form, values in rates.items()}
        listed = "  ".join(f"{f} {r['median']:.2f}x ({r['p20']:.2f} to {r['p80']:.2f})" for f, r in ratios.items())
        print(f"{images:5} images/update  slower: {listed}", flush=True)
        if device is not None:
            row = {"component": "whole step", "images_per_update": images, "faster_than": ratios, "batch": batch}
            row |= {"images_per_second": medians} if device.type == "cuda" else {}
            record("official", device, [row | {"n": len(passes["ours"])} | facts])


def our_config(official: Official, batch: int, recipe: str, flow_steps: int, overrides: Sequence[str]) -> Config:
    """Of the same model. All flow steps pass the network as one batch, as officially."""
    config = yaml_text.load(None, [
        f"train.global_batch={batch}", f"train.micro_batch={batch}", f"efficiency.precision={recipe}",
        f"objective.flow_steps={flow_steps}", "optim.warmup_epochs=1", "efficiency.kernels=fused",
        f"efficiency.flow_mini_batch={flow_steps}", *overrides,
    ])  # fmt: skip
    state = interop.clean_keys(official.model.state_dict())
    # Which shapes do not tell:
    told = {"in_context_start": official.settings["in_content_start"], "decoder_heads": official.decoder_heads}
    return dataclasses.replace(config, model=interop.infer_config(state, told, "the official model"))


def images_for(config: Config, device: torch.device) -> Batch:
    """One micro-batch of random images in [0, 1], which either code takes."""
    n, m = config.train.micro_batch, config.model
    images = torch.rand(n, m.channels, m.image_size, m.image_size, device=device)
    return batch_of_images(images, torch.arange(n, device=device) * 37 % m.num_classes, torch.arange(n, device=device))


class Pair:
    """Both codes on one device with equal weights, warm, at one batch size."""

    def __init__(self, arguments: argparse.Namespace, batch: int, compile_lpips: bool | None = None) -> None:
        device, recipe, steps = torch.device(arguments.device), arguments.precision, arguments.flow_steps
        trunk = torch.load(arguments.vgg, weights_only=True) if arguments.vgg else None
        torch.manual_seed(0)
        self.official = Official(arguments.official_dir, device, steps, trunk, arguments.toy)
        wake(self.official.model)
        self.official.prepare()
        config = our_config(self.official, batch, recipe, steps, arguments.overrides)
        images = images_for(config, device)
        self.ours = OurStep(config, origin_of(self.official, config), images, compile_lpips)
        print(f"batch {batch}, N = {steps}, {recipe}, one step from equal draws:")
        self.differences = differences(self.official, self.ours, recipe)
        self.passes: dict[str, Callable[[], object]] = {"ours": self.ours.passes}
        if not arguments.no_compile:
            self.official.compile()
        for form in FORMS[: 1 if arguments.no_compile else None]:
            self.passes[form] = lambda f=form: self.official.passes(images.images, images.labels, recipe, f)
        self.updates = {"ours": self.ours.update, "official": self.official.update}
        self.ours.warm_up()
        for _ in range(WARM):
            for name, call in self.passes.items():
                if name != "ours":
                    call()
            self.official.update()


def largest_pair(arguments: argparse.Namespace, compile_lpips: bool | None) -> tuple[Pair, int]:
    """The pair at the first of the batch sizes that fits."""
    device = torch.device(arguments.device)
    for batch in arguments.batch:
        try:
            return Pair(arguments, batch, compile_lpips), batch
        except torch.OutOfMemoryError:
            print(f"batch {batch} does not fit with both models", flush=True)
        release(device)
    raise SystemExit("no batch size fits: give smaller ones to --batch")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official-dir", type=Path, required=True, help="clone of the official repository")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch", type=lambda s: [int(n) for n in s.split(",")], default=[2], help="comma-separated")
    parser.add_argument("--flow-steps", type=int, default=3)
    parser.add_argument("--sample-steps", type=int, default=50, help="0: no sampling")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vgg", type=Path, help="torchvision's vgg16-397923af.pth")
    parser.add_argument("--no-compile", action="store_true", help="compile nothing of the official code")
    parser.add_argument(
        "--toy", action="store_true", help="a rehearsal's sizes in the place of Base; they mean nothing"
    )
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of our configuration")
    return parser.parse_intermixed_args(words)


def compare(arguments: argparse.Namespace, compile_lpips: bool | None = None) -> int:
    device, recipe = torch.device(arguments.device), arguments.precision
    pair, size = largest_pair(arguments, compile_lpips)
    facts: dict[str, Any] = {"batch": size, "flow_steps": arguments.flow_steps, "precision": recipe}
    facts |= {"overrides": arguments.overrides, "differences": pair.differences}
    facts["agrees"] = agrees(pair.differences, recipe)
    recorded = None if arguments.no_record else device
    flops = training_flops(pair.ours.config.model, arguments.flow_steps, True)["total"] * size
    passes = interleaved(pair.passes, device, arguments.rounds, sample_ms=1.0, warmup=0)
    report("forward + backward", passes, recorded, flops=flops, **facts)
    update = interleaved(pair.updates, device, arguments.rounds, sample_ms=1.0, warmup=0)
    report("optimizer step", update, recorded, **facts)
    report_steps(passes, update, device=recorded, **facts)
    if arguments.sample_steps:
        compare_samples(pair, arguments, recorded, facts)
    if not facts["agrees"]:
        print(f"the losses or the gradient norm differ by more than {TOLERANCE[recipe]:g}: see above", file=sys.stderr)
    return 0 if facts["agrees"] else 1


def compare_samples(
    pair: Pair, arguments: argparse.Namespace, recorded: torch.device | None, facts: dict[str, Any]
) -> None:
    labels = pair.ours.batch.labels
    variants = sampling_variants(pair.official, pair.ours, labels, arguments.sample_steps, arguments.precision)
    mine, theirs = (variants[name]() for name in ("ours", "official"))
    apart = (mine - theirs.clamp(0, 1)).abs().max().item()
    print(f"  samples differ by at most {apart:.1e} of the gray range")
    times = interleaved(variants, labels.device, max(1, arguments.rounds // 2), sample_ms=1.0, warmup=0)
    report("sampling", times, recorded, steps=arguments.sample_steps, difference=apart, **facts)


def main() -> int:
    arguments = parse()
    precision.setup(torch.device(arguments.device), training=True)
    return compare(arguments)


if __name__ == "__main__":
    sys.exit(main())
