"""Molecules: valid, unique, novel; reconstructions: match and RMSD.

Four rules of validity, by name:

    rdkit        RDKit's DetermineBonds finds bonds for a neutral molecule (charges within it allowed), it sanitises, is
                 one fragment and no radical; SMILES with implicit hydrogens, without stereochemistry
    rdkit_tight  the same with bonds up to 1.15 times the sum of covalent radii. All of 1,000 molecules of QM9 pass,
                 where rdkit refuses the 5 to 6 % with small cages, whose bridgeheads it takes for bonded; noise passes
                 more rarely
    edm          bonds by EDM's table of lengths (edm.py) sanitise; SMILES of the largest fragment, hydrogens explicit
    adit         OpenBabel's bonds, through a PDB file, sanitise in RDKit; SMILES of the largest fragment, hydrogens
                 explicit. Needs openbabel, which is under the GPL and not installed with this project

A reconstruction matches when its elements are those of the truth, atom by atom, and both have the same SMILES by the
rule, rdkit or rdkit_tight. RMSD is taken over all atoms after the best proper rotation, in Å, and averaged over the
matches. The share of true molecules that have a SMILES is the ceiling of the match. ``graph`` replaces the SMILES by
the graph of bonds that distances alone give, which every molecule has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from unite_fast.base.errors import UserError, first_line
from unite_fast.config import EvaluationConfig, choices
from unite_fast.data.atoms import bonds
from unite_fast.data.atoms.elements import SYMBOLS, BadStructure, preload
from unite_fast.data.atoms.parallel import mapped
from unite_fast.data.atoms.structures import Structures
from unite_fast.evaluation.atoms import edm

SCORERS = ("rdkit", "rdkit_tight", "edm", "adit")
WHOLE = choices(EvaluationConfig, "scorer")  # whose SMILES are of the whole molecule
TIGHT = 1.15
Atoms = tuple[np.ndarray, np.ndarray]  # species (n,), positions (n, 3) in Å


def _edm_smiles(species: np.ndarray, positions: np.ndarray) -> str:
    from rdkit import Chem

    return Chem.MolToSmiles(edm.bonded(species, positions))


def _rdkit_smiles(species: np.ndarray, positions: np.ndarray) -> str:
    return bonds.smiles_of(bonds.bonded(species, positions))


def _tight_smiles(species: np.ndarray, positions: np.ndarray) -> str:
    return bonds.smiles_of(bonds.bonded(species, positions, TIGHT))


def _adit_smiles(species: np.ndarray, positions: np.ndarray) -> str:
    from openbabel import openbabel, pybel
    from pymatgen.core import Molecule
    from pymatgen.io.babel import BabelMolAdaptor
    from rdkit import Chem, rdBase

    openbabel.obErrorLog.SetOutputLevel(0)
    with rdBase.BlockLogs():
        try:
            adaptor = BabelMolAdaptor(Molecule([SYMBOLS[number] for number in species], positions))
            molecule = Chem.MolFromPDBBlock(pybel.Molecule(adaptor.openbabel_mol).write("pdb"), removeHs=False)
        except Exception as error:  # OpenBabel's bindings raise anything
            raise BadStructure(f"no valences: {first_line(error)}") from None
        if molecule is None:
            raise BadStructure("no valences: RDKit refuses OpenBabel's bonds")
        parts = Chem.GetMolFrags(molecule, asMols=True)
    return Chem.MolToSmiles(max(parts, key=lambda part: part.GetNumAtoms()))


RULES: dict[str, tuple[Callable[[np.ndarray, np.ndarray], str], tuple[str, ...]]] = {
    "rdkit": (_rdkit_smiles, ("rdkit.Chem", "rdkit.Chem.rdDetermineBonds")),
    "rdkit_tight": (_tight_smiles, ("rdkit.Chem", "rdkit.Chem.rdDetermineBonds")),
    "edm": (_edm_smiles, ("rdkit.Chem",)),
    "adit": (_adit_smiles, ("openbabel.pybel", "pymatgen.io.babel", "rdkit.Chem")),
}


class Perceived(NamedTuple):
    """What one molecule is."""

    smiles: str | None  # None: not valid
    reason: str  # why not, ``kind: details``
    stable: int  # atoms with the bonds that EDM's table wants
    atoms: int


def _perceive(job: tuple[str, np.ndarray, np.ndarray]) -> Perceived:
    """Runs in the workers."""
    rule, species, positions = job
    finite = bool(len(species)) and bool(np.isfinite(positions).all())
    stable = edm.stable(species, positions) if finite else 0
    try:
        if not finite:
            raise BadStructure("not a number: no atoms, or a position that is not finite")
        return Perceived(RULES[rule][0](species, positions), "", stable, len(species))
    except BadStructure as error:
        return Perceived(None, str(error), stable, len(species))


def ready(scorer: str) -> None:
    """Raises UserError for an unknown rule, or one whose packages are not installed."""
    if scorer not in SCORERS:
        raise UserError(f"scorer {scorer!r} is not known; one of {', '.join(SCORERS)}")
    preload(f"the scorer {scorer}", *RULES[scorer][1])


def atoms_of(structures: Structures) -> list[Atoms]:
    """Species and positions of every structure. Raises UserError for a crystal."""
    if structures.periodic.any():
        raise UserError("these scores are of molecules, and there are crystals among the structures")
    return [(one.species, one.positions) for one in (structures[i] for i in range(len(structures)))]


def perceive(molecules: Sequence[Atoms], scorer: str = "rdkit", workers: int = 0) -> list[Perceived]:
    """Each molecule by the rule ``scorer``, in ``workers`` processes (0: one per core). Raises UserError."""
    ready(scorer)
    return list(mapped(_perceive, [(scorer, *one) for one in molecules], workers))


def _canonical(smiles: str) -> str | None:
    return bonds.canonical(smiles)


def known(training: Structures, workers: int = 0) -> set[str]:
    """SMILES of the training molecules in the form of the rules rdkit and rdkit_tight.

    The stated ones where the source has them; else those that rdkit_tight perceives.
    """
    ready("rdkit")
    if training.smiles is None:
        return {one.smiles for one in perceive(atoms_of(training), "rdkit_tight", workers) if one.smiles is not None}
    stated = [training.smiles[i] for i in range(len(training))]
    return {smiles for smiles in mapped(_canonical, stated, workers, chunk=512) if smiles is not None}


def generation(perceived: Sequence[Perceived], training: Iterable[str] | None) -> dict[str, float]:
    """Shares in [0, 1]: valid of all, unique of the valid, novel of the unique, valid and unique of all; stability.

    ``training`` holds SMILES in the form of the same rule; without it there is no "novel".
    """
    valid = [one.smiles for one in perceived if one.smiles is not None]
    distinct = set(valid)
    total, atoms = max(1, len(perceived)), max(1, sum(one.atoms for one in perceived))
    scores = {
        "valid": len(valid) / total,
        "unique_of_valid": len(distinct) / max(1, len(valid)),
        "valid_and_unique": len(distinct) / total,
        "atoms_stable": sum(one.stable for one in perceived) / atoms,
        "molecules_stable": sum(one.stable == one.atoms > 0 for one in perceived) / total,
    }
    if training is not None:
        seen = training if isinstance(training, (set, frozenset)) else set(training)
        novel = distinct - seen
        scores["novel_of_unique"] = len(novel) / max(1, len(distinct))
        scores["valid_unique_novel"] = len(novel) / total
    return scores


def reasons(perceived: Sequence[Perceived]) -> dict[str, int]:
    """How many molecules are not valid, by kind of reason, most frequent first."""
    return dict(Counter(one.reason.split(":")[0] for one in perceived if one.smiles is None).most_common())


def aligned(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Points a (n, 3) moved onto points b by the best translation and proper rotation (Kabsch)."""
    centre = b.mean(0)
    left, _, right = np.linalg.svd((a - a.mean(0)).T @ (b - centre))
    turn = np.diag([1.0, 1.0, np.sign(np.linalg.det(left @ right))])
    return (a - a.mean(0)) @ left @ turn @ right + centre


