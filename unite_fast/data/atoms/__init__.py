"""Molecules and crystals for training and for scores.

    structures = open_structures("qm9", part="train", largest=29)      # on the host, 36 MB
    batch = structures.to(device).gather(indices, slots=29)            # padded, on the device

| source | what it reads | parts |
|---|---|---|
| qm9 | the package qm9pack; a folder with gdb9.sdf and uncharacterized.txt, or with EDM's .npz | EDM's, ADiT's sizes |
| mp20 | a folder with train.csv, val.csv, test.csv, or all.csv, with a column of CIFs | the files', ADiT's slices |
| crystals | real crystals of pymatgen and, if installed, of Debian's libavogadro-data | a tenth held out |
| files | a user's .xyz, .extxyz, .sdf, .cif | a tenth held out |
| packed | a .safetensors file that ``python -m unite_fast.data.atoms`` wrote of any of these | one file per part |

The arrays are structures.py's: packed on one device, gathered by index. Positions are in Å. What cannot be used is
named and counted (checks.py); writers.py writes structures to files again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from unite_fast.base.errors import UserError
from unite_fast.config import AtomDataConfig, choices
from unite_fast.data.atoms import crystals, files, qm9
from unite_fast.data.atoms.checks import Read, admit, describe
from unite_fast.data.atoms.structures import Padded, Structure, Structures, join, load, pack
from unite_fast.data.source import NoPath

__all__ = [
    "PARTS",
    "SOURCES",
    "SPLITS",
    "Padded",
    "Structure",
    "Structures",
    "describe",
    "join",
    "open_structures",
    "pack",
]

SOURCES = ("qm9", "mp20", "crystals", "files", "packed")
PARTS = choices(AtomDataConfig, "part")
SPLITS = {"edm": qm9.edm_split, "adit_sizes": qm9.adit_sizes_split}


def open_structures(
    source: str,
    path: str | Path = "",
    part: str = "train",
    largest: int = 29,
    on_error: str = "fail",
    split: str = "edm",
    max_heavy_atoms: int = 0,
    workers: int = 0,
) -> Structures:
    """The structures of a source (see the table above) that a network with ``largest`` slots can use, on the host.

    ``part`` is "train", "valid", "test" or "all"; where nothing is published, valid and test are the same tenth. A
    packed file is one part, whichever, so that only "train" and "all" name it.
    ``on_error`` is "fail" or "skip" (checks.admit). ``split`` is QM9's: "edm" or "adit_sizes". ``max_heavy_atoms``
    above 0 keeps the structures with at most so many atoms other than hydrogen; a split comes before it.
    ``workers`` processes read (0: one per core). Raises UserError.
    """
    for name, value, known in (("source", source, SOURCES), ("part", part, PARTS), ("split", split, SPLITS)):
        if value not in known:
            raise UserError(f"{name} {value!r} is not known; one of {', '.join(known)}")
    root, of_run = Path(path), "structures" if source in ("files", "packed") else source
    if not str(path) and source in ("mp20", "files", "packed"):
        raise NoPath(f"data.path is empty; data.source={of_run} needs a {'folder' if source == 'mp20' else 'file'}")
    where = f"data.source {of_run}" + (f", {path}" if str(path) else "")

    def accepted(read: Read, policy: str = on_error) -> Structures:
        found = read.structures
        if max_heavy_atoms:
            found = found.select((found.heavy_atoms() <= max_heavy_atoms).nonzero()[:, 0])
        return admit(Read(found, read.bad), where, largest, policy)

    if source == "packed":
        if part not in ("train", "all"):
            raise UserError(f"{where} is one part; name another file for the held-out structures")
        structures = accepted(Read(load(root)))
    elif source == "qm9":
        structures = _qm9(root if str(path) else None, where, part, accepted, split)
    elif source == "mp20":
        names = ("train", "valid", "test") if part == "all" else (part,)
        parts = [crystals.read_csv(root, name, workers) for name in names]
        bad = [one for read in parts for one in read.bad]
        structures = accepted(Read(join([read.structures for read in parts]).labelled(0), bad))
    elif source == "crystals":
        read = crystals.read_packages(root if str(path) else crystals.AVOGADRO, workers)
        # A few of them have atoms on top of each other: the packages' flaws, not the user's to mend.
        structures = _tenth(accepted(read, "skip"), part)
    else:
        structures = _tenth(accepted(files.read_path(root, largest, workers)), part)
    if not len(structures):
        raise UserError(f"{where}: nothing is left of its part {part}")
    return structures


def _qm9(root: Path | None, where: str, part: str, accepted: Callable[[Read], Structures], split: str) -> Structures:
    if root is not None and (root / "train.npz").is_file():
        names = qm9.NPZ_PARTS if part == "all" else (part,)
        return join([accepted(Read(qm9.read_npz(root, name))) for name in names]).labelled(0)
    read = Read(qm9.read_package()) if root is None else qm9.read_sdf(root)
    if part == "all":
        return accepted(read)
    chosen = SPLITS[split](len(read.structures) + len(read.bad))[part]
    if read.bad:
        raise UserError(f"{where}: {len(read.bad):,} records cannot be read, so the split is not the published one; "
                        f"the first is {read.bad[0][0]}; download it again")  # fmt: skip
    return accepted(Read(read.structures.select(chosen)))


def _tenth(structures: Structures, part: str) -> Structures:
    if part == "all":
        return structures
    kept, apart = crystals.held_out(len(structures))
    chosen: np.ndarray = kept if part == "train" else apart
    return structures.select(chosen)
