"""Scores of a checkpoint, each written with everything that it depends on.

    python -m unite_fast.evaluate fid --checkpoint runs/imagenet_b --reference imagenet256.npz \\
        --inception weights-inception-2015-12-05-6726825d.pth

    fid --protocol scores/fid_a.json ...  the same weights and settings again; the files' hashes are compared.
                                          scores/training/step_N_search.json: its best, of checkpoints/step-N
    table ...                             the paper's protocols: Heun 50 balanced, dopri5 balanced, dopri5 random;
                                          and, not the paper's, exp3 with 32 steps
    search ... [--sweep]                  the published search for the guidance scale; goes on when rerun
    search ... --grid 1,4,0.2             every scale of a grid in its place
    rfid --checkpoint ... --inception ... reconstructions of the held-out images: rFID, PSNR, L1, LPIPS
    heldout --checkpoint ...              PSNR, L1 and, with LPIPS' weights, LPIPS of the same; needs no Inception
    atoms --checkpoint ...                samples and reconstructions of molecules and crystals (evaluation.atoms.runs)

Under torchrun the work is shared out. Results lie in RUN/scores (beside an export; of an official .pt in ./scores)
unless --out says otherwise. A name holds the step, the weights, the guidance scale and solver, and digits of the whole
protocol's hash, so that a result replaces none of another protocol:

    fid_step_0001404_ema_w2_heun10_5e1c0f3a.json

Options that are not given are those of --protocol, or of the run, as its scores while training have them: its sections
sample and evaluation with extractor and reference, efficiency.kernels, the best guidance scale that they found. An
official .pt is scored in fp32 with the guidance scale that its own training found best, on (0.1, 1), as published.
"""

from __future__ import annotations

import argparse

import torch

from unite_fast import checkpoint, sampling
from unite_fast.base.errors import UserError, idle
from unite_fast.checkpoint import guide
from unite_fast.config import Config, EfficiencyConfig, EvaluationConfig, choices
from unite_fast.efficiency import precision
from unite_fast.evaluate.commands import COMMANDS, OF_RECONSTRUCTIONS, parse_grid
from unite_fast.evaluate.context import Context, fill_in
from unite_fast.evaluation import statistics
from unite_fast.evaluation.atoms import runs
from unite_fast.evaluation.results import read_result
from unite_fast.parallel import distributed
from unite_kernels import backend

OTHERS = {"atoms": runs}  # commands that are programs of their own
NEEDED = {
    "fid": "search",
    "table": "search",
    "search": "search",
    "heldout": "rfid",
    "rfid": "rfid",
}  # one of ``Modality.scores``


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m unite_fast.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in OTHERS:
        commands.add_parser(name, help=f"its options: python -m unite_fast evaluate {name} --help", add_help=False)
    for name in COMMANDS:
        one = commands.add_parser(name)
        add = one.add_argument
        add("--checkpoint", required=True, metavar="PATH", help="run folder, step-N folder, export, or official .pt")
        add("--weights", metavar="NAME", help="ema, model, or another average that it has (default: the run's)")
        add("--out", metavar="FILE", help="the result (default: in RUN/scores, named after what it depends on)")
        add("--device", choices=choices(Config, "device"), default="auto")
        add("--debug", action="store_true", help="show tracebacks")
        add("--precision", choices=choices(EvaluationConfig, "precision"), help="of the network (default: the run's)")
        add("--kernels", choices=choices(EfficiencyConfig, "kernels"), help="of the network (default: the run's)")
        if name != "heldout":
            statistics.add_extractor_options(one)
            one.set_defaults(extractor=None)  # the run's
        if name in OF_RECONSTRUCTIONS:
            add(
                "--lpips",
                metavar="FILE",
                help="torchvision's vgg16-397923af.pth (default: the run's, or one that is here)",
            )
            add("--data", metavar="FOLDER", help="held-out images (default: the run's data.heldout_path)")
            continue
        add("--reference", metavar="FILE.npz", help="statistics of the real images (default: the run's)")
        add("--count", type=int, help="images (default: the run's)")
        add("--pairs", action="store_true", help="also KID and precision/recall; needs a reference with features")
        add("--kid-subset", type=int, help="images of a KID subset (default: 1000)")
        add(
            "--cfg",
            type=float,
            metavar="W",
            help="guidance scale (default: the best that the run found, else the run's)",
        )
        add("--cfg-interval", metavar="LOW,HIGH", help="where guidance acts (default: the run's)")
        guide.add_options(add)
        add("--compile", action="store_true", help="torch.compile of the network's blocks")
        add("--graph", action="store_true", help="replay the network's evaluations from CUDA graphs")
        if name == "search":
            add("--sweep", action="store_true", help="then other intervals and, but for autoguidance, cfg_first")
            add("--grid", metavar="LOW,HIGH,STEP", help="all these scales, in place of the walk from --cfg")
        if name == "fid":
            add("--protocol", metavar="FILE", help="an earlier result: its settings are used, its hashes compared")
        if name != "table":
            add("--cfg-order", choices=sampling.ORDERS)
            add("--labels", choices=("equal", "random"))
            add("--solver", choices=sampling.SOLVERS)
            add("--steps", type=int)
    arguments = parser.parse_args(argv)
    if (
        arguments.command not in OF_RECONSTRUCTIONS
        and arguments.kid_subset
        and not arguments.pairs
        and not getattr(arguments, "protocol", None)
    ):
        raise idle("--kid-subset", "without --pairs")
    if getattr(arguments, "grid", None):
        parse_grid(arguments.grid)
        if arguments.cfg is not None:
            raise idle("--cfg", "with --grid, which names the scales")
    return arguments


def main(argv: list[str]) -> None:
    if argv and argv[0] in OTHERS:
        return OTHERS[argv[0]].main(argv[1:])
    arguments = parse(argv)
    earlier = read_result(arguments.protocol) if getattr(arguments, "protocol", None) else None
    located = checkpoint.locate(arguments.checkpoint)
    fill_in(arguments, earlier, located)
    model, config = checkpoint.load_model(located, arguments.weights)
    if NEEDED[arguments.command] not in model.modality.scores:
        raise UserError(f"{arguments.command} does not score {model.modality.thing}s, which {located} makes; "
                        f"{' or '.join(OTHERS)} does")  # fmt: skip
    ranks = distributed.start(arguments.device)
    try:
        precision.setup(ranks.device)
        arguments.kernels = arguments.kernels and backend.settled(arguments.kernels, ranks.device)
        context = Context(arguments, located, model.to(ranks.device), config, ranks, earlier)
        ranks.decide(context.check_out)
        with torch.no_grad():
            COMMANDS[arguments.command](context)
    finally:
        distributed.stop()
