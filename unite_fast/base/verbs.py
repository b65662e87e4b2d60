"""The commands of ``python -m unite_fast``: their names, the modules that hold them, what they are for."""

from __future__ import annotations

from unite_fast.base.command import PROGRAMS
from unite_fast.base.errors import UserError

VERBS = {
    "doctor": ("unite_fast.doctor", "what of a configuration this machine can run, and how to mend the rest"),
    "fetch": ("unite_fast.fetch", "pretrained weights and images of others, checked by hash"),
    "pack": ("unite_fast.data.pack", "write images as shards for data.source=packed"),
    "index": ("unite_fast.data.index", "index tars for data.source=tar"),
    "pack-atoms": (
        "unite_fast.data.atoms.__main__",
        "check and pack molecules and crystals for data.source=structures",
    ),
    "statistics": ("unite_fast.evaluation.statistics", "the real images' statistics, for FID"),
    "evaluate": ("unite_fast.evaluate", "a model: FID, its table and guidance search, held-out PSNR, rFID, molecules"),
    "score-atoms": ("unite_fast.evaluation.atoms.__main__", "files of molecules and crystals, whoever made them"),
    "analyse": (
        "unite_fast.analyse",
        "what a model has become: alignment of its passes, trajectories, entropy, probes",
    ),
    "sweep": ("unite_fast.sweep", "a list of configurations by seeds: train, measure, one table"),
    "small": ("unite_fast.evaluation.small", "scores of a model of small real images, real beside"),
    "digits": ("unite_fast.evaluation.digits", "what a run of the digits has learned"),
    "report": ("unite_fast.report", "a run's curves, pictures and scores as one page"),
    "gallery": ("unite_fast.report.gallery", "guidance, classes of one noise, between two seeds or images, neighbours"),
    "export": ("unite_fast.export", "one set of weights as a safetensors file with its card"),
}
OTHER_NAMES = {"atoms": "pack-atoms", "weights": "fetch"}


def check(verb: str) -> None:
    """Raises UserError for a command that does not exist."""
    if verb not in (*PROGRAMS, *VERBS, *OTHER_NAMES):
        raise UserError(f"no command '{verb}'; choose one of {', '.join([*PROGRAMS, *VERBS])}")
