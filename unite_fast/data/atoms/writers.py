"""Structures to files: .sdf, .xyz, .extxyz, or a folder of .cif. A file is written whole or not at all.

.sdf has the bonds that RDKit perceives, and none where it perceives none; .sdf and .xyz have no cell, so they take
molecules alone, and .cif takes crystals alone. .extxyz takes both.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from unite_fast.base import files
from unite_fast.base.errors import UserError
from unite_fast.data.atoms.bonds import bonded, unbonded
from unite_fast.data.atoms.crystals import to_pymatgen
from unite_fast.data.atoms.elements import SYMBOLS, BadStructure, extra, preload
from unite_fast.data.atoms.structures import Structure

SUFFIXES = (".sdf", ".xyz", ".extxyz")


def sdf(structure: Structure) -> str:
    """A record of an SD file, ``$$$$`` included."""
    with extra("writing .sdf"):
        from rdkit import Chem
    try:
        molecule = bonded(structure.species, structure.coordinates)
        Chem.Kekulize(molecule, clearAromaticFlags=True)
    except BadStructure:
        molecule = unbonded(structure.species, structure.coordinates)
    molecule.SetProp("_Name", structure.name.replace("\n", " "))
    return Chem.MolToMolBlock(molecule, kekulize=False) + "$$$$\n"


def xyz(structure: Structure, extended: bool = False) -> str:
    """A frame of an XYZ file, positions in Å with eight decimals; ``extended`` names the columns and the cell."""
    comment = structure.name.replace("\n", " ")
    if extended:
        numbers = [] if structure.lattice is None else [f"{value:.8f}" for value in structure.lattice.flatten()]
        cell = f'Lattice="{" ".join(numbers)}" pbc="T T T"' if numbers else 'pbc="F F F"'
        quoted = comment.replace('"', "'")
        comment = f'{cell} Properties=species:S:1:pos:R:3 name="{quoted}"'
    atoms = zip(structure.species.tolist(), structure.positions.tolist(), strict=True)
    lines = [f"{SYMBOLS[number]:2} {x:15.8f} {y:15.8f} {z:15.8f}" for number, (x, y, z) in atoms]
    return "\n".join([str(len(lines)), comment, *lines]) + "\n"


def cif(structure: Structure) -> str:
    """A CIF in P1."""
    preload("writing .cif", "pymatgen.core")
    return to_pymatgen(structure).to(fmt="cif")


def check(path: Path, periodic: bool) -> None:
    """Raises UserError when structures of this kind cannot be written to ``path``; asked before they are made."""
    suffix = path.suffix.lower()
    if suffix in (".sdf", ".xyz") and periodic:
        raise UserError(f"--out {path}: {suffix} has no cell; write crystals to .extxyz or to a folder of .cif")
    if suffix not in SUFFIXES and suffix not in ("", ".cif"):
        raise UserError(f"--out {path}: one of {', '.join(SUFFIXES)}, or a folder, which gets .cif files")
    if suffix in ("", ".cif") and not periodic:
        raise UserError(f"--out {path}: a folder of .cif is for crystals; write molecules to .sdf, .xyz or .extxyz")


def write(path: Path, structures: Iterable[Structure]) -> int:
    """Writes structures in order and returns their number. A path without a suffix or with .cif is a folder.

    Replaces what is there. Raises UserError for a kind that the format cannot hold, and when it cannot be written.
    """
    suffix = path.suffix.lower()
    count = 0
    with files.refusals(str(path)):
        if suffix in SUFFIXES:
            with files.replacing(path) as file:
                for structure in structures:
                    check(path, structure.lattice is not None)
                    count += 1
                    text = sdf(structure) if suffix == ".sdf" else xyz(structure, suffix == ".extxyz")
                    file.write(text.encode(errors="surrogateescape"))
        else:
            with files.replacing_folder(path) as folder:
                for structure in structures:
                    check(path, structure.lattice is not None)
                    files.write(folder / f"{count:06d}.cif", cif(structure))
                    count += 1
    return count
