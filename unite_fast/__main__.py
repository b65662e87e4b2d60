"""python -m unite_fast VERB ...: every command of the package under one name; each is also a module of its own."""

from __future__ import annotations

import importlib
import sys

from unite_fast.base import command
from unite_fast.base.errors import UserError

VERBS = {
    "doctor": ("unite_fast.doctor", "what of a configuration this machine can run, and how to mend the rest"),
    "weights": ("unite_fast.weights", "fetch and check the VGG16 trunk of LPIPS"),
    "pack": ("unite_fast.data.pack", "write images as shards for data.source=packed"),
    "index": ("unite_fast.data.index", "index tars for data.source=tar"),
    "pack-atoms": (
        "unite_fast.data.atoms.__main__",
        "check and pack molecules and crystals for data.source=structures",
    ),
    "statistics": ("unite_fast.evaluation.statistics", "the real images' statistics, for FID"),
    "evaluate": ("unite_fast.evaluate", "a model: FID, its table and guidance search, rFID; evaluate atoms: molecules"),
    "score-atoms": ("unite_fast.evaluation.atoms.__main__", "files of molecules and crystals, whoever made them"),
    "analyse": (
        "unite_fast.analyse",
        "what a model has become: alignment of its passes, trajectories, entropy, probes",
    ),
    "sweep": ("unite_fast.sweep", "a list of configurations by seeds: train, measure, one table"),
    "small": ("unite_fast.evaluation.small", "scores of a model of small real images, real beside"),
    "digits": ("unite_fast.evaluation.digits", "what a run of the digits has learned"),
    "report": ("unite_fast.report", "a run's curves, pictures and scores as one page"),
    "export": ("unite_fast.export", "one set of weights as a safetensors file with its card"),
}
OTHER_NAMES = {"atoms": "pack-atoms"}
PROGRAMS = ("train", "sample")  # beside the package


def main(argv: list[str]) -> int | None:
    """Runs the command that ``argv`` names. Raises UserError for one that does not exist."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"python -m unite_fast VERB ...\n\n{__doc__}\n")
        print("\n".join(f"  {verb:12} {said}" for verb, (_, said) in VERBS.items()))
        print("\nEach explains itself: python -m unite_fast VERB --help. Training and sampling: train.py, sample.py.")
        return 0
    if argv[0] in PROGRAMS:
        raise UserError(f"{argv[0]} is a program of its own: python {argv[0]}.py {' '.join(argv[1:]) or '...'}")
    verb = OTHER_NAMES.get(argv[0], argv[0])
    if verb not in VERBS:
        raise UserError(f"no command '{verb}'; choose one of {', '.join(VERBS)}")
    return importlib.import_module(VERBS[verb][0]).main(argv[1:])


if __name__ == "__main__":
    sys.exit(command.run(main))
