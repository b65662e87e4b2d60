"""Samples images, molecules or crystals from a checkpoint, or reconstructs those of a user's files."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from unite_fast import checkpoint, sampling
from unite_fast.base import command
from unite_fast.base.errors import UserError, idle
from unite_fast.checkpoint import guide
from unite_fast.config import Config, EfficiencyConfig, EvaluationConfig, SampleConfig, choices
from unite_fast.efficiency import precision
from unite_fast.parallel import distributed
from unite_fast.sampling.makers import maker_of
from unite_fast.sampling.request import Request, named, parse_interval, parse_labels, parse_seeds
from unite_kernels import backend

SEEDS, LABELS = "0-49", "equal"
OF_SAMPLES = (
    "overwrite", "seeds", "labels", "cfg", "cfg_interval", "cfg_order", "autoguidance", "autoguidance_weights",
    "solver", "steps", "last", "compile", "graph",
)  # fmt: skip


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sample.py", description=__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="run folder, step-N folder, export, or official .pt")
    add("--weights", default="ema", metavar="NAME", help="ema (default), model, or another average that it has")
    add("--out", required=True, metavar="PATH", help="folder, grid.png, .npz, .tar; of atoms .sdf, .xyz, .extxyz")
    add("--overwrite", action="store_true", help="replace images made with another checkpoint or other options")
    add("--seeds", help=f"one image each: 0-49999, or 1,5,8-11 (default: {SEEDS})")
    add("--labels", help=f"equal, random, none, or a list of classes such as 3,7 or dog,cat used in turn "
        f"(default: {LABELS})")  # fmt: skip
    add("--cfg", type=float, metavar="W", help="guidance scale; 1 is none (default: the run's; of an official .pt the "
        "best that its training found)")  # fmt: skip
    add("--cfg-interval", metavar="LOW,HIGH", help="times at which guidance acts (default: the run's; of an official "
        ".pt that of its search, 0.1,1)")  # fmt: skip
    add("--cfg-order", choices=sampling.ORDERS, help="normalise and combine (default: the run's)")
    guide.add_options(add)
    add("--solver", choices=sampling.SOLVERS, help="dopri5 chooses its steps per 32 images (default: the run's)")
    add("--steps", type=int, help="steps of a fixed-step solver (default: the run's)")
    add("--last", choices=choices(SampleConfig, "last"), help="what is decoded: the solver's last state, or the "
        "latents that the network predicts from it (default: the run's)")  # fmt: skip
    add("--batch", type=int, default=64, help="images between writes; the network runs 32 at a time (default: 64)")
    add("--precision", choices=choices(EvaluationConfig, "precision"), default="fp32", help="of the network; the ODE "
        "state is fp32")  # fmt: skip
    add("--kernels", choices=choices(EfficiencyConfig, "kernels"), default="auto", help="of the network (default: "
        "auto, fused where that is installed)")  # fmt: skip
    add("--compile", action="store_true", help="torch.compile of the network's blocks; changes rounding")
    add("--graph", action="store_true", help="replay the network's evaluations from CUDA graphs")
    add("--device", choices=choices(Config, "device"), default="auto")
    add("--reconstruct", metavar="PATH", help="instead of sampling: an image or a folder of them, or of structures")
    add("--debug", action="store_true", help="show tracebacks")
    arguments = parser.parse_args(argv)
    if arguments.batch < 1:
        raise UserError(f"--batch must be at least 1, got {arguments.batch}")
    if arguments.reconstruct and (given := [name for name in OF_SAMPLES if getattr(arguments, name)]):
        raise idle(f"--{given[0].replace('_', '-')}", "with --reconstruct")
    return arguments


def request(arguments: argparse.Namespace, run: SampleConfig, num_classes: int, names: Sequence[str] = ()) -> Request:
    """What to generate, from options and, where they are silent, from ``run``, the run's ``sample`` section.

    names: of the classes.
    """
    asked = {
        "solver": arguments.solver, "steps": arguments.steps, "cfg_scale": arguments.cfg,
        "cfg_interval": None if arguments.cfg_interval is None else parse_interval(arguments.cfg_interval),
        "cfg_order": arguments.cfg_order, "last": arguments.last,
    }  # fmt: skip
    how = dataclasses.replace(run, **{name: value for name, value in asked.items() if value is not None})
    sampling.check(how, guided_by_model=bool(arguments.autoguidance))
    for option in ("cfg_interval", "cfg_order", "autoguidance"):
        if how.cfg_scale == 1 and getattr(arguments, option):
            raise idle(f"--{option.replace('_', '-')}", "without guidance, which --cfg gives")
    unguided = "of a model without classes" if num_classes == 0 else "with --labels none"
    if how.cfg_scale != 1 and not arguments.autoguidance and (num_classes == 0 or arguments.labels == "none"):
        if arguments.cfg is not None:
            raise idle("--cfg", unguided)
        how = dataclasses.replace(how, cfg_scale=1.0)
    seeds = parse_seeds(SEEDS if arguments.seeds is None else arguments.seeds)
    labels = parse_labels(arguments.labels or LABELS, seeds, num_classes, names)
    return Request(seeds, labels, how, arguments.batch, null=num_classes, class_names=names)


def describe(located: Path, arguments: argparse.Namespace, how: SampleConfig | None) -> str:
    """What the images are made with, in one line. how: None where nothing is sampled."""
    step = checkpoint.recorded_step(located)
    said = f"{located}{'' if step is None else f' (step {step})'}, {arguments.weights} weights"
    if how is None:
        return said
    steps = "" if how.solver == "dopri5" else f", steps {how.steps}"
    guidance = f"w {how.cfg_scale:g}"
    if how.cfg_scale != 1:
        by = f" by {arguments.autoguidance}" if arguments.autoguidance else ""
        guidance += f"{by} for t in {list(how.cfg_interval)}, {how.cfg_order}"
    return f"{said}; {how.solver}{steps}, {guidance}, last {how.last}"


def main(argv: list[str]) -> int:
    arguments = parse(argv)
    located = checkpoint.locate(arguments.checkpoint)
    model, config = checkpoint.load_model(located, arguments.weights)
    maker, classes = maker_of(model.modality), config.model.num_classes
    names = checkpoint.class_names(located)
    wanted = None if arguments.reconstruct else request(arguments, config.sample, classes, names)
    ranks = distributed.start(arguments.device)
    try:
        if ranks.is_main:
            print(describe(located, arguments, wanted and wanted.how))
            if wanted and arguments.labels and names:
                print(named(wanted.labels, names))
        ranks.decide(lambda: maker.check_out(arguments.out, checkpoint.reads(located), arguments.reconstruct))
        precision.setup(ranks.device)
        model.to(ranks.device)
        kernels = backend.settled(arguments.kernels, ranks.device)
        model.use_kernels(kernels)
        replays = sampling.open_replays(arguments.graph, ranks.device)
        with torch.no_grad(), precision.autocast(arguments.precision, ranks.device):
            compiled = "compiled" if arguments.compile else "as written"
            network = f"{arguments.weights} {arguments.precision} {kernels} {compiled}"
            identity = f"{checkpoint.identity(located)} {network}"
            out, batch = arguments.out, arguments.batch
            if wanted is None:
                t_max = config.objective.tokenizer_t_max
                said = maker.reconstruct(model, arguments.reconstruct, out, batch, ranks, t_max, identity, config.data)
            else:
                if weak := guide.asked(arguments, model, names, ranks, kernels):
                    wanted, identity = dataclasses.replace(wanted, guide=weak.model), f"{identity}; {weak.identity}"
                if arguments.compile:
                    for one in filter(None, (model, wanted.guide)):
                        sampling.compile_blocks(one)
                said = maker.make(model, wanted, out, ranks, identity, arguments.overwrite, replays)
        if ranks.is_main:
            print(said)
    finally:
        distributed.stop()
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main))
