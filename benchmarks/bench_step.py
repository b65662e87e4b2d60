"""Training steps on the ladder of efficiency options: each rung against eager, interleaved in one process.

    python benchmarks/bench_step.py --device cuda                        UNITE-B, L and XL, N = 3 and 14
    python benchmarks/bench_step.py --device cuda --models b --flow-steps 3
    python benchmarks/bench_step.py                                      CPU: a tiny model, float32, ratios only

A rung is a row of RUNGS: overrides laid over those of the rungs before it. What this device or this build refuses is
skipped with its reason, and so is a rung whose first loss is off: it would compare different computations. The passes
(forward and backward of one micro-batch of synthetic uint8 images, random LPIPS weights) and the update (clip, Muon,
AdamW and EMA) are timed apart; images/s are composed of both for 128 and 1,024 images per update. MFU, at 1,024, counts
the model's FLOPs by definition, whatever a rung saves or computes again. Rows go to
benchmarks/results/<device>/step.jsonl; with --plot the ladder is drawn beside the roofline.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from harness import RESULTS, interleaved, launches, quantiles, ratio, record
from training import MODELS, Origin, OurStep, composed, configuration, median, peak_memory, release

from unite_fast.base.errors import RunError, UserError
from unite_fast.efficiency import precision
from unite_fast.modality.images import IMAGENET
from unite_fast.model.flops import peak_flops, training_flops
from unite_fast.plan.throughput import NODE, epoch_minutes

# A rung: overrides over the rungs before it, and how far its first loss may be from eager's, relative.
RUNGS: dict[str, tuple[tuple[str, ...], float]] = {
    "eager": ((), 0.0),
    "+fused": (("efficiency.kernels=fused",), 2e-2),
    "+compile": (("efficiency.compile=all",), 2e-2),
    "+flow batch": (("efficiency.flow_mini_batch=3",), 2e-2),
    "+graph": (("efficiency.cuda_graph=step",), 2e-2),
    "+fp8": (("efficiency.precision=fp8",), 1e-1),
}
PER_UPDATE = (128, 1024)  # images: of a node's eight GPUs at 1,024 per step, and of one GPU alone


@dataclass
class Variant:
    """One rung, ready to step."""

    name: str
    overrides: tuple[str, ...]
    step: OurStep
    gib: float | None  # memory that it has taken at its peak, the first step and its captures included


def attempt(
    name: str, overrides: tuple[str, ...], origin: Origin, sizes: tuple[str, int, int], expected: float | None,
    tolerance: float,
) -> tuple[Variant | None, float, str]:  # fmt: skip
    """(the rung, its first loss, "") or (None, nan, why not). sizes: model, flow steps, images of a micro-batch."""
    try:
        with peak_memory(origin.device) as gib:
            step = OurStep(configuration(*sizes, origin.device, overrides), origin)
            first = step.warm_up()
    except (UserError, RunError, RuntimeError, NotImplementedError, ImportError) as error:
        release(origin.device)
        return None, float("nan"), f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    if expected is not None and not abs(first - expected) <= tolerance * abs(expected):
        return None, first, f"its first loss is {first:.5g}, eager's {expected:.5g}: more than {tolerance:g} apart"
    return Variant(name, overrides, step, gib()), first, ""


def ladder(sizes: tuple[str, int, int], device: torch.device, wanted: list[str], rounds: int) -> Iterator[dict]:
    """Times and prints all rungs that this device takes; their rows. Each is timed beside eager and then let go.

    Where eager does not fit into memory, at all or beside another rung, the rungs from there on are timed alone.
    """
    plain = configuration(*sizes, device, ())
    origin = Origin(plain.model, device, plain.objective.perceptual_weight > 0)
    eager: Variant | None = None
    overrides: tuple[str, ...] = ()
    expected = None
    print(f"{sizes[0]}, N = {sizes[1]}, micro-batch {sizes[2]}")
    for name, (more, tolerance) in RUNGS.items():
        if name not in wanted:
            continue
        variant, first, why = attempt(name, overrides + more, origin, sizes, expected, tolerance)
        if variant is None:
            print(f"  {name:12} skipped: {why}", flush=True)
            continue
        overrides += more
        expected = first if expected is None else expected
        eager = variant if name == "eager" else eager
        try:
            times = timed([v for v in (eager, variant) if v is not None], device, rounds)
        except torch.OutOfMemoryError:
            times = {}
        if not times:
            print(f"  {name:12} does not fit beside eager", flush=True)
            eager = None
            release(device)
            times = timed([variant], device, rounds)
        yield row(variant, times, sizes, device, rounds)
        del variant
        release(device)


def timed(variants: list[Variant], device: torch.device, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of "passes" and "update" of each, one call a sample."""
    return {
        part: interleaved({v.name: getattr(v.step, part) for v in variants}, device, rounds, sample_ms=1.0, warmup=1)
        for part in ("passes", "update")
    }


def row(
    v: Variant, times: dict[str, dict[str, list[float]]], sizes: tuple[str, int, int], device: torch.device, rounds: int
) -> dict:
    """Prints a line. Absolute speed only of a GPU."""
    model, flow_steps, batch = sizes
    faster = ratio(times["passes"], "eager", v.name) if "eager" in times["passes"] else None
    found = {"model": model, "flow_steps": flow_steps, "rung": v.name, "overrides": v.overrides, "batch": batch,
             "n": rounds, "faster_than_eager": faster}  # fmt: skip
    ratios = f"{faster['median']:6.2f}x eager ({faster['p20']:.2f}..{faster['p80']:.2f})" if faster else "  timed alone"
    text = f"  {v.name:12}{ratios}"
    if device.type == "cuda":
        ms = {part: quantiles(of[v.name]) for part, of in times.items()}
        passes, update = (median(times[part][v.name]) for part in ("passes", "update"))
        rates = {images: composed(passes, update, batch, images) for images in PER_UPDATE}
        rate = rates[PER_UPDATE[-1]]
        config = v.step.config
        flops = training_flops(config.model, flow_steps, config.objective.perceptual_weight > 0)["total"]
        peak = peak_flops(device)
        mfu = rate * flops / peak if peak else None
        minutes = epoch_minutes(IMAGENET, rate, NODE)
        count = launches(v.step.whole, device)
        found |= {"ms": ms, "images_per_second": rates, "mfu": mfu, "gib": v.gib, "minutes_per_epoch_8": minutes}
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
    precision.setup(device, training=True)
    rows = []
    for model in models:
        for n in flow_steps:
            sizes = (model, n, arguments.batch or (64 if on_gpu else 8))
            for found in ladder(sizes, device, wanted, arguments.rounds):
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
