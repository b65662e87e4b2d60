"""What a training step could take at best: every kernel at its ceiling, summed by part, against measured steps.

    python benchmarks/roofline.py                                   predictions from stated H200 figures
    python benchmarks/roofline.py --device cuda                     ceilings measured on this GPU, predictions and eta
    python benchmarks/roofline.py --images-per-second 400           eta of a measured step against the ceilings
    python benchmarks/roofline.py --model configs/imagenet_l.yaml objective.flow_steps=14

A kernel takes max(FLOPs / ceiling of its kind, bytes / bandwidth). eta is the sum of that over all kernels of the
step, its copies and its share of an update among them, over the step's measured time. Without a GPU everything printed
is a prediction. With --plot the time by part is drawn into benchmarks/results/roofline/. Kernels, FLOPs and bytes come
from step_work.py.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import step_work
import torch
from harness import RESULTS, ROOT, environment, record
from roofline_measure import Ceilings, measured_ceilings
from step_work import Work

from unite_fast.config import Config, yaml_text
from unite_fast.modality.images import IMAGENET
from unite_fast.plan.throughput import NODE

PARTS = ("tokenize", "flow", "decode", "perceptual", "update")
# What an independent estimate predicted, images/s, by flow steps. It does not say how; its "ceiling per kernel class"
# (515, 200) has no counterpart here, since it does not state those ceilings.
BUDGET = {
    3: {"official code, eager encoder": 103, "everything compiled": 305, "ours, excellent": 406, "limit": 597},
    14: {"everything compiled": 122, "ours, excellent": 158, "limit": 230},
}


@dataclass(frozen=True)
class Scenario:
    """How far a program stays from the ceilings. Rates in TFLOP/s, by (forward, backward) where two are given."""

    name: str
    ceilings: Ceilings
    stream: tuple[float, float] = (1.0, 1.0)  # share of the bandwidth that elementwise kernels reach
    extra: tuple[float, float] = (1.0, 1.0)  # bytes that the encoder's elementwise kernels move over the least
    perceptual_extra: float = 1.0  # the same of LPIPS, its convolutions' maps included
    ranks: int = NODE  # over which a global batch is divided
    newton_schulz_share: float = 1.08 / NODE  # of all matrices on this GPU, the largest of the ranks' (LOG.md)
    newton_schulz: float = float("inf")  # TFLOP/s of its products, if less than of others
    copies: bool = True  # whether it brings gradients together as we do; else ``extra`` has what it does
    recompute_from: int | None = None  # flow steps from which on the flow's forward is computed twice
    notes: dict[str, str] = field(default_factory=dict)  # what the figures rest on

    def seconds(self, work: Work, flow_steps: int) -> float:
        """Of all ``count`` kernels."""
        c, back = self.ceilings, work.backward
        size, count = work.bytes, work.count
        bandwidth = c.bandwidth * 1e12
        if work.kind == "copy" and not self.copies:
            return 0.0
        if work.kind == "reduction":
            bandwidth *= self.stream[back]
        if work.kind == "elementwise" and work.part != "update":
            bandwidth *= self.stream[back]
            size *= self.perceptual_extra if work.part == "perceptual" else self._extra(work)
        if work.kind == "conv":
            size *= self.perceptual_extra
        rate = c.rate(work)
        if work.part == "update" and work.kind == "gemm":
            count *= self.newton_schulz_share
            rate = min(rate, self.newton_schulz)
        if work.part == "flow" and not back and self.recompute_from is not None and flow_steps >= self.recompute_from:
            count *= 2
        return count * max(work.flops / (rate * 1e12), size / bandwidth)

    def _extra(self, work: Work) -> float:
        return self.extra[work.backward] if work.part in ("tokenize", "flow") else 1.0


# Stated figures of one H200 (docs/DESIGN.md): 790 TFLOP/s of an 8192^3 product, 4.3 TB/s of a copy.
LIMIT = Ceilings("stated H200", gemm=790, conv=790, bandwidth=4.3)
EXCELLENT = Ceilings(
    "stated H200", gemm=640, conv=445, bandwidth=4.3,
    attention={512: (350, 270), 544: (350, 270), 288: (280, 210), 257: (240, 180), 256: (280, 210)},
)  # fmt: skip
ACCEPTED = Ceilings(
    "stated H200", gemm=560, conv=300, bandwidth=4.3,
    attention={512: (300, 220), 544: (300, 220), 288: (230, 170), 257: (190, 140), 256: (230, 170)},
)  # fmt: skip
PERCEPTUAL = 0.50  # GB per image of LPIPS as counted here; the first two scenarios' figures are 2.4 and 0.52
SCENARIOS = (
    Scenario(
        "official code, eager encoder", ACCEPTED, (0.8, 0.8), (257 / 37, 622 / 57), 2.4 / PERCEPTUAL, NODE, 1.0, 317,
        False, 5,
        {"extra": "879 KB per token and block", "left out": "launches, host synchronisations, Newton-Schulz in a loop"},
    ),
    Scenario(
        "everything compiled", ACCEPTED, (0.85, 0.42), (1.3, 1.3), 0.52 / PERCEPTUAL, NODE, 1.0, 317,
        False, None,
        {"stream": "torch.compile's RMSNorm: 3.5 to 4.2 TB/s forward, 1.6 to 1.85 backward", "extra": "a guess"},
    ),
    Scenario("ours, accepted", ACCEPTED, (0.78, 0.62), newton_schulz=317),
    Scenario("ours, excellent", EXCELLENT, (0.85, 0.75), newton_schulz=448),
    Scenario("limit", LIMIT),
)  # fmt: skip


def by_part(work: list[Work], scenario: Scenario, flow_steps: int, images: int) -> dict[str, float]:
    """Milliseconds per image."""
    sums: dict[str, float] = defaultdict(float)
    for item in work:
        sums[item.part] += scenario.seconds(item, flow_steps) * 1e3 / images
    return {part: sums[part] for part in PARTS}


def eta(work: list[Work], ceilings: Ceilings, flow_steps: int, images: int, images_per_second: float) -> float:
    """The time of all kernels at their ceilings over the measured time."""
    at_ceilings = Scenario("ceilings", ceilings, ranks=1, newton_schulz_share=1.0)
    ideal = sum(by_part(work, at_ceilings, flow_steps, images).values())
    return ideal * images_per_second / 1e3


def table(config: Config, images: int, scenarios: tuple[Scenario, ...]) -> list[dict]:
    """Prints and returns the prediction of every scenario."""
    steps = config.objective.flow_steps
    work = step_work.step(config, images, NODE)
    useful = sum(w.flops * w.count for w in work if w.part != "update") / images
    print(f"{useful / 1e9:,.0f} GFLOP per image, N = {steps}, micro-batch {images}; PREDICTIONS, ms per image by part")
    print(
        f"{'':30}" + "".join(f"{part:>11}" for part in PARTS) + f"{'sum':>8}{'images/s':>10}{'MFU':>8}{'epoch, 8':>10}"
    )
    rows = []
    for scenario in scenarios:
        parts = by_part(step_work.step(config, images, scenario.ranks), scenario, steps, images)
        total = sum(parts.values())
        rate = 1e3 / total
        row = {"scenario": scenario.name, "flow_steps": steps, "images": images, "ms_per_image": parts}
        row |= {"images_per_second": rate, "mfu": useful * rate / 989e12, "prediction": True}
        rows.append(
            row
            | {
                "minutes_per_epoch_8": IMAGENET / rate / NODE / 60,
                "basis": scenario.ceilings.source,
                "notes": scenario.notes,
            }
        )
        print(
            f"{scenario.name:30}" + "".join(f"{v:>11.3f}" for v in parts.values())
            + f"{total:>8.3f}{rate:>10.0f}{row['mfu']:>8.1%}{rows[-1]['minutes_per_epoch_8']:>9.1f}m"
        )  # fmt: skip
    return rows


def keep(rows: list[dict], config: str) -> Path:
    """Predictions are of no device: they have a file of their own, which holds the last of each configuration."""
    path = RESULTS / "roofline" / "predictions.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    steps = {row["flow_steps"] for row in rows if "flow_steps" in row}
    kept = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    kept = [row for row in kept if row["config"] != config or row.get("flow_steps") not in steps]
    where = {k: v for k, v in environment(torch.device("cpu")).items() if k in ("date", "commit", "dirty", "torch")}
    path.write_text("".join(json.dumps(row) + "\n" for row in [*kept, *(where | {"config": config} | r for r in rows)]))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", type=Path, default=ROOT / "configs" / "imagenet_b.yaml", help="a configuration")
    parser.add_argument("--batch", type=int, help="images of a micro-batch; by default the configuration's")
    parser.add_argument("--measure", action="store_true", help="measure the ceilings; always on a GPU")
    parser.add_argument("--images-per-second", type=float, help="of a measured step, for eta")
    parser.add_argument("--plot", action="store_true", help="draw the time by part")
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    config = yaml_text.load(arguments.model, arguments.overrides)
    device, batch = torch.device(arguments.device), arguments.batch or config.train.micro_batch
    scenarios = SCENARIOS
    if device.type == "cuda" or arguments.measure:
        here = measured_ceilings(step_work.step(config, batch), device)
        print(here.text())
        scenarios = (*SCENARIOS, Scenario("every kernel at its ceiling here", here, ranks=1, newton_schulz_share=1.0))
    rows = table(config, batch, scenarios)
    if config.model == Config().model:
        budget = BUDGET.get(config.objective.flow_steps, {})
        for row in rows:
            if target := budget.get(row["scenario"]):
                off = row["images_per_second"] / target - 1
                print(f"{row['scenario']:30}{row['images_per_second']:6.0f} here, {target} in the budget: {off:+.0%}")
    if arguments.images_per_second:
        work, rate, ceilings = (
            step_work.step(config, batch),
            arguments.images_per_second,
            scenarios[-1].ceilings,
        )
        share = eta(work, ceilings, config.objective.flow_steps, batch, rate)
        print(f"eta {share:.2f} at {rate:g} images/s, against the ceilings of: {ceilings.source}")
        rows.append({"eta": share, "images_per_second": rate, "basis": ceilings.source})
    if arguments.plot:
        from plots import time_by_part

        print(f"drawn: {time_by_part(rows[: len(scenarios)], config.name)}")
    if not arguments.no_record:
        path = record("roofline", device, rows) if device.type == "cuda" else keep(rows, config.name)
        print(f"{len(rows)} rows in {path.parent.name}/{path.name}")


if __name__ == "__main__":
    main()
