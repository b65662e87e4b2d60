"""Whole optimizer steps on the ladder of efficiency options: each rung against eager, interleaved in one process.

    python benchmarks/bench_step.py --device cuda                        UNITE-B, L and XL, N = 3 and 14
    python benchmarks/bench_step.py --device cuda --models b --flow-steps 3
    python benchmarks/bench_step.py                                      CPU: a tiny model, float32, ratios only

A rung is a row of RUNGS: overrides laid over those of the rungs before it. What this device or this build refuses is
skipped with its reason, and so is a rung whose first loss is off: it would compare different computations. One step is
forward, backward, clip, Muon, AdamW and EMA over one micro-batch of synthetic uint8 images with random LPIPS weights.
MFU counts the model's FLOPs by definition, whatever a rung saves or computes again. Rows go to
benchmarks/results/<device>/step.jsonl; with --plot the ladder is drawn beside the roofline.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from harness import RESULTS, ROOT, interleaved, launches, quantiles, ratio, record
from official import wake

from unite_fast import data, run
from unite_fast.base.errors import RunError, UserError
from unite_fast.config import Config, yaml_text
from unite_fast.efficiency import compiling, graph, precision
from unite_fast.modality.lpips import Perceptual
from unite_fast.model.flops import peak_flops, training_flops
from unite_fast.parallel.distributed import Ranks
from unite_fast.plan.throughput import NODE, Projection
from unite_fast.training.step import TrainStep

# A rung: overrides over the rungs before it, and how far its first loss may be from eager's, relative.
RUNGS: dict[str, tuple[tuple[str, ...], float]] = {
    "eager": ((), 0.0),
    "+fused": (("efficiency.kernels=fused",), 2e-2),
    "+compile": (("efficiency.compile=all",), 2e-2),
    "+flow batch": (("efficiency.flow_mini_batch=3",), 2e-2),
    "+graph": (("efficiency.cuda_graph=step",), 2e-2),
    "+fp8": (("efficiency.precision=fp8",), 1e-1),
}
GIB = 2**30
MODELS = {
    "b": "imagenet_b.yaml", "l": "imagenet_l.yaml", "xl": "imagenet_xl.yaml", "digits": "digits.yaml",
}  # fmt: skip
# Eager is eager: what the configurations switch on is taken off first.
PLAIN = {"kernels": "eager", "compile": "none", "cuda_graph": "none", "recompute": "none", "flow_mini_batch": "1"}
FIXED = ("data.source=synthetic", "data.flip=false", "optim.schedule=constant", "optim.warmup_epochs=1")
TINY = (
    "model.image_size=32", "model.patch_size=8", "model.num_latents=16", "model.latent_dim=8", "model.num_classes=10",
    "model.encoder={depth: 3, width: 64, heads: 4, in_context_start: 1, in_context_len: 4}",
    "model.decoder={depth: 2, width: 64, heads: 4, mlp_hidden: 128, in_features: 64}", "objective.perceptual_weight=0",
)  # fmt: skip


@dataclass
class Variant:
    """One rung, ready to step."""

    name: str
    overrides: tuple[str, ...]
    call: Callable[[], dict[str, torch.Tensor]]
    gib: float | None  # memory that it has taken at its peak, the first step and its captures included


def configuration(model: str, flow_steps: int, batch: int, device: torch.device, overrides: tuple[str, ...]) -> Config:
    """Raises UserError where an option is unknown or does not go with others."""
    tiny = model == "tiny"
    path = ROOT / "configs" / ("imagenet_b.yaml" if tiny else MODELS[model])
    plain = [f"efficiency.{key}={value}" for key, value in PLAIN.items()]
    sizes = (f"objective.flow_steps={flow_steps}", f"train.global_batch={batch}", f"train.micro_batch={batch}",
             f"efficiency.precision={'fp32' if device.type == 'cpu' else 'bf16'}")  # fmt: skip
    return yaml_text.load(path, [*(TINY if tiny else ()), *plain, *FIXED, *sizes, *overrides])


def build(config: Config, device: torch.device) -> Callable[[], dict[str, torch.Tensor]]:
    """A function that does one optimizer step; every variant has the same weights, images and draws."""
    graph.check(config, device)
    ranks = Ranks(0, 1, device)
    state = run.fresh_state(config, ranks)
    perceptual = None
    if config.objective.perceptual_weight > 0:
        torch.manual_seed(0)
        perceptual = Perceptual(None, config.objective.perceptual_range, backend=config.efficiency.kernels).to(device)
        if config.efficiency.compile == "all":
            perceptual.compile_trunk(compiling.region)
    source = data.open_source(config.data, config.model)
    batch = next(data.stream(source, 0, global_batch=config.train.global_batch, device=device))
    step = TrainStep(config, ranks, (config.train.micro_batch, 1), len(source), perceptual)
    wake(state.model)  # else the first losses say nothing of the blocks, whose gates begin at 0
    state.model.train()
    return lambda: step(state, batch)


def attempt(name: str, overrides: tuple[str, ...], model: str, flow_steps: int, batch: int, device: torch.device,
            expected: float | None, tolerance: float) -> tuple[Variant | None, float, str]:  # fmt: skip
    """(the rung, its first loss, "") or (None, nan, why not)."""
    base = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        config = configuration(model, flow_steps, batch, device, overrides)
        call = build(config, device)
        first = float(call()["total"])
        for _ in range(graph.WARM_UP + 1):  # captures included
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except (UserError, RunError, RuntimeError, NotImplementedError, ImportError) as error:
        release(device)
        return None, float("nan"), f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    if expected is not None and not abs(first - expected) <= tolerance * abs(expected):
        return None, first, f"its first loss is {first:.5g}, eager's {expected:.5g}: more than {tolerance:g} apart"
    gib = (torch.cuda.max_memory_allocated(device) - base) / GIB if device.type == "cuda" else None
    return Variant(name, overrides, call, gib), first, ""


def release(device: torch.device) -> None:
    """Gives the memory of variants that are gone back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def ladder(
    model: str, flow_steps: int, batch: int, device: torch.device, wanted: list[str], rounds: int
) -> Iterator[dict]:
    """Times and prints all rungs that this device takes; their rows. Each is timed beside eager and then let go.

    Where eager does not fit into memory, at all or beside another rung, the rungs from there on are timed alone.
    """
    eager: Variant | None = None
    overrides: tuple[str, ...] = ()
    expected = None
    print(f"{model}, N = {flow_steps}, micro-batch {batch}")
    for name, (more, tolerance) in RUNGS.items():
        if name not in wanted:
            continue
        variant, first, why = attempt(name, overrides + more, model, flow_steps, batch, device, expected, tolerance)
        if variant is None:
            print(f"  {name:12} skipped: {why}", flush=True)
            continue
        overrides += more
        expected = first if expected is None else expected
        eager = variant if name == "eager" else eager
        try:
            times = interleaved({v.name: v.call for v in (eager, variant) if v is not None}, device, rounds)
        except torch.OutOfMemoryError:
            times = {}
        if not times:
            print(f"  {name:12} does not fit beside eager", flush=True)
            eager = None
            release(device)
            times = interleaved({variant.name: variant.call}, device, rounds)
        yield row(variant, times, model, flow_steps, batch, device, rounds)
        del variant
        release(device)


