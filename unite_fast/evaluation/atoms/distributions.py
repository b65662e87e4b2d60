"""How far generated structures are from real ones, property by property.

    atoms, elements     total variation of the shares of sizes and of elements: 0 equal, 1 nothing in common
    bond lengths, in Å, angles, in degrees, densities, in g/cm^3, numbers of elements, energies, in kcal/mol per atom
                        Wasserstein-1: the mean distance by which one distribution must be moved to become the other

A bond is a pair of atoms nearer than 1.25 times the sum of RDKit's covalent radii, in molecules. ``by pair`` is the
mean over the kinds of bonds of the real molecules, weighted by how frequent they are; a kind that the others lack
counts with its whole mean length. The energy is the strain: RDKit's MMFF94 energy less that after relaxation with the
same force field, so it needs valid molecules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from unite_fast.data.atoms import bonds
from unite_fast.data.atoms.elements import LARGEST, SYMBOLS, BadStructure, covalent_radii, extra
from unite_fast.data.atoms.parallel import mapped
from unite_fast.data.atoms.structures import Structures

BOND = 1.25
RELAXATION = 500  # iterations at most


def total_variation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Half the sum of differences of two histograms' shares; they may differ in length. None when one is empty."""
    size = max(len(a), len(b))
    p, q = (np.pad(np.asarray(h, dtype=np.float64), (0, size - len(h))) for h in (a, b))
    return float(np.abs(p / p.sum() - q / q.sum()).sum() / 2) if p.sum() and q.sum() else None


def wasserstein(a: np.ndarray, b: np.ndarray) -> float | None:
    """Wasserstein-1 of two samples; None when one of them is empty."""
    from scipy.stats import wasserstein_distance

    return float(wasserstein_distance(a, b)) if len(a) and len(b) else None


class Geometry(NamedTuple):
    """Bonds and angles of a set of molecules."""

    lengths: np.ndarray  # (N,) Å
    kinds: np.ndarray  # (N,) 100 * the smaller atomic number + the larger
    angles: np.ndarray  # (P,) degrees


def geometry(molecules: Structures) -> Geometry:
    """All bonds and all angles between two bonds of an atom."""
    radii = torch.from_numpy(covalent_radii()).float()
    lengths, kinds, angles = [], [], []
    for _, part in molecules.parts(3):
        batch = part.gather(torch.arange(len(part)), part.largest)
        species = batch.species.clamp(max=LARGEST)
        away = batch.positions[:, None] - batch.positions[:, :, None]  # (B, M, M, 3), from the first atom to the second
        distance = away.norm(dim=-1)
        reach = BOND * (radii[species][:, :, None] + radii[species][:, None])
        there = batch.mask[:, :, None] & batch.mask[:, None] & (distance > 1e-6) & (distance < reach)
        upper = there.triu(1)
        lengths.append(distance[upper])
        pair = torch.stack(torch.broadcast_tensors(species[:, :, None], species[:, None]))
        code = pair.min(0).values * 100 + pair.max(0).values
        kinds.append(code[upper])
        units = away / distance.clamp_min(1e-6)[..., None]
        cosines = units @ units.transpose(-1, -2)  # (B, M, M, M): at the first atom
        corner = (there[:, :, :, None] & there[:, :, None]).triu(1)
        angles.append(torch.rad2deg(torch.arccos(cosines[corner].clamp(-1, 1))))
    joined = (torch.cat(parts).numpy() if parts else np.zeros(0) for parts in (lengths, kinds, angles))
    return Geometry(*joined)


def by_pair(made: Geometry, real: Geometry) -> float | None:
    """The mean over kinds of bonds of Wasserstein-1 of their lengths, weighted by the real frequencies."""
    total = 0.0
    for kind, count in zip(*np.unique(real.kinds, return_counts=True), strict=True):
        ours, theirs = made.lengths[made.kinds == kind], real.lengths[real.kinds == kind]
        distance = wasserstein(ours, theirs)
        total += count * (float(theirs.mean()) if distance is None else distance)
    return total / len(real.kinds) if len(real.kinds) else None


def kind_name(code: int) -> str:
    """ "C-H" for 106."""
    return f"{SYMBOLS[code // 100]}-{SYMBOLS[code % 100]}"


def elements(structures: Structures) -> np.ndarray:
    """Atoms of each element, (100,) by atomic number."""
    return torch.bincount(structures.species.long(), minlength=LARGEST + 1)[: LARGEST + 1].numpy()


def densities(crystals: Structures) -> np.ndarray:
    """g/cm^3, (S,)."""
    with extra("densities"):
        from rdkit import Chem
    table = Chem.GetPeriodicTable()
    weights = torch.tensor([0.0, *(table.GetAtomicWeight(number) for number in range(1, LARGEST + 1))])
    before = torch.cat([torch.zeros(1), weights[crystals.species.long()].double().cumsum(0)])
    masses = before[crystals.offsets].diff()
    volumes = torch.linalg.det(crystals.lattices.double()).abs()
    good = volumes > 0
    return (masses[good] / volumes[good] * 1.66053907).numpy()


def element_counts(structures: Structures) -> np.ndarray:
    """Different elements in each structure, (S,)."""
    return np.array([len(np.unique(structures[i].species)) for i in range(len(structures))])


def _strain(job: tuple[np.ndarray, np.ndarray]) -> float | None:
    """Runs in the workers."""
    from rdkit.Chem import rdForceFieldHelpers as helpers

    species, positions = job
    try:
        molecule = bonds.bonded(species, positions)
    except BadStructure:
        return None
    properties = helpers.MMFFGetMoleculeProperties(molecule)
    if properties is None:
        return None
    field = helpers.MMFFGetMoleculeForceField(molecule, properties)
    if field is None:
        return None
    field.Initialize()
    before = field.CalcEnergy()
    field.Minimize(maxIts=RELAXATION)
    return (before - field.CalcEnergy()) / len(species)


def strains(molecules: Sequence[tuple[np.ndarray, np.ndarray]], workers: int = 0) -> np.ndarray:
    """kcal/mol per atom of the molecules that are valid by the rule rdkit and that MMFF94 has parameters for."""
    found = mapped(_strain, molecules, workers, chunk=16)
    return np.array([one for one in found if one is not None and np.isfinite(one)])


def of_molecules(made: Structures, real: Structures) -> dict[str, float | None]:
    """Distances of generated molecules to real ones; energies apart, see ``strains``."""
    ours, theirs = geometry(made), geometry(real)
    return {
        "atoms_tv": total_variation(made.histogram().numpy(), real.histogram().numpy()),
        "elements_tv": total_variation(elements(made), elements(real)),
        "bond_lengths_w1": wasserstein(ours.lengths, theirs.lengths),
        "bond_lengths_by_pair_w1": by_pair(ours, theirs),
        "angles_w1": wasserstein(ours.angles, theirs.angles),
    }


def of_crystals(made: Structures, real: Structures) -> dict[str, float | None]:
    """Distances of generated crystals to real ones."""
    return {
        "atoms_tv": total_variation(made.histogram().numpy(), real.histogram().numpy()),
        "elements_tv": total_variation(elements(made), elements(real)),
        "densities_w1": wasserstein(densities(made), densities(real)),
        "element_counts_w1": wasserstein(element_counts(made), element_counts(real)),
    }
