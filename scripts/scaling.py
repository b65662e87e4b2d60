"""Writes docs/SCALING.md: what each rank sends in a step, and what a step would take on 8 to 512 GPUs: a model. And
what starts and checkpoints cost a rank, as benchmarks/bench_checkpoint.py has measured it.

python scripts/scaling.py
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from unite_fast.config import Config
from unite_fast.config.yaml_text import load
from unite_fast.model.flops import peak_of
from unite_fast.plan.cost import step_flops
from unite_fast.plan.traffic import Link, of_strategy, seconds, step_traffic

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "SCALING.md"
NODE = 8  # GPUs
DEVICE, MFU = "NVIDIA H200", 0.4
# Links: what a rank sends in one direction, and the part of it that collectives of large tensors reach.
NVLINK = Link(450e9 * 0.8, 5e-6)
NETWORK = Link(50e9 * 0.8, 10e-6)  # 400 Gb/s per GPU
GPUS = (8, 16, 64, 128, 256, 512)
STRATEGIES = ("ddp", "fsdp2", "hsdp")
MODELS = ("imagenet_b", "imagenet_xl")
EACH = 128  # images per GPU and step where the batch grows with the GPUs
MB = 1e6


class Row(NamedTuple):
    """Of one strategy on so many GPUs. Times in ms: alone, and of the collectives if nothing hid them."""

    gpus: int
    strategy: str
    sent: dict[str, float]
    compute: float
    talk: float
    muon: float  # of ``talk``

    @property
    def between(self) -> tuple[float, float]:
        """Efficiency if nothing of the traffic is hidden, and if all is that the compute can hide."""
        return self.compute / (self.compute + self.talk), self.compute / max(self.compute, self.talk)


def row(config: Config, gpus: int, strategy: str, images: float) -> Row:
    """images: per GPU and step."""
    c = config
    train = of_strategy(c.train, strategy, NODE)
    found = step_traffic(c.model, c.optim, c.efficiency, train, gpus)
    peak = peak_of(DEVICE)
    assert peak is not None
    flops = step_flops(c.model, c.objective)["total"] * images
    taken = {use: 1e3 * time for use, time in seconds(found, NVLINK, NETWORK, NODE).items()}
    sent = {use: x.sent for use, x in found.items()}
    return Row(gpus, strategy, sent, 1e3 * flops / (MFU * peak), sum(taken.values()), taken["muon"])


def table(config: Config, batch: int) -> list[str]:
    """batch: images per step, 0: EACH per GPU."""
    lines = [
        "| GPUs | strategy | images per GPU | weights MB | gradients MB | copies MB | Muon MB | compute ms | traffic ms"
        " | of it Muon ms | efficiency, none hidden to all hidden |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for gpus in GPUS:
        for strategy in STRATEGIES:
            if strategy == "hsdp" and gpus == NODE:
                continue  # is fsdp2
            images = batch / gpus if batch else EACH
            r = row(config, gpus, strategy, images)
            sent = [f"{r.sent.get(use, 0) / MB:,.0f}" for use in ("weights", "gradients", "copies", "muon")]
            low, high = r.between
            lines.append(
                f"| {gpus} | {strategy} | {images:g} | {' | '.join(sent)} | {r.compute:,.1f} | {r.talk:,.1f} "
                f"| {r.muon:,.1f} | {low:.0%} to {high:.0%} |"
            )
    return lines


def text() -> str:
    head = [
        "# Traffic of a step, and how far it would scale",
        "",
        "Made by `python scripts/scaling.py`. **A model, not a measurement**, but for the last table: nothing here has",
        "run on a GPU.",
        "",
        "Bytes are those that a rank sends (`unite_fast/plan/traffic.py`); `tests/test_traffic.py` holds them to the",
        "collectives that are counted on 2 and 4 ranks. Times are bytes over links, one collective after the other:",
        f"{NVLINK.bandwidth / 1e9:g} GB/s within a node of {NODE} (NVLink, 80 % of 450 GB/s per direction) and",
        f"{NETWORK.bandwidth / 1e9:g} GB/s per GPU between nodes (80 % of 400 Gb/s), {NVLINK.latency * 1e6:g} and",
        f"{NETWORK.latency * 1e6:g} us per collective for each doubling of its ranks. A group over whole nodes uses",
        f"all {NODE} links of a node; a copy of a shard its own one. Compute is the step's FLOPs at an MFU of",
        f"{MFU:.0%} on the {DEVICE}, whatever the micro-batch, without the update. Reductions can hide behind the last",
        "backward alone and gathers behind the first forward, so the truth lies between the two efficiencies, nearer",
        "the first where a GPU has few images.",
        "",
        "Muon's matrices travel while others are orthogonalised and AdamW runs. Had the last of them until the next",
        "step's first pass needs them, a step would gain at most what the column says; on one node, where a rank's",
        "products take longer than the transfer, at most a quarter of it (the last of these models' four buffers).",
    ]
    for name in MODELS:
        config = load(str(ROOT / "configs" / f"{name}.yaml"))
        batch = config.train.global_batch
        head += ["", f"## {name}, {EACH} images per GPU", "", *table(config, 0)]
        head += ["", f"## {name}, {batch} images per step as published", "", *table(config, batch)]
    return "\n".join([*head, "", *checkpoints()]) + "\n"


def checkpoints() -> list[str]:
    """Of the newest rows of benchmarks/bench_checkpoint.py, a table for each device."""
    lines = ["## Starts and checkpoints, measured"]
    for path in sorted(ROOT.glob("benchmarks/results/*/checkpoint.jsonl")):
        rows = {(r["strategy"], r["ranks"]): r for r in map(json.loads, path.read_text().splitlines())}
        first = next(iter(rows.values()))
        lines += [
            "",
            f"`python benchmarks/bench_checkpoint.py` on an {first['device']}, ranks over gloo: a state of",
            f"{first['whole'] / MB:.0f} MB. CPU seconds of the slowest rank, the median of {first['repeats']}; MB of",
            "the rank with the most. Each rank builds the whole model before it keeps its shard, and reads the index",
            "of every file, which is what grows with the ranks. Before a run resumes from a checkpoint, its own or",
            "a named one, each rank hashes its share of the files.",
            "",
            "| strategy | ranks | start s | save s | a rank writes MB | load s | a rank reads MB | hash s "
            "| a rank hashes MB |",
            "|---|---|---|---|---|---|---|---|---|",
            *(checkpoint_line(*key, r) for key, r in rows.items()),
        ]
    return lines


def checkpoint_line(strategy: str, ranks: int, r: dict[str, Any]) -> str:
    s, (_, written), (_, read), hashed = r["seconds"], r["written"], r["read"], r["hashed"]
    cells = [s["start"], s["save"], written / MB, s["load"], read / MB, s["verify"], hashed / MB]
    formats = (".2f", ".2f", ".1f", ".2f", ".1f", ".3f", ".1f")
    return f"| {strategy} | {ranks} | {' | '.join(f'{c:{f}}' for c, f in zip(cells, formats, strict=True))} |"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    TARGET.write_text(text())


if __name__ == "__main__":
    main(sys.argv[1:])