def row(v: Variant, times: dict[str, list[float]], model: str, flow_steps: int, batch: int, device: torch.device,
        rounds: int) -> dict:  # fmt: skip
    """Prints a line. Absolute speed only of a GPU."""
    faster = ratio(times, "eager", v.name) if "eager" in times else None
    found = {"model": model, "flow_steps": flow_steps, "rung": v.name, "overrides": v.overrides, "batch": batch,
             "n": rounds, "faster_than_eager": faster}  # fmt: skip
    ratios = f"{faster['median']:6.2f}x eager ({faster['p20']:.2f}..{faster['p80']:.2f})" if faster else "  timed alone"
    text = f"  {v.name:12}{ratios}"
    if device.type == "cuda":
        config = configuration(model, flow_steps, batch, device, v.overrides)
        ms = quantiles(times[v.name])
        rate = batch * 1e3 / ms["median"]
        flops = training_flops(config.model, flow_steps, config.objective.perceptual_weight > 0)["total"]
        peak = peak_flops(device)
        mfu = rate * flops / peak if peak else None
        minutes = Projection(mfu or 0.0, rate).minutes(NODE)
        count = launches(v.call, device)
        found |= {"ms": ms, "images_per_second": rate, "mfu": mfu, "gib": v.gib, "minutes_per_epoch_8": minutes}
        found["launches"] = count
        text += f"{rate:9.1f} images/s  MFU {mfu or float('nan'):.1%}  {v.gib:.1f} GiB  {count} launches"
        text += f"  {minutes:.1f} min/epoch on {NODE}"
    print(text, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", help="comma-separated: tiny, " + ", ".join(MODELS))
    parser.add_argument("--flow-steps", help="comma-separated")
    parser.add_argument("--rungs", default=",".join(RUNGS), help="comma-separated; eager is always run")
    parser.add_argument("--batch", type=int, help="images of the step: 64 on a GPU, 8 on a CPU")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--plot", action="store_true", help="draw the ladder (needs matplotlib)")
    parser.add_argument("--no-record", action="store_true", help="print only")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    models = (arguments.models or ("b,l,xl" if on_gpu else "tiny")).split(",")
    flow_steps = [int(n) for n in (arguments.flow_steps or ("3,14" if on_gpu else "3")).split(",")]
    wanted = ["eager", *arguments.rungs.split(",")]
    if unknown := [x for x in wanted if x not in RUNGS] + [m for m in models if m not in (*MODELS, "tiny")]:
        parser.error(f"unknown: {', '.join(unknown)}")
    precision.setup(device)
    rows = []
    for model in models:
        for n in flow_steps:
            for found in ladder(model, n, arguments.batch or (64 if on_gpu else 8), device, wanted, arguments.rounds):
                rows.append(found)
                if not arguments.no_record:  # at once: what follows may run out of time
                    record("step", device, [found])
    if not rows:
        raise SystemExit("no rung ran: nothing was measured")
    if not arguments.no_record:
        print(f"{len(rows)} rows in {RESULTS.name}/*/step.jsonl")
    if arguments.plot:
        from plots import step_ladder

        print(f"drawn: {step_ladder(rows, device.type)}")


if __name__ == "__main__":
    main()
