"""Bonds of a molecule perceived from its geometry by RDKit's DetermineBonds, and the SMILES that follow."""

from __future__ import annotations

from typing import Any

import numpy as np

from unite_fast.base.errors import first_line
from unite_fast.data.atoms.elements import SYMBOLS, BadStructure, extra

MAX_ITERATIONS = 1000  # of the search over bond orders; more atoms at random places could take for ever


def unbonded(species: np.ndarray, positions: np.ndarray) -> Any:
    """An RDKit molecule of atoms (n,) at positions (n, 3) in Å, without bonds."""
    with extra("bond perception"):
        from rdkit import Chem
        from rdkit.Geometry import Point3D
    molecule = Chem.RWMol()
    conformer = Chem.Conformer(len(species))
    conformer.Set3D(True)
    for index, (number, position) in enumerate(zip(species.tolist(), positions.tolist(), strict=True)):
        atom = Chem.Atom(int(number))
        atom.SetNoImplicit(True)
        molecule.AddAtom(atom)
        conformer.SetAtomPosition(index, Point3D(*position))
    molecule.AddConformer(conformer)
    return molecule.GetMol()


def bonded(species: np.ndarray, positions: np.ndarray, reach: float = 0.0) -> Any:
    """The sanitised RDKit molecule: neutral, charges within it allowed, orders from valences.

    Atoms are bonded up to ``reach`` times the sum of their covalent radii; 0 leaves the reach to RDKit, which is 0.45 Å
    more than that sum, and takes the bridgeheads of small cages for bonded.

    Raises BadStructure when the bonds make no closed-shell molecule, or not one alone.
    """
    from rdkit import Chem, rdBase
    from rdkit.Chem import rdDetermineBonds

    if not len(species) or not np.isfinite(positions).all():
        raise BadStructure("not a number: no atoms, or a position that is not finite")
    molecule = unbonded(species, positions)
    options: dict[str, Any] = {"charge": 0, "allowChargedFragments": True, "embedChiral": False}
    options |= {"maxIterations": MAX_ITERATIONS} | ({"useVdw": True, "covFactor": reach} if reach else {})
    with rdBase.BlockLogs():
        try:
            rdDetermineBonds.DetermineBonds(molecule, **options)
            Chem.SanitizeMol(molecule)
        except (ValueError, RuntimeError) as error:  # RDKit's exceptions are these
            raise BadStructure(f"no valences: {first_line(error)}") from None
    if len(Chem.GetMolFrags(molecule)) > 1:
        raise BadStructure("fragments: the atoms make more than one molecule")
    if any(atom.GetNumRadicalElectrons() for atom in molecule.GetAtoms()):
        raise BadStructure("radical: an electron is unpaired")
    return molecule


def connected(species: np.ndarray, positions: np.ndarray) -> frozenset[tuple[int, int]]:
    """Pairs of bonded atoms by distance alone, RDKit's DetermineConnectivity: the graph, without orders."""
    from rdkit import rdBase
    from rdkit.Chem import rdDetermineBonds

    molecule = unbonded(species, positions)
    with rdBase.BlockLogs():
        rdDetermineBonds.DetermineConnectivity(molecule)
    return frozenset(
        (min(ends), max(ends)) for b in molecule.GetBonds() if (ends := (b.GetBeginAtomIdx(), b.GetEndAtomIdx()))
    )


def smiles_of(molecule: Any) -> str:
    """Canonical SMILES of a sanitised molecule: hydrogens implicit, no stereochemistry."""
    from rdkit import Chem

    return Chem.MolToSmiles(Chem.RemoveHs(molecule), isomericSmiles=False)


def canonical(smiles: str) -> str | None:
    """The same form of a stated SMILES; None when RDKit refuses it."""
    with extra("reading SMILES"):
        from rdkit import Chem, rdBase
    with rdBase.BlockLogs():
        molecule = Chem.MolFromSmiles(smiles)
    return None if molecule is None else Chem.MolToSmiles(molecule, isomericSmiles=False)


def formula(species: np.ndarray) -> str:
    """Hill formula: C, H, then the others by symbol."""
    symbols = [SYMBOLS[number] for number in species.tolist()]
    first = ["C", "H"] if "C" in symbols else []
    order = [s for s in first if s in symbols] + sorted(set(symbols) - set(first))
    return "".join(f"{s}{symbols.count(s) if symbols.count(s) > 1 else ''}" for s in order)
