"""Reads molecules or crystals once and writes them packed, for runs to load in a moment; says what they are.

    python -m unite_fast.data.atoms qm9 --part train --out qm9_train.safetensors
    python -m unite_fast.data.atoms mp20 mp_20/ --part train --largest 20 --out mp20_train.safetensors
    python -m unite_fast.data.atoms files mine/ --on-error skip

Without --out it only reads and checks. A run uses the file with data.source=structures data.path=FILE.
Scores: ``python -m unite_fast score-atoms`` of samples in files, ``python -m unite_fast evaluate atoms`` of a model.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from unite_fast.base import outputs
from unite_fast.base.command import run
from unite_fast.base.errors import UserError, idle
from unite_fast.data.atoms import PARTS, SOURCES, SPLITS, describe, open_structures
from unite_fast.data.atoms.structures import is_packed


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m unite_fast.data.atoms",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", choices=SOURCES)
    parser.add_argument("path", nargs="?", default="", help="folder or file; qm9 and crystals have a package instead")
    parser.add_argument("--out", type=Path, metavar="FILE.safetensors")
    parser.add_argument("--part", choices=PARTS, default="all")
    parser.add_argument("--split", choices=SPLITS, default="edm", help="of QM9 (default edm)")
    parser.add_argument("--largest", type=int, default=29, help="atoms that the network takes (default 29)")
    parser.add_argument("--max-heavy-atoms", type=int, default=0, help="leave larger ones out; 0: none")
    parser.add_argument("--on-error", choices=("fail", "skip"), default="fail", help="skip: leave bad ones out")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: one per core")
    a = parser.parse_args(argv)
    if a.largest < 1 or a.max_heavy_atoms < 0 or a.workers < 0:
        raise UserError("--largest must be positive, --max-heavy-atoms and --workers not negative")
    if a.split != "edm" and a.source != "qm9":
        raise idle("--split", f"for {a.source}, which has no such splits")
    if a.workers and a.source in ("packed", "qm9"):
        raise idle("--workers", f"for {a.source}, which one process reads")
    if a.out is not None:
        outputs.check_file(a.out, "--out", [a.path] if a.path else [], is_packed)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    structures = open_structures(a.source, a.path, a.part, a.largest, a.on_error, a.split, a.max_heavy_atoms, a.workers)
    print(describe(structures))
    if a.out is not None:
        structures.save(a.out)
        print(f"{a.out}: use data.source=structures data.path={a.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
