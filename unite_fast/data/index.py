"""Writes the indexes that data.source=tar reads beside tars in WebDataset's layout (see tar.py).

    python -m unite_fast.data.index PATH...

PATH is a .tar, or a folder of them. A truncated or compressed tar and images without a label stop with an error.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from unite_fast.base import progress
from unite_fast.base.command import run
from unite_fast.base.errors import UserError
from unite_fast.data.listing import files_of
from unite_fast.data.tar import COMMAND, write_index


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Writes the indexes of tars in WebDataset's layout.")
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help=".tar files, or folders of them")
    parser.add_argument("--unlabelled", action="store_true", help="images without .cls, for model.num_classes=0")
    arguments = parser.parse_args(argv)
    found = {path: files_of(path, ".tar") for path in arguments.paths}
    if empty := [path for path, tars in found.items() if not tars]:
        raise UserError(f"{empty[0]}: no .tar files there")
    tars = [tar for tars in found.values() for tar in tars]
    images = sum(len(write_index(tar, not arguments.unlabelled).labels) for tar in progress.bar(tars, unit="tar"))
    print(f"{images:,} images in {len(tars)} tars")
    return 0


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    sys.exit(run(main))
