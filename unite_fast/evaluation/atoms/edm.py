"""Bonds by a table of lengths, as the equivariant diffusion model (EDM, Hoogeboom et al. 2022, MIT licence) has them.

Two atoms are bonded when they are closer than the table's single bond + 10 pm; doubly below double + 5 pm, triply below
triple + 3 pm. The margins were chosen so that QM9's own geometries come out stable. The table has H, C, N, O and F.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from unite_fast.data.atoms.elements import SYMBOLS, BadStructure

SINGLE = {
    "HH": 74, "CH": 109, "HN": 101, "HO": 96, "FH": 92, "CC": 154, "CN": 147, "CO": 143, "CF": 135,
    "NN": 145, "NO": 140, "FN": 136, "OO": 148, "FO": 142, "FF": 142,
}  # pm  # fmt: skip
DOUBLE = {"CC": 134, "CN": 129, "CO": 120, "NN": 125, "NO": 121, "OO": 121}
TRIPLE = {"CC": 120, "CN": 116, "CO": 113, "NN": 110}
MARGINS = (10, 5, 3)
VALENCES = {1: 1, 6: 4, 7: 3, 8: 2, 9: 1}


def _limits() -> np.ndarray:
    """Below which distance in Å a bond has at least order 1, 2, 3: (3, 10, 10) by atomic number; 0 for never."""
    limits = np.zeros((3, 10, 10))
    for order, (table, margin) in enumerate(zip((SINGLE, DOUBLE, TRIPLE), MARGINS, strict=True)):
        for pair, length in table.items():
            a, b = (SYMBOLS.index(symbol) for symbol in pair)
            limits[order, a, b] = limits[order, b, a] = (length + margin) / 100
    return limits


LIMITS = _limits()


def orders(species: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Orders of the bonds between atoms (n,) at (n, 3) in Å: int64 (n, n), 0 for none. Raises BadStructure."""
    if not np.isin(species, list(VALENCES)).all():
        strange = next(int(number) for number in species if number not in VALENCES)
        raise BadStructure(f"unknown element: EDM's table has no {SYMBOLS[strange]}")
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    np.fill_diagonal(distances, np.inf)
    return (distances < LIMITS[:, species[:, None], species[None]]).sum(0)


def stable(species: np.ndarray, positions: np.ndarray) -> int:
    """How many atoms have the bonds that their element must have. A molecule is stable when all do."""
    try:
        bonds = orders(species, positions).sum(1)
    except BadStructure:
        return 0
    return int((bonds == np.array([VALENCES[number] for number in species.tolist()])).sum())


def bonded(species: np.ndarray, positions: np.ndarray) -> Any:
    """EDM's molecule: the largest fragment of what RDKit sanitises. Raises BadStructure.

    Atoms with too few bonds pass, RDKit adds hydrogens to them.
    """
    from rdkit import Chem, rdBase

    kinds = (Chem.BondType.ZERO, Chem.BondType.SINGLE, Chem.BondType.DOUBLE, Chem.BondType.TRIPLE)
    bonds = orders(species, positions)
    molecule = Chem.RWMol()
    for number in species.tolist():
        molecule.AddAtom(Chem.Atom(number))
    for a, b in zip(*np.nonzero(np.tril(bonds)), strict=True):
        molecule.AddBond(int(a), int(b), kinds[bonds[a, b]])
    with rdBase.BlockLogs():
        try:
            Chem.SanitizeMol(molecule)
            largest = max(Chem.GetMolFrags(molecule, asMols=True), key=lambda part: part.GetNumAtoms())
            Chem.SanitizeMol(largest)
        except ValueError as error:
            raise BadStructure(f"no valences: {str(error).splitlines()[0]}") from None
    return largest
