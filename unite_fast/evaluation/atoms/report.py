"""All scores of a set of molecules or crystals as one result, real structures beside them, and the result as a table.

A result says what was scored (number and hash), by which rules and versions, and the same scores of real structures:
what a perfect generator would reach. For distances that is the distance between two random halves of the real
structures, as many in each as were scored, or half of them.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

import numpy as np

from unite_fast.base.errors import UserError
from unite_fast.data.atoms.structures import Structures
from unite_fast.evaluation.atoms import crystals, distributions, molecules

STRAINED = 1000  # molecules whose energy is computed: relaxation takes some 10 ms each
DISTANCES = ("_tv", "_w1")


def versions(*packages: str) -> dict[str, str]:
    """Of installed packages, by name; those that are not installed are left out."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def what(structures: Structures) -> dict[str, Any]:
    return {"count": len(structures), "sha256": structures.digest()}


def drawn(structures: Structures, count: int, seed: int = 0) -> Structures:
    """``count`` of them at random, or all."""
    order = np.random.default_rng(seed).permutation(len(structures))
    return structures.select(order[:count])


def halves(real: Structures, count: int, seed: int = 0) -> tuple[Structures, Structures]:
    """Two random disjoint parts of ``real`` with ``count`` structures each, or half when there are not so many."""
    order = np.random.default_rng(seed).permutation(len(real))
    size = max(1, min(count, len(real) // 2))
    return real.select(order[:size]), real.select(order[-size:])


def median(values: np.ndarray) -> float | None:
    """None of nothing."""
    return float(np.median(values)) if len(values) else None


def _floor(distance: Callable[[Structures, Structures], dict[str, Any]], real: Structures, count: int):
    return distance(*halves(real, count))


def molecules_generated(
    made: Structures,
    real: Structures | None = None,
    training: Structures | None = None,
    scorer: str = "rdkit",
    unreadable: int = 0,
    workers: int = 0,
) -> dict[str, Any]:
    """Scores of generated molecules, and of ``real`` held-out ones. Raises UserError.

    ``unreadable`` more samples count as not valid. Novelty needs ``training`` molecules and a rule
    whose SMILES are of the whole molecule.
    """
    lost = [molecules.Perceived(None, "unreadable: no structure", 0, 0)] * unreadable
    known = molecules.known(training, workers) if training is not None and scorer in molecules.WHOLE else None

    def scored(structures: Structures, more: list[molecules.Perceived]) -> tuple[dict[str, Any], dict[str, int]]:
        listed = molecules.atoms_of(structures)
        perceived = [*molecules.perceive(listed, scorer, workers), *more]
        return molecules.generation(perceived, known), molecules.reasons(perceived)

    scores, reasons = scored(made, lost)
    result: dict[str, Any] = {
        "kind": "generated molecules",
        "protocol": {"scorer": scorer, "stability": "EDM's table of bond lengths", "strained": STRAINED}
        | versions("rdkit", *(("openbabel-wheel", "openbabel", "pymatgen") if scorer == "adit" else ())),
        "samples": what(made) | {"unreadable": unreadable},
        "training": None if training is None else what(training),
        "scores": scores,
        "reasons": reasons,
    }
    if real is not None:
        result["real"] = what(real)
        floor = _floor(distributions.of_molecules, real, len(made))
        result["scores"] |= distributions.of_molecules(made, real)
        some = [
            distributions.strains(molecules.atoms_of(part), workers)
            for part in (drawn(made, STRAINED), *halves(real, STRAINED))
        ]
        result["scores"] |= {
            "strain_median": median(some[0]),
            "strain_w1": distributions.wasserstein(some[0], some[1]),
        }
        floor |= {"strain_median": median(some[1]), "strain_w1": distributions.wasserstein(some[1], some[2])}
        result["real_scores"], result["real_reasons"] = scored(real, [])
        result["real_scores"] |= floor
    return result


def molecules_reconstructed(
    made: Structures, true: Structures, scorer: str = "rdkit", workers: int = 0
) -> dict[str, Any]:
    """Match and RMSD of reconstructions beside their truths, index by index. Raises UserError."""
    compared = molecules.pairs(molecules.atoms_of(made), molecules.atoms_of(true), scorer, workers)
    scores = molecules.reconstruction(compared)
    return {
        "kind": "reconstructed molecules",
        "protocol": {"scorer": scorer, "rmsd": "all atoms, index by index, proper rotation"} | versions("rdkit"),
        "samples": what(made),
        "truth": what(true),
        "scores": scores,
        "real_scores": {"match": scores["match_ceiling"], "rmsd": 0.0, "graph_match": 1.0, "types_match": 1.0},
    }


def crystals_generated(
    made: Structures,
    real: Structures | None = None,
    training: Structures | None = None,
    unreadable: int = 0,
    workers: int = 0,
) -> dict[str, Any]:
    """Scores of generated crystals, and of ``real`` held-out ones; parameters as in ``molecules_generated``."""
    known = None if training is None else crystals.listed(training)

    def scored(structures: Structures, more: int) -> dict[str, Any]:
        listed = crystals.listed(structures)
        verdicts = crystals.judge(listed, workers)
        valid = crystals.validity([*verdicts, *[crystals.Verdict(False, False)] * more])
        return valid | crystals.distinct(listed, verdicts, known, workers)

    result: dict[str, Any] = {
        "kind": "generated crystals",
        "protocol": {"oxidation_states": crystals.OXIDATION_STATES, "matcher": crystals.TOLERANCES}
        | versions("pymatgen", "pymatgen-core", "SMACT"),
        "samples": what(made) | {"unreadable": unreadable},
        "training": None if training is None else what(training),
        "scores": scored(made, unreadable),
    }
    if real is not None:
        result["real"] = what(real)
        result["scores"] |= distributions.of_crystals(made, real)
        result["real_scores"] = scored(real, 0) | _floor(distributions.of_crystals, real, len(made))
    return result


def crystals_reconstructed(made: Structures, true: Structures, workers: int = 0) -> dict[str, Any]:
    """Match and rms of reconstructions beside their truths, index by index. Raises UserError."""
    scores = crystals.reconstruction(crystals.listed(made), crystals.listed(true), workers)
    return {
        "kind": "reconstructed crystals",
        "protocol": {"oxidation_states": crystals.OXIDATION_STATES, "matcher": crystals.TOLERANCES}
        | versions("pymatgen", "pymatgen-core", "SMACT"),
        "samples": what(made),
        "truth": what(true),
        "scores": scores,
        "real_scores": {"match": scores["match_ceiling"], "rms": 0.0, "match_any": 1.0, "composition_match": 1.0},
    }


def generated(made: Structures, real: Structures | None, training: Structures | None, **options: Any) -> dict[str, Any]:
    """``molecules_generated`` or ``crystals_generated``, by what the samples are. Raises UserError for a mixture."""
    crystal = int(made.periodic.sum())
    if 0 < crystal < len(made):
        raise UserError(f"{crystal:,} of {len(made):,} samples are crystals; score molecules and crystals apart")
    if crystal or (not len(made) and real is not None and bool(real.periodic.all())):
        options.pop("scorer", None)
        return crystals_generated(made, real, training, **options)
    return molecules_generated(made, real, training, **options)


def reconstructed(made: Structures, true: Structures, scorer: str = "rdkit", workers: int = 0) -> dict[str, Any]:
    """``crystals_reconstructed`` or ``molecules_reconstructed``, by what the truths are."""
    if len(true) and true.periodic.all():
        return crystals_reconstructed(made, true, workers)
    return molecules_reconstructed(made, true, scorer, workers)


NAMES = {
    "valid": "valid",
    "unique_of_valid": "unique, of the valid",
    "novel_of_unique": "novel, of the unique",
    "valid_and_unique": "valid and unique",
    "valid_unique_novel": "valid, unique and novel",
    "atoms_stable": "atoms stable (EDM's table)",
    "molecules_stable": "molecules stable (EDM's table)",
    "struct_valid": "structure valid",
    "comp_valid": "composition valid (SMACT)",
    "overall_valid": "both valid",
    "match": "match",
    "rmsd": "RMSD of the matches, Å",
    "graph_match": "match of the bond graph",
    "graph_rmsd": "RMSD of those, Å",
    "types_match": "all elements right",
    "types_rmsd": "RMSD of those, Å",
    "rms": "rms of the matches, without unit",
    "match_any": "match, valid or not",
    "rms_any": "rms of those",
    "composition_match": "composition right",
    "atoms_tv": "sizes, total variation",
    "elements_tv": "elements, total variation",
    "bond_lengths_w1": "bond lengths, Wasserstein-1, Å",
    "bond_lengths_by_pair_w1": "bond lengths by pair, Wasserstein-1, Å",
    "angles_w1": "angles, Wasserstein-1, degrees",
    "densities_w1": "densities, Wasserstein-1, g/cm^3",
    "element_counts_w1": "numbers of elements, Wasserstein-1",
    "strain_median": "strain (MMFF94), median, kcal/mol per atom",
    "strain_w1": "strain, Wasserstein-1",
}
MEASURED = ("rmsd", "graph_rmsd", "types_rmsd", "rms", "rms_any", "strain_median")  # not shares


def shown(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if name in MEASURED or name.endswith(DISTANCES) else f"{value:.2%}"


def table(result: dict[str, Any]) -> str:
    """The scores as text, one per line, those of real structures beside them."""
    rule = result["protocol"].get("scorer")
    scores, real = result["scores"], result.get("real_scores", {})
    title = f"{result['samples']['count']:,} {result['kind']}" + (f", rule {rule}" if rule else "")
    lines = [f"{title:46} {'samples':>10} {'real' if real else '':>10}"]
    for name, words in NAMES.items():
        if name in scores:
            beside = shown(name, real[name]) if name in real else ""
            lines.append(f"{words:46} {shown(name, scores[name]):>10} {beside:>10}".rstrip())
    for key, title in (("reasons", "not valid"), ("real_reasons", "not valid, real")):
        if result.get(key):
            lines.append(f"{title}: " + ", ".join(f"{count:,} {kind}" for kind, count in result[key].items()))
    if result["samples"].get("unreadable"):
        lines.append(f"{result['samples']['unreadable']:,} samples could not be read and count as not valid")
    return "\n".join(lines)
