"""A user's own structures: a file, a pattern such as 'FOLDER/train-*.xyz', or a folder of .xyz, .extxyz, .sdf and .cif,
at any depth: sorted, those of a folder before those of each folder in it.

A file may hold many structures, each named ``path:number``, from 1; a .cif its first alone. ase reads the frames of
.xyz and .extxyz, RDKit the records of .sdf, pymatgen .cif. Hydrogens must be explicit and positions in Å; crystals are
made primitive and Niggli-reduced.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from unite_fast.base.errors import UserError, first_line
from unite_fast.data.atoms.checks import Read
from unite_fast.data.atoms.crystals import of_cif, of_pymatgen
from unite_fast.data.atoms.elements import BadStructure, atomic_numbers, preload
from unite_fast.data.atoms.parallel import mapped
from unite_fast.data.atoms.structures import Structure, pack
from unite_fast.data.listing import check_splits, files_below, is_pattern, matching

Found = tuple[str, Structure | str]  # name, and the structure or the reason why there is none


def frames(text: str) -> Iterator[tuple[str, int]]:
    """The frames of an XYZ text, each with its first line's number. Raises BadStructure where there is none."""
    lines = text.splitlines()
    start = 0
    while start < len(lines):
        if not lines[start].strip():
            start += 1
            continue
        word = lines[start].strip()
        stop = start + 2 + int(word) if word.isdecimal() else 0
        if not start + 2 <= stop <= len(lines):
            raise BadStructure(f"broken XYZ: line {start + 1} begins no complete frame; nothing after it is read")
        yield "\n".join(lines[start:stop]) + "\n", start + 1
        start = stop


def of_frame(text: str, name: str, largest: int) -> Structure:
    """A molecule of a frame of plain or extended XYZ, or a crystal when it has a cell. Raises BadStructure."""
    from ase.io import read
    from pymatgen.core import Lattice
    from pymatgen.core import Structure as Crystal

    body = [line.split() for line in text.splitlines()[2:]]
    if "Properties=" not in text.splitlines()[1]:
        atomic_numbers(line[0] if line else "" for line in body)  # ase's message would not name the element
    try:
        atoms = read(io.StringIO(text), format="extxyz")
    except Exception as error:  # of a damaged frame, ase's parser raises anything
        raise BadStructure(f"broken XYZ: {first_line(error)}") from None
    assert not isinstance(atoms, list)
    species = atomic_numbers(atoms.get_chemical_symbols())
    if not atoms.pbc.any():
        return Structure(species, np.asarray(atoms.positions, dtype=np.float64), None, name)
    if not atoms.pbc.all() or atoms.cell.rank < 3:
        raise BadStructure("not periodic in three directions: neither a molecule nor a crystal")
    if not np.isfinite(atoms.positions).all():
        raise BadStructure("not a number: a coordinate or a cell is NaN or infinite")
    crystal = Crystal(Lattice(atoms.cell.array), species.tolist(), atoms.positions, coords_are_cartesian=True)
    return of_pymatgen(crystal, name, primitive=largest)


def _xyz(path: Path, largest: int) -> Iterator[Found]:
    number = 0
    try:
        for number, (text, _) in enumerate(frames(path.read_text(errors="replace")), 1):
            name = f"{path}:{number}"
            try:
                yield name, of_frame(text, name, largest)
            except BadStructure as error:
                yield name, str(error)
    except BadStructure as error:
        yield f"{path}:{number + 1}", str(error)


def _sdf(path: Path, largest: int) -> Iterator[Found]:
    from rdkit import Chem, rdBase

    with rdBase.BlockLogs():
        for number, molecule in enumerate(Chem.SDMolSupplier(str(path), removeHs=False, sanitize=False), 1):
            name = f"{path}:{number}"
            if molecule is None or not molecule.GetNumConformers():
                yield name, "broken SDF: the record cannot be read"
                continue
            header = molecule.GetProp("_MolFileInfo") if molecule.HasProp("_MolFileInfo") else ""
            if header[20:22] == "2D":
                yield name, "no positions: the record is a 2D drawing"
                continue
            try:
                species = atomic_numbers(atom.GetSymbol() for atom in molecule.GetAtoms())
            except BadStructure as error:
                yield name, str(error)
                continue
            yield name, Structure(species, molecule.GetConformer().GetPositions(), None, name)


def _cif(path: Path, largest: int) -> Iterator[Found]:
    try:
        yield str(path), of_cif(path.read_text(errors="replace"), str(path), primitive=largest)
    except BadStructure as error:
        yield str(path), str(error)


READERS: dict[str, Callable[[Path, int], Iterator[Found]]] = {
    ".xyz": _xyz,
    ".extxyz": _xyz,
    ".sdf": _sdf,
    ".cif": _cif,
}


def _read(job: tuple[Path, int]) -> list[Found]:
    """Runs in the workers: everything in one file."""
    path, largest = job
    if path.exists() and not path.is_file():  # of a pipe a read might never end
        return [(str(path), "unreadable: not a regular file")]
    try:
        return list(READERS[path.suffix.lower()](path, largest))
    except OSError as error:
        return [(str(path), f"unreadable: {error.strerror or error}")]


def read_path(root: Path, largest: int, workers: int = 0) -> Read:
    """The structures of a file or of a folder, read by ``workers`` processes (0: one per core).

    ``largest`` is the number of atoms that the network takes; a crystal's cell that could not come down to it is not
    reduced. Raises UserError when there are no such files.
    """
    kinds = ", ".join(READERS)
    if is_pattern(root):
        paths = matching(root)
    elif root.exists():
        paths = [root] if root.is_file() else [Path(path) for path in files_below(root, tuple(READERS))]
        check_splits(root, paths)
    else:
        raise UserError(f"{root}: no such file or folder; give one of {kinds}")
    paths = [path for path in paths if path.suffix.lower() in READERS]
    if not paths:
        raise UserError(f"{root} holds no {kinds} files")
    preload(f"reading {root}", "ase.io.extxyz", "pymatgen.core", "pymatgen.io.cif", "rdkit.Chem")
    good: list[Structure] = []
    bad: list[tuple[str, str]] = []
    for found in mapped(_read, [(path, largest) for path in paths], workers, chunk=8):
        for name, one in found:
            if isinstance(one, str):
                bad.append((name, one))
            else:
                good.append(one)
    return Read(pack(good), bad)
