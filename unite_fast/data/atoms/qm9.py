"""QM9: 130,831 molecules of up to nine C, N, O, F atoms and their hydrogens, geometries of DFT (B3LYP/6-31G(2df,p)).

Three forms are read, positions as they stand, in Å, heavy atoms before hydrogens:

    read_package   the Python package qm9pack, which holds all of it: nothing to download
    read_sdf       gdb9.sdf and uncharacterized.txt, as distributed with the data set's publication
    read_npz       train.npz, valid.npz and test.npz, as E(3) diffusion models (EDM) write them

All leave out the 3,054 of 133,885 molecules whose geometries failed the authors' consistency check. A name is
``gdb_17``: the number in the data set, from 1.
"""

from __future__ import annotations

import csv
import functools
import importlib.metadata
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from unite_fast.base import files
from unite_fast.base.errors import UserError, first_line
from unite_fast.data.atoms.checks import Read
from unite_fast.data.atoms.elements import atomic_numbers, extra
from unite_fast.data.atoms.structures import Structure, Structures, of_arrays, pack
from unite_fast.data.order import permutation

RECORDS, UNCHARACTERIZED = 133_885, 3_054
PARTS = ("qm9_part1.csv", "qm9_part2.csv", "qm9_part3.csv")
NPZ_PARTS = ("train", "valid", "test")
_BRACKETS = str.maketrans("", "", "[]' ")


@functools.cache  # a run asks for its training and its held-out molecules, and reading takes seconds
def read_package() -> Structures:
    """All of qm9pack, in the data set's order, with its SMILES. Raises UserError when it is missing or damaged."""
    try:
        root = Path(str(importlib.metadata.distribution("qm9pack").locate_file("qm9pack/data")))
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            "data.source qm9 needs the package qm9pack, which holds the data set (104 MB); pip install qm9pack, "
            "or set data.path to a folder with gdb9.sdf and uncharacterized.txt"
        ) from None
    # The package's own reader needs setuptools' pkg_resources, and pandas.
    numbers: list[int] = []
    sizes: list[int] = []
    columns: dict[str, list[str]] = {"SMILES": [], "Elements": [], "XYZ_Ang": []}
    for part in PARTS:
        try:
            with open(root / part, newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    numbers.append(int(row["Index"]))
                    sizes.append(int(row["N_atoms"]))
                    for name, values in columns.items():
                        values.append(row[name])
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise UserError(f"{root / part}: {first_line(error)}; install qm9pack again") from None
    symbols = ",".join(columns["Elements"]).translate(_BRACKETS).split(",")
    # Some numbers are written "0.", which JSON does not allow.
    positions = np.fromstring(",".join(columns["XYZ_Ang"]).translate(_BRACKETS), dtype=np.float64, sep=",")
    if not len(symbols) * 3 == len(positions) == sum(sizes) * 3 or np.any(np.diff(numbers) <= 0):
        raise UserError(f"{root}: atoms and positions do not match; install qm9pack again")
    names = [f"gdb_{number}" for number in numbers]
    return of_arrays(atomic_numbers(symbols), positions, np.array(sizes), names, smiles=columns["SMILES"])


def uncharacterized(path: Path) -> set[int]:
    """The numbers, from 1, of the molecules to leave out: first words of lines that are integers. Raises UserError."""
    try:
        lines = files.read_text(path, "replace").splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; it lists the molecules of gdb9.sdf to leave out") from None
    words = [line.split()[0] for line in lines if line.strip()]
    return {int(word) for word in words if word.isdecimal()}


def read_sdf(root: Path) -> Read:
    """gdb9.sdf less what uncharacterized.txt lists, in the file's order. Raises UserError."""
    with extra("reading gdb9.sdf"):
        from rdkit import Chem, rdBase
    path = root / "gdb9.sdf"
    left_out = uncharacterized(root / "uncharacterized.txt")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    good: list[Structure] = []
    bad: list[tuple[str, str]] = []
    count = 0
    with rdBase.BlockLogs():
        for count, molecule in enumerate(Chem.SDMolSupplier(str(path), removeHs=False, sanitize=False), 1):
            if count in left_out:
                continue
            if molecule is None or not molecule.GetNumConformers():
                bad.append((f"gdb_{count}", "broken SDF: the record cannot be read"))
                continue
            species = np.array([atom.GetAtomicNum() for atom in molecule.GetAtoms()], dtype=np.int64)
            positions = molecule.GetConformer().GetPositions()
            name = molecule.GetProp("_Name") if molecule.HasProp("_Name") else ""
            good.append(Structure(species, positions, None, name or f"gdb_{count}"))
    if left_out and max(left_out) > count:
        raise UserError(f"{path} has {count:,} records, but uncharacterized.txt names number {max(left_out):,}")
    if count == RECORDS and len(left_out) != UNCHARACTERIZED:
        raise UserError(
            f"{root / 'uncharacterized.txt'} lists {len(left_out):,} molecules, QM9's lists {UNCHARACTERIZED:,}; "
            "download it again"
        )
    return Read(pack(good), bad)


def read_npz(root: Path, part: str) -> Structures:
    """``part`` of "train", "valid", "test" as EDM's preparation writes it. Raises UserError."""
    path = root / f"{part}.npz"
    try:
        files.check_zip(path)
        with np.load(path, allow_pickle=False) as file:
            sizes, charges, positions = (file[name] for name in ("num_atoms", "charges", "positions"))
            numbers = file["index"] if "index" in file else np.arange(1, len(sizes) + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {', '.join(f'{name}.npz' for name in NPZ_PARTS)} are needed") from None
    except KeyError as error:
        raise UserError(f"{path}: {first_line(error)}; EDM's files have num_atoms, charges and positions") from None
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise UserError(f"{path}: {first_line(error)}; write it again") from None
    slots = charges.shape[-1] if charges.ndim == 2 else 0
    if positions.shape != (len(sizes), slots, 3) or len(charges) != len(sizes) or sizes.max(initial=0) > slots:
        raise UserError(f"{path}: charges {charges.shape} and positions {positions.shape} of {len(sizes)} do not match")
    there = np.arange(slots) < sizes[:, None]
    names = [f"gdb_{number}" for number in numbers.tolist()]
    return of_arrays(charges[there], positions[there], sizes, names)


def edm_split(count: int = RECORDS - UNCHARACTERIZED) -> dict[str, np.ndarray]:
    """EDM's published split: indices, ascending, into the molecules that are kept. int64.

    100,000 for training, a tenth for the test, the rest for validation, of NumPy's legacy permutation with seed 0.
    """
    if count <= 100_000:
        raise UserError(f"split edm needs all {RECORDS - UNCHARACTERIZED:,} molecules, there are {count:,}")
    order = np.random.RandomState(0).permutation(count)
    test = int(0.1 * count)
    parts = np.split(order, [100_000, count - test])
    return {name: np.sort(part) for name, part in zip(("train", "valid", "test"), parts, strict=True)}


def adit_sizes_split(count: int = RECORDS - UNCHARACTERIZED, seed: int = 9) -> dict[str, np.ndarray]:
    """The sizes of the all-atom diffusion transformer (ADiT), 100,000 / 18,000 / rest, of a permutation of ours.

    Its own molecules depend on the state of torch's generator in its program, and cannot be had elsewhere.
    """
    if count <= 118_000:
        raise UserError(f"split adit_sizes needs all {RECORDS - UNCHARACTERIZED:,} molecules, there are {count:,}")
    parts = np.split(permutation(count, seed, 0).numpy(), [100_000, 118_000])
    return {name: np.sort(part) for name, part in zip(("train", "valid", "test"), parts, strict=True)}