def rmsd(a: np.ndarray, b: np.ndarray) -> float:
    """Root mean square distance of points (n, 3) after the best translation and proper rotation (Kabsch)."""
    a, b = a - a.mean(0), b - b.mean(0)
    left, values, right = np.linalg.svd(a.T @ b)
    sign = np.sign(np.linalg.det(left @ right))
    cross = values[0] + values[1] + sign * values[2]
    return float(np.sqrt(max(0.0, ((a**2).sum() + (b**2).sum() - 2 * cross) / len(a))))


class Pair(NamedTuple):
    """A reconstruction beside the truth."""

    types: bool  # the elements agree, atom by atom
    truth: bool  # the truth has a SMILES
    match: bool
    graph: bool
    rmsd: float  # Å; infinite unless the elements agree


def _compare(job: tuple[str, Atoms, Atoms]) -> Pair:
    """Runs in the workers."""
    rule, made, true = job
    types = bool(np.array_equal(made[0], true[0])) and bool(np.isfinite(made[1]).all())
    expected = _perceive((rule, *true)).smiles
    if not types:
        return Pair(False, expected is not None, False, False, float("inf"))
    match = expected is not None and _perceive((rule, *made)).smiles == expected
    graph = bonds.connected(*made) == bonds.connected(*true)
    return Pair(True, expected is not None, match, graph, rmsd(made[1], true[1]))


def pairs(made: Sequence[Atoms], true: Sequence[Atoms], scorer: str = "rdkit", workers: int = 0) -> list[Pair]:
    """Reconstructions beside their truths, index by index. Raises UserError when their numbers differ."""
    if scorer not in WHOLE:
        raise UserError(f"scorer {scorer!r}: reconstructions are compared by {' or '.join(WHOLE)}")
    if len(made) != len(true):
        raise UserError(f"{len(made):,} reconstructions of {len(true):,} molecules; there must be one for each")
    ready(scorer)
    return list(mapped(_compare, [(scorer, *pair) for pair in zip(made, true, strict=True)], workers))


def reconstruction(compared: Sequence[Pair]) -> dict[str, Any]:
    """Shares of all in [0, 1], and RMSD in Å: means over the matches, by SMILES and by graph; None without a match."""
    total = max(1, len(compared))

    def mean(which: list[Pair]) -> float | None:
        return float(np.mean([one.rmsd for one in which])) if which else None

    return {
        "match": sum(one.match for one in compared) / total,
        "match_ceiling": sum(one.truth for one in compared) / total,
        "rmsd": mean([one for one in compared if one.match]),
        "graph_match": sum(one.graph for one in compared) / total,
        "graph_rmsd": mean([one for one in compared if one.graph]),
        "types_match": sum(one.types for one in compared) / total,
        "types_rmsd": mean([one for one in compared if one.types]),
    }
