"""Writes docs/COMPOSITION.md: which ways of computing a step go together, and which runs show it.

    python scripts/composition.py

What is refused is asked of ``efficiency.compatibility``; the runs are those of tests/test_composition.py, which also
holds the file to what this makes.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from unite_fast.base.errors import UserError
from unite_fast.config import yaml_text
from unite_fast.efficiency import compatibility

TARGET = Path(__file__).resolve().parents[1] / "docs" / "COMPOSITION.md"
STEPS = 20
RANKS = {"ddp": 2, "fsdp2": 2, "fsdp2 pass": 2, "hsdp": 4}
STRATEGIES = {
    "ddp": (),
    "fsdp2": ("train.strategy=fsdp2",),
    "fsdp2 pass": ("train.strategy=fsdp2", "train.reshard=pass"),
    "hsdp": ("train.strategy=hsdp", "train.shard_size=2"),
}
# Option by the key that it belongs to: values of one key exclude each other.
OPTIONS = {
    "fp32": ("precision", ("efficiency.precision=fp32",)),
    "bf16": ("precision", ("efficiency.precision=bf16",)),
    "fp8": ("precision", ("efficiency.precision=fp8",)),
    "fp8_te": ("precision", ("efficiency.precision=fp8_te",)),
    "compile decoder": ("compile", ("efficiency.compile=decoder",)),
    "compile all": ("compile", ("efficiency.compile=all",)),
    "graph flow": ("graph", ("efficiency.cuda_graph=flow",)),
    "graph step": ("graph", ("efficiency.cuda_graph=step",)),
    "graph accumulation": ("graph", ("efficiency.cuda_graph=accumulation", "train.micro_batch=8")),
    "recompute": ("recompute", ("efficiency.recompute=blocks",)),
    "fused kernels": ("kernels", ("efficiency.kernels=fused",)),
    "accumulation": ("accumulation", ()),
    "several averages": ("averages", ("optim.ema_extra=[0.9, std0.1]", "optim.ema_warmup=true")),
    "scores": ("scores", ()),
    "Muon whole": ("muon", ("efficiency.shard_muon=false",)),
    "no overlap": ("overlap", ("efficiency.overlap_gradients=false",)),
    "smaller micro-batches": ("oom", ("train.on_oom=halve",)),
    "replica check": ("replicas", ("train.replica_check_every=10",)),
}
GPU = ("fp8_te", "graph flow", "graph step", "graph accumulation")  # no CPU runs them
EVERYTHING = ("recompute", "fused kernels", "accumulation", "several averages", "scores")
WHOLE_SHARES = tuple(option for option in EVERYTHING if option != "accumulation")
APART = ("Muon whole", "no overlap", "replica check", "smaller micro-batches")


class Run(NamedTuple):
    strategy: str
    options: tuple[str, ...]


RUNS = {
    "A": Run("ddp", ("fp32", "compile decoder", *EVERYTHING)),
    "B": Run("ddp", ("bf16", "compile decoder", *EVERYTHING, "replica check")),
    "C": Run("ddp", ("fp8", "compile decoder", *EVERYTHING, *APART)),
    "D": Run("fsdp2", ("fp32", "compile all", *EVERYTHING)),
    "E": Run("fsdp2", ("bf16", "compile decoder", *EVERYTHING)),
    "F": Run("fsdp2 pass", ("bf16", "compile decoder", *EVERYTHING)),
    "G": Run("hsdp", ("bf16", "compile decoder", *EVERYTHING, "replica check")),
    "H": Run("ddp", ("bf16", "compile all", *EVERYTHING, *APART)),
    "I": Run("ddp", ("fp32", *EVERYTHING, *APART)),
    "J": Run("ddp", ("fp8", "compile all", *EVERYTHING)),
    "K": Run("fsdp2 pass", ("fp32", "compile all", *EVERYTHING)),
    "L": Run("hsdp", ("fp32", "compile all", *EVERYTHING)),
    "M": Run("fsdp2", ("fp8", "compile decoder", *EVERYTHING)),
    "N": Run("fsdp2 pass", ("fp8", "compile all", *EVERYTHING)),
    # A scale is that of a micro-batch: on four ranks, one of two images would be another step than the plain one.
    "O": Run("hsdp", ("fp8", "compile decoder", *WHOLE_SHARES, "replica check")),
}
ASKED = "EHIJKLNO"  # with COMPOSITION=all alone
# Largest difference of a loss from that of the plain step over STEPS steps, relative to the total: fp32 adds in another
# order; the others round in other places, with fused kernels, other micro-batches and other layouts.
TOLERANCE = {"fp32": 1e-3, "bf16": 1e-2, "fp8": 5e-2}


def overrides(strategy: str, options: tuple[str, ...]) -> tuple[str, ...]:
    """Of a configuration, in ``key=value``."""
    return (*STRATEGIES[strategy], *(word for option in options for word in OPTIONS[option][1]))


def precision_of(run: Run) -> str:
    return next(option for option in run.options if OPTIONS[option][0] == "precision")


@functools.cache
def refusal(strategy: str, options: tuple[str, ...]) -> str:
    """Why these do not go together, in one line; empty: they do."""
    try:
        config = yaml_text.load(None, ["data.source=digits", *overrides(strategy, options)])
        compatibility.check(config.efficiency, config.train, RANKS[strategy])
        compatibility.check_graph(config.efficiency, config.train, config.objective, torch.device("cuda"))
    except UserError as error:
        return str(error)
    return ""


@functools.cache
def shown_by(strategy: str, options: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the runs of ``strategy`` (empty: of any) with all of these."""
    return tuple(n for n, run in RUNS.items() if strategy in ("", run.strategy) and set(options) <= set(run.options))


