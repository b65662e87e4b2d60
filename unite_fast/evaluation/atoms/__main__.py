"""Scores a file or folder of molecules or crystals, whoever made them. (A model: python -m unite_fast evaluate atoms.)

    python -m unite_fast.evaluation.atoms samples.sdf --real qm9 --training qm9
    python -m unite_fast.evaluation.atoms samples/ --real mp20_test.safetensors --training mp20_train.safetensors
    python -m unite_fast.evaluation.atoms reconstructions.xyz --of truth.xyz

SAMPLES and the others are .sdf, .xyz, .extxyz, .cif, a folder of them, or a .safetensors file that
``python -m unite_fast.data.atoms`` wrote. ``qm9`` and ``crystals`` name the test part (--real) and the training part
(--training) of those sources. --real gives the column of real structures and the distances, --training the novelty.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from unite_fast.base import files, outputs
from unite_fast.base.command import run
from unite_fast.base.errors import UserError
from unite_fast.data.atoms import Structures, open_structures
from unite_fast.data.atoms.files import read_path
from unite_fast.data.atoms.structures import load
from unite_fast.evaluation.atoms import report
from unite_fast.evaluation.atoms.molecules import SCORERS

PACKAGED = ("qm9", "crystals")
ANY_SIZE = 1 << 20


def samples(path: str, workers: int) -> tuple[Structures, int]:
    """Samples as they are, good or bad, and how many could not be read. Raises UserError."""
    if path.endswith(".safetensors"):
        return load(Path(path)), 0
    read = read_path(Path(path), ANY_SIZE, workers)
    return read.structures, len(read.bad)


def real(name: str | None, part: str, workers: int) -> Structures | None:
    """Real structures by the name of a source or of a file."""
    if name is None:
        return None
    if name in PACKAGED:
        return open_structures(name, part=part, workers=workers)
    source = "packed" if name.endswith(".safetensors") else "files"
    return open_structures(source, name, "all", ANY_SIZE, workers=workers)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m unite_fast.evaluation.atoms",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("samples", metavar="SAMPLES")
    parser.add_argument("--of", metavar="TRUTH", help="the samples are reconstructions of these, in the same order")
    parser.add_argument("--real", metavar="REAL", help="held-out structures: qm9, crystals, or a file")
    parser.add_argument(
        "--training", metavar="TRAINING", help="what the model was trained on: qm9, crystals, or a file"
    )
    parser.add_argument("--scorer", choices=SCORERS, default="rdkit", help="the rule of validity (default rdkit)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the result with its protocol")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: one per core")
    a = parser.parse_args(argv)
    if a.workers < 0:
        raise UserError("--workers must not be negative")
    if a.of and (a.real or a.training or a.scorer != "rdkit"):
        raise UserError(
            "--of compares reconstructions with their truths; --real, --training and --scorer are of samples"
        )
    if a.out is not None:
        read = [path for path in (a.samples, a.of, a.real, a.training) if path and path not in PACKAGED]
        outputs.check_file(a.out, "--out", read, outputs.holds_json("scores"))
    made, unreadable = samples(a.samples, a.workers)
    result: dict[str, Any]
    if a.of:
        true, lost = samples(a.of, a.workers)
        if unreadable or lost:
            raise UserError(f"{unreadable} reconstructions and {lost} truths could not be read, so pairs are unknown")
        result = report.reconstructed(made, true, a.scorer, a.workers)
    else:
        against, training = real(a.real, "test", a.workers), real(a.training, "train", a.workers)
        result = report.generated(made, against, training, scorer=a.scorer, unreadable=unreadable, workers=a.workers)
    print(report.table(result))
    if a.out is not None:
        with files.refusals(f"--out {a.out}"):
            files.write_json(a.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
