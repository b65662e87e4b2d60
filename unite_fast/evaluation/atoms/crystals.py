"""Crystals: valid structure and composition, unique, novel; reconstructions: match and rms.

The rules are those of CDVAE, DiffCSP and the all-atom diffusion transformer (ADiT):

    struct   the cell has finite lengths above 0, angles in (50, 130) degrees and at least 0.1 Å^3, and no two of its
             atoms are nearer than 0.5 Å. (Of a single atom no distance is checked, its own images do not count.)
    comp     one element, or metals alone, or oxidation states of SMACT's set smact14 that are neutral and pass
             Pauling's test; a formula with more than 10^7 combinations of states fails
    overall  both
    match    pymatgen's StructureMatcher(stol=0.5, angle_tol=10, ltol=0.3) maps the reconstruction on the truth. ADiT
             and DiffCSP count a pair only when both are overall valid; without that requirement it is match_any
    rms      of the matcher, divided by (volume per atom)^(1/3): no unit; the mean over the matches. It scales volumes
    unique   groups that the same matcher makes of the valid crystals, over their number

The matcher needs no fingerprint; ADiT also asks for one (matminer's CrystalNN), which is left out here.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from unite_fast.base.errors import UserError
from unite_fast.data.atoms.crystals import to_pymatgen
from unite_fast.data.atoms.elements import SYMBOLS, preload
from unite_fast.data.atoms.parallel import mapped
from unite_fast.data.atoms.structures import Structure, Structures

MIN_DISTANCE, MIN_VOLUME = 0.5, 0.1  # Å, Å^3
ANGLES = (50.0, 130.0)
COMBINATIONS = 10_000_000
OXIDATION_STATES = "smact14"
TOLERANCES = {"stol": 0.5, "angle_tol": 10, "ltol": 0.3}
PACKAGES = ("pymatgen.core", "pymatgen.analysis.structure_matcher", "smact.screening")


def ready() -> None:
    """Raises UserError when pymatgen or SMACT is not installed."""
    preload("the scores of crystals", *PACKAGES)


def constructed(crystal: Structure) -> bool:
    """Whether its numbers make a cell with atoms in it."""
    if crystal.lattice is None or not len(crystal.species):
        return False
    if not (np.isfinite(crystal.lattice).all() and np.isfinite(crystal.coordinates).all()):
        return False
    if crystal.species.min() < 1 or crystal.species.max() >= len(SYMBOLS):
        return False
    lengths = np.linalg.norm(crystal.lattice, axis=1)
    if not (lengths > 0).all() or abs(np.linalg.det(crystal.lattice)) < MIN_VOLUME:
        return False
    units = crystal.lattice / lengths[:, None]
    cosines = [units[1] @ units[2], units[0] @ units[2], units[0] @ units[1]]
    return all(ANGLES[0] < math.degrees(math.acos(max(-1.0, min(1.0, cosine)))) < ANGLES[1] for cosine in cosines)


def struct_valid(crystal: Structure) -> bool:
    if not constructed(crystal):
        return False
    distances = np.array(to_pymatgen(crystal).distance_matrix)
    np.fill_diagonal(distances, np.inf)
    return bool(distances.min() >= MIN_DISTANCE)


@functools.lru_cache(maxsize=65536)
def _neutral(formula: tuple[tuple[str, int], ...]) -> bool:
    import smact
    from pymatgen.core import Composition
    from smact.screening import smact_validity

    symbols = [symbol for symbol, _ in formula]
    metals = set(smact.metals)
    if len(symbols) > 1 and not all(symbol in metals for symbol in symbols):
        states = [smact.Element(symbol).oxidation_states_smact14 or [] for symbol in symbols]
        if math.prod(map(len, states)) > COMBINATIONS:
            return False
    return bool(smact_validity(Composition(dict(formula)), oxidation_states_set=OXIDATION_STATES))


def comp_valid(species: np.ndarray) -> bool:
    """Whether a composition, given as atomic numbers (n,), passes SMACT's rules."""
    if not len(species) or species.min() < 1 or species.max() >= len(SYMBOLS):
        return False
    numbers, counts = np.unique(species, return_counts=True)
    divisor = math.gcd(*counts.tolist())
    pairs = zip(numbers.tolist(), counts.tolist(), strict=True)
    return _neutral(tuple((SYMBOLS[number], count // divisor) for number, count in pairs))


class Verdict(NamedTuple):
    struct: bool
    comp: bool

    @property
    def overall(self) -> bool:
        return self.struct and self.comp


def _judge(crystal: Structure) -> Verdict:
    """Runs in the workers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SMACT warns of elements without oxidation states
        return Verdict(struct_valid(crystal), comp_valid(crystal.species))


def listed(structures: Structures) -> list[Structure]:
    return [structures[i] for i in range(len(structures))]


def judge(crystals: Sequence[Structure], workers: int = 0) -> list[Verdict]:
    """Validity of each, in ``workers`` processes (0: one per core). Raises UserError."""
    ready()
    return list(mapped(_judge, crystals, workers))


def validity(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Shares in [0, 1] of all."""
    total = max(1, len(verdicts))
    return {
        "struct_valid": sum(one.struct for one in verdicts) / total,
        "comp_valid": sum(one.comp for one in verdicts) / total,
        "overall_valid": sum(one.overall for one in verdicts) / total,
    }


def _matcher():
    from pymatgen.analysis.structure_matcher import StructureMatcher

    return StructureMatcher(**TOLERANCES)


def _distance(job: tuple[Structure, Structure]) -> float | None:
    """Runs in the workers: the matcher's rms, or None when it does not match."""
    made, true = job
    if not (constructed(made) and constructed(true)):
        return None
    found = _matcher().get_rms_dist(to_pymatgen(made), to_pymatgen(true))
    return None if found is None else float(found[0])


def reconstruction(made: Sequence[Structure], true: Sequence[Structure], workers: int = 0) -> dict[str, Any]:
    """Shares of all in [0, 1], and rms without unit (None without a match), of crystals beside their truths."""
    if len(made) != len(true):
        raise UserError(f"{len(made):,} reconstructions of {len(true):,} crystals; there must be one for each")
    ready()
    distances = list(mapped(_distance, list(zip(made, true, strict=True)), workers, chunk=8))
    ours, theirs = judge(made, workers), judge(true, workers)
    both = [d for d, a, b in zip(distances, ours, theirs, strict=True) if d is not None and a.overall and b.overall]
    some = [d for d in distances if d is not None]
    total = max(1, len(made))
    same = sum(np.array_equal(np.sort(a.species), np.sort(b.species)) for a, b in zip(made, true, strict=True))
    return {
        "match": len(both) / total,
        "match_ceiling": sum(one.overall for one in theirs) / total,
        "rms": float(np.mean(both)) if both else None,
        "match_any": len(some) / total,
        "rms_any": float(np.mean(some)) if some else None,
        "composition_match": same / total,
    }


def _groups(job: tuple[list[Structure], list[Structure]]) -> tuple[int, int]:
    """Runs in the workers: (distinct crystals of one formula, how many of these are none of the known ones)."""
    made, seen = job
    matcher = _matcher()
    groups = matcher.group_structures([to_pymatgen(one) for one in made])
    known = [to_pymatgen(one) for one in seen]
    novel = sum(not any(matcher.fit(group[0], one) for one in known) for group in groups)
    return len(groups), novel


def _formula(crystal: Structure) -> tuple[tuple[int, int], ...]:
    numbers, counts = np.unique(crystal.species, return_counts=True)
    divisor = math.gcd(*counts.tolist())
    return tuple((number, count // divisor) for number, count in zip(numbers.tolist(), counts.tolist(), strict=True))


def distinct(
    crystals: Sequence[Structure],
    verdicts: Sequence[Verdict],
    training: Sequence[Structure] | None,
    workers: int = 0,
) -> dict[str, float]:
    """unique_of_valid, and with training crystals novel_of_unique, in [0, 1].

    Different reduced formulas never match, so each formula is grouped by itself.
    """
    ready()
    made: dict[Any, list[Structure]] = defaultdict(list)
    for crystal in itertools.compress(crystals, (one.overall for one in verdicts)):
        made[_formula(crystal)].append(crystal)
    seen: dict[Any, list[Structure]] = defaultdict(list)
    for crystal in training or ():
        if (formula := _formula(crystal)) in made:
            seen[formula].append(crystal)
    jobs = [(group, seen[formula]) for formula, group in made.items()]
    counts = list(mapped(_groups, jobs, workers, chunk=1))
    unique, novel = (sum(one[k] for one in counts) for k in (0, 1))
    scores = {"unique_of_valid": unique / max(1, sum(map(len, made.values())))}
    if training is not None:
        scores["novel_of_unique"] = novel / max(1, unique)
    return scores