def cell(strategy: str, options: tuple[str, ...]) -> str:
    if refusal(strategy, options):
        return "refused"
    if any(option in GPU for option in options):
        return "on a GPU"
    return " ".join(shown_by(strategy, options)) or "allowed"


def pairs() -> list[tuple[str, str]]:
    """Of options that do not exclude each other."""
    return [(a, b) for a, b in itertools.combinations(OPTIONS, 2) if OPTIONS[a][0] != OPTIONS[b][0]]


def pair_cell(a: str, b: str) -> str:
    """Over all strategies that allow both."""
    open_to = [strategy for strategy in STRATEGIES if not refusal(strategy, (a, b))]
    if not open_to:
        return "refused"
    if a in GPU or b in GPU:
        return "on a GPU"
    return " ".join(shown_by("", (a, b))) or "allowed"


def text() -> str:
    names = list(STRATEGIES)
    lines = [
        "# Which ways of computing a step go together",
        "",
        "Made by `python scripts/composition.py`; `tests/test_composition.py` holds it to that, and runs the runs.",
        "",
        f"A letter is a run of {STEPS} steps of a tiny model on 2 gloo ranks (hsdp: 4) that has all of its options at",
        "once. Its losses equal those of the plain step (one process, eager, nothing else than the precision) to the",
        "tolerance below, relative to the total. `allowed`: nothing is against it, and no run has it. `on a GPU`: no",
        "CPU can run it; see benchmarks/GPU_BACKLOG.md. `refused`: in one line, before anything runs, listed below.",
        f"{', '.join(ASKED[:-1])} and {ASKED[-1]} take minutes and run where they are asked for:",
        "`COMPOSITION=all pytest tests/test_composition.py`.",
        "",
        "| run | strategy | options | losses within |",
        "|---|---|---|---|",
        *(
            f"| {name} | {run.strategy} | {', '.join(run.options)} | {TOLERANCE[precision_of(run)]:g} |"
            for name, run in RUNS.items()
        ),
        "",
        "## Each option under each strategy",
        "",
        f"| option | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
        *(f"| {option} | {' | '.join(cell(s, (option,)) for s in names)} |" for option in OPTIONS),
        "",
        "## Pairs of options, under the strategies that allow both",
        "",
        "| option | beside | shown by |",
        "|---|---|---|",
        *(f"| {a} | {b} | {pair_cell(a, b)} |" for a, b in pairs()),
        "",
        "## What is refused, and what is said",
        "",
        *refusals(),
    ]
    return "\n".join(lines) + "\n"


def refusals() -> list[str]:
    """Each line that a strategy or a pair is refused with, once."""
    single = [refusal(s, (o,)) for s in STRATEGIES for o in OPTIONS]
    both = [refusal(s, pair) for s in STRATEGIES for pair in pairs()]
    return [f"- `{said}`" for said in dict.fromkeys([*single, *both]) if said]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    TARGET.write_text(text())


if __name__ == "__main__":
    main(sys.argv[1:])
