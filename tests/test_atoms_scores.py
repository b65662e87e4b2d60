"""Scores of molecules and crystals against the libraries that define them, called directly."""

from __future__ import annotations

import csv
import importlib.metadata
import itertools
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from unite_fast.base.errors import RunError, UserError
from unite_fast.data.atoms import Structure, Structures, pack
from unite_fast.data.atoms.crystals import of_pymatgen, prototypes, to_pymatgen
from unite_fast.data.atoms.parallel import mapped
from unite_fast.data.atoms.writers import write
from unite_fast.evaluation.atoms import crystals, distributions, edm, molecules, report
from unite_fast.evaluation.atoms.__main__ import main

Chem = pytest.importorskip("rdkit.Chem")
rdDetermineBonds = pytest.importorskip("rdkit.Chem.rdDetermineBonds")
core = pytest.importorskip("pymatgen.core")
StructureMatcher = pytest.importorskip("pymatgen.analysis.structure_matcher").StructureMatcher
smact = pytest.importorskip("smact")
COUNT = 200


@pytest.fixture(scope="module")
def real() -> Structures:
    """The first of the last part of QM9: molecules of nine heavy atoms, of DFT."""
    try:
        root = Path(str(importlib.metadata.distribution("qm9pack").locate_file("qm9pack/data")))
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("qm9pack is not installed")
    listed = []
    with open(root / "qm9_part3.csv", newline="") as file:
        for row in itertools.islice(csv.DictReader(file), COUNT):
            symbols = row["Elements"].strip("[]").replace("'", "").split(",")
            numbers = np.array([Chem.Atom(symbol).GetAtomicNum() for symbol in symbols])
            values = [float(x) for x in row["XYZ_Ang"].replace("[", "").replace("]", "").split(",")]
            listed.append(Structure(numbers, np.array(values).reshape(-1, 3), None, row["Index"], row["SMILES"]))
    return pack(listed)


@pytest.fixture(scope="module")
def cells() -> list[Structure]:
    """Real crystals of pymatgen's library of prototypes."""
    return prototypes()[:COUNT]


def noisy(structures: Structures, sigma: float, seed: int = 0) -> Structures:
    random = np.random.default_rng(seed)
    listed = [structures[i] for i in range(len(structures))]
    return pack([one._replace(coordinates=one.coordinates + random.normal(0, sigma, one.coordinates.shape))
                 for one in listed])  # fmt: skip


def rdkit_directly(one: Structure, **options) -> str | None:
    rows = [f"{Chem.Atom(int(z)).GetSymbol()} {x:.9f} {y:.9f} {w:.9f}" for z, (x, y, w) in
            zip(one.species, one.coordinates, strict=True)]  # fmt: skip
    molecule = Chem.MolFromXYZBlock("\n".join([str(len(rows)), "", *rows]) + "\n")
    try:
        rdDetermineBonds.DetermineBonds(molecule, charge=0, allowChargedFragments=True, embedChiral=False,
                                        maxIterations=1000, **options)  # fmt: skip
        Chem.SanitizeMol(molecule)
    except Exception:  # RDKit raises several kinds; each means that it perceives no molecule
        return None
    if len(Chem.GetMolFrags(molecule)) > 1 or any(atom.GetNumRadicalElectrons() for atom in molecule.GetAtoms()):
        return None
    return Chem.MolToSmiles(Chem.RemoveHs(molecule), isomericSmiles=False)


@pytest.mark.parametrize("sigma", [0.0, 0.12])
def test_validity_is_rdkits(real, sigma):
    structures = noisy(real, sigma)
    found = [one.smiles for one in molecules.perceive(molecules.atoms_of(structures), workers=1)]
    expected = [rdkit_directly(structures[i]) for i in range(len(structures))]
    assert found == expected
    valid = sum(smiles is not None for smiles in found) / len(found)
    assert valid > 0.9 if sigma == 0 else 0.2 < valid < 0.95
    if sigma == 0:
        stated = [Chem.CanonSmiles(real[i].smiles, useChiral=0) for i in range(len(real))]
        assert all(a == b for a, b in zip(found, stated, strict=True) if a is not None)


def test_cages_are_valid_by_the_tight_rule():
    """Bicyclo[1.1.1]pentane, of MMFF94: its bridgeheads are 1.9 Å apart and not bonded."""
    from rdkit.Chem import AllChem

    molecule = Chem.AddHs(Chem.MolFromSmiles("C1C2CC1C2"))
    AllChem.EmbedMolecule(molecule, randomSeed=1)
    AllChem.MMFFOptimizeMolecule(molecule)
    cage = np.array([a.GetAtomicNum() for a in molecule.GetAtoms()]), molecule.GetConformer().GetPositions()
    (loose,), (tight,) = (molecules.perceive([cage], rule, 1) for rule in molecules.WHOLE)
    assert (loose.smiles, loose.reason.split(":")[0]) == (None, "no valences")
    assert tight.smiles == "C1C2CC1C2"
    assert molecules.reconstruction(molecules.pairs([cage], [cage], "rdkit_tight", 1))["match"] == 1
    with pytest.raises(UserError, match="reconstructions are compared by rdkit or rdkit_tight"):
        molecules.pairs([cage], [cage], "edm")


@pytest.mark.parametrize("sigma", [0.0, 0.05])
def test_the_tight_rule_is_rdkits_with_a_shorter_reach(real, sigma):
    structures = noisy(real, sigma)
    found = [one.smiles for one in molecules.perceive(molecules.atoms_of(structures), "rdkit_tight", 1)]
    assert found == [rdkit_directly(structures[i], useVdw=True, covFactor=1.15) for i in range(len(structures))]
    valid = sum(smiles is not None for smiles in found) / len(found)
    assert valid > 0.99 if sigma == 0 else 0.2 < valid < 0.99


def test_radicals_and_fragments_are_not_valid():
    methyl = (np.array([6, 1, 1, 1]), np.array([[0, 0, 0], [1.08, 0, 0], [-0.54, 0.935, 0], [-0.54, -0.935, 0]]))
    waters = np.array([[0.0, 0.0, 0.119], [0.0, 0.763, -0.477], [0.0, -0.763, -0.477]])
    two = (np.array([8, 1, 1] * 2), np.concatenate([waters, waters + 6.0]))
    broken = (np.array([8, 1, 1]), waters * np.nan)
    found = molecules.perceive([methyl, two, broken, (np.zeros(0, dtype=np.int64), np.zeros((0, 3)))], workers=1)
    assert [one.smiles for one in found] == [None] * 4
    assert [one.reason.split(":")[0] for one in found][1:3] == ["fragments", "not a number"]
    assert molecules.generation(found, None)["valid"] == 0


def edm_directly(one: Structure) -> tuple[int, np.ndarray]:
    """Pairs in turn, in pm, as EDM's program goes through them."""
    names = [Chem.Atom(int(z)).GetSymbol() for z in one.species]
    bonds = np.zeros((len(names), len(names)), dtype=int)
    for i, j in itertools.combinations(range(len(names)), 2):
        pair = "".join(sorted(names[i] + names[j]))
        distance = 100 * math.dist(one.coordinates[i], one.coordinates[j])
        order = 0
        if distance < edm.SINGLE[pair] + 10:
            order = 1
            if pair in edm.DOUBLE and distance < edm.DOUBLE[pair] + 5:
                order = 3 if pair in edm.TRIPLE and distance < edm.TRIPLE[pair] + 3 else 2
        bonds[i, j] = bonds[j, i] = order
    wanted = {"H": 1, "C": 4, "N": 3, "O": 2, "F": 1}
    return sum(bonds[i].sum() == wanted[name] for i, name in enumerate(names)), bonds


def test_bonds_by_lengths_are_edms(real):
    structures = noisy(real, 0.03)
    for i in range(len(structures)):
        one = structures[i]
        stable, bonds = edm_directly(one)
        assert np.array_equal(edm.orders(one.species, one.coordinates), bonds)
        assert edm.stable(one.species, one.coordinates) == stable
    scores = molecules.generation(molecules.perceive(molecules.atoms_of(real), "edm", 1), None)
    assert scores["atoms_stable"] > 0.98
    assert scores["molecules_stable"] > 0.85
    assert scores["valid"] > 0.95
    silicon = np.array([14, 1, 1, 1, 1]), np.eye(5, 3)
    assert edm.stable(*silicon) == 0


def test_shares_by_hand():
    def one(smiles: str | None, stable: int = 2, atoms: int = 2) -> molecules.Perceived:
        return molecules.Perceived(smiles, "" if smiles else "no valences: x", stable, atoms)

    perceived = [one("C"), one("C"), one("CO", 1), one("CN"), one(None, 0, 4)]
    scores = molecules.generation(perceived, {"C", "CC"})
    assert scores == {
        "valid": 4 / 5, "unique_of_valid": 3 / 4, "valid_and_unique": 3 / 5, "atoms_stable": 7 / 12,
        "molecules_stable": 3 / 5, "novel_of_unique": 2 / 3, "valid_unique_novel": 2 / 5,
    }  # fmt: skip
    assert molecules.reasons(perceived) == {"no valences": 1}
    assert "novel_of_unique" not in molecules.generation(perceived, None)
    assert molecules.generation([], None)["valid"] == 0


def test_training_molecules_are_known_by_their_smiles(real):
    known = molecules.known(real, 1)
    found = molecules.perceive(molecules.atoms_of(real), workers=1)
    assert molecules.generation(found, known)["novel_of_unique"] == 0
    unstated = pack([real[i]._replace(smiles="") for i in range(50)])
    assert molecules.known(unstated, 1) == {one.smiles for one in found[:50] if one.smiles is not None}


def test_rmsd_is_scipys_and_keeps_the_hand(real):
    from scipy.spatial.transform import Rotation

    random = np.random.default_rng(0)
    for i in range(len(real)):
        a = real[i].coordinates
        b = (a + random.normal(0, 0.1, a.shape)) @ Rotation.random(rng=random).as_matrix().T + 3.0
        _, distance = Rotation.align_vectors(a - a.mean(0), b - b.mean(0))
        assert molecules.rmsd(a, b) == pytest.approx(distance / math.sqrt(len(a)), abs=1e-6)
    mirrored = real[0].coordinates * np.array([1, 1, -1])
    assert molecules.rmsd(real[0].coordinates, mirrored) > 0.1
    assert molecules.rmsd(real[0].coordinates, real[0].coordinates) < 1e-6


def test_reconstructions_of_molecules(real):
    some = real.select(range(60))
    true = molecules.atoms_of(some)
    same = molecules.reconstruction(molecules.pairs(true, true, workers=1))
    assert same["match"] == same["match_ceiling"] == sum(rdkit_directly(real[i]) is not None for i in range(60)) / 60
    assert (same["rmsd"], same["graph_match"], same["types_match"]) == (pytest.approx(0, abs=1e-6), 1, 1)
    made = noisy(some, 0.03)
    scores = molecules.reconstruction(molecules.pairs(molecules.atoms_of(made), true, workers=1))
    assert 0.8 < scores["match"] <= scores["match_ceiling"]
    assert scores["rmsd"] == pytest.approx(0.03 * math.sqrt(3), rel=0.15)
    wrong = [(np.where(species == 6, 7, species), positions) for species, positions in true]
    none = molecules.reconstruction(molecules.pairs(wrong, true, workers=1))
    assert (none["match"], none["rmsd"], none["types_match"]) == (0, None, 0)
    with pytest.raises(UserError, match="1 reconstructions of 60 molecules"):
        molecules.pairs(true[:1], true)


def cdvae_directly(species: np.ndarray) -> bool:
    """The published rule on SMACT's functions: every choice of states until one is neutral and passes the test."""
    from smact.screening import neutral_ratios, pauling_test

    numbers, counts = np.unique(species, return_counts=True)
    counts = counts // np.gcd.reduce(counts)
    symbols = [core.Element.from_Z(int(number)).symbol for number in numbers]
    if len(symbols) == 1 or all(symbol in smact.metals for symbol in symbols):
        return True
    space = [smact.Element(symbol) for symbol in symbols]
    states = [element.oxidation_states_smact14 for element in space]
    if any(not one for one in states):
        return False
    for choice in itertools.product(*states):
        if neutral_ratios(choice, stoichs=[(int(c),) for c in counts], threshold=int(max(counts))):
            try:
                good = pauling_test(choice, [element.pauling_eneg for element in space])
            except TypeError:
                good = True
            if good:
                return True
    return False


@pytest.mark.filterwarnings("ignore")
def test_validity_of_crystals_is_smacts_and_pymatgens(cells):
    verdicts = crystals.judge(cells, 1)
    for crystal, verdict in zip(cells, verdicts, strict=True):
        assert verdict.comp == cdvae_directly(crystal.species), crystal.name
        distances = to_pymatgen(crystal).distance_matrix + np.diag(np.full(len(crystal.species), 9.0))
        assert verdict.struct == (distances.min() >= 0.5), crystal.name
    shares = crystals.validity(verdicts)
    assert shares["struct_valid"] == 1
    assert 0.8 < shares["comp_valid"] < 0.98
    assert shares["overall_valid"] == shares["comp_valid"]


def test_cells_that_are_none(cells):
    salt = next(one for one in cells if len(one.species) == 2)
    assert salt.lattice is not None
    flat = np.array([[3.0, 0, 0], [2.9, 0.5, 0], [0, 0, 3.0]])  # 9.8 degrees
    for bad in (
        salt._replace(lattice=np.zeros((3, 3))),
        salt._replace(lattice=salt.lattice * np.nan),
        salt._replace(lattice=flat),
        salt._replace(lattice=None),
        salt._replace(coordinates=salt.coordinates + np.inf),
        salt._replace(coordinates=salt.coordinates * 0),
        salt._replace(species=np.array([0, 8])),
        salt._replace(species=salt.species[:0], coordinates=salt.coordinates[:0]),
    ):
        assert not crystals.struct_valid(bad)
    assert crystals.struct_valid(salt)


def shaken(crystal: Structure, sigma: float, random: np.random.Generator) -> Structure:
    assert crystal.lattice is not None
    lattice = crystal.lattice @ (np.eye(3) + random.normal(0, sigma / 3, (3, 3)))
    moved = crystal.coordinates + random.normal(0, sigma, crystal.coordinates.shape) @ np.linalg.inv(lattice)
    return crystal._replace(coordinates=moved, lattice=lattice)


def test_match_of_crystals_is_pymatgens(cells):
    random = np.random.default_rng(0)
    true = [one for one in cells if len(one.species) <= 8][:30]
    made = [shaken(one, 0.1 if k % 3 else 0.9, random) for k, one in enumerate(true)]
    matcher = StructureMatcher(stol=0.5, angle_tol=10, ltol=0.3)
    direct = [
        matcher.get_rms_dist(to_pymatgen(a), to_pymatgen(b)) if crystals.constructed(a) else None
        for a, b in zip(made, true, strict=True)
    ]
    kept = [found[0] for found in direct if found is not None]
    valid = [a.overall and b.overall for a, b in zip(crystals.judge(made, 1), crystals.judge(true, 1), strict=True)]
    scores = crystals.reconstruction(made, true, 1)
    assert scores["match_any"] == len(kept) / 30
    assert scores["rms_any"] == pytest.approx(np.mean(kept))
    assert scores["match"] == sum(v and d is not None for v, d in zip(valid, direct, strict=True)) / 30
    assert 0.5 < scores["match"] < scores["match_any"] < 1
    assert scores["match_ceiling"] == sum(one.overall for one in crystals.judge(true, 1)) / 30
    assert scores["composition_match"] == 1
    with pytest.raises(UserError, match="0 reconstructions of 30 crystals"):
        crystals.reconstruction([], true)


def test_unique_and_novel_crystals_are_the_matchers_groups(cells):
    some = [one for one in cells if len(one.species) <= 6][:25]
    random = np.random.default_rng(1)
    made = some + [shaken(one, 0.02, random) for one in some[:10]]
    verdicts = crystals.judge(made, 1)
    valid = [to_pymatgen(one) for one, verdict in zip(made, verdicts, strict=True) if verdict.overall]
    matcher = StructureMatcher(stol=0.5, angle_tol=10, ltol=0.3)
    groups = matcher.group_structures(valid)
    known = [to_pymatgen(one) for one in some[:5]]
    novel = sum(not any(matcher.fit(group[0], one) for one in known) for group in groups)
    found = crystals.distinct(made, verdicts, some[:5], 1)
    assert found == {"unique_of_valid": len(groups) / len(valid), "novel_of_unique": novel / len(groups)}
    assert 0 < novel < len(groups) < len(valid)


def test_distances_by_hand(cells):
    assert distributions.total_variation(np.array([0, 2, 2]), np.array([0, 1])) == 0.5
    assert distributions.total_variation(np.array([3, 1]), np.array([6, 2])) == 0
    assert distributions.wasserstein(np.array([0.0, 1.0]), np.array([1.0, 2.0])) == 1
    assert distributions.wasserstein(np.zeros(0), np.ones(1)) is None
    packed = pack(cells)
    direct = [to_pymatgen(one).density for one in cells]
    assert np.allclose(distributions.densities(packed), direct, rtol=6e-3)  # two tables of atomic weights: polonium
    assert distributions.element_counts(packed).tolist() == [len(set(one.species.tolist())) for one in cells]
    itself = distributions.of_crystals(packed, packed)
    assert itself == dict.fromkeys(itself, 0.0)


def test_bonds_and_angles_one_by_one(real):
    some = real.select(range(12))
    radii = [Chem.GetPeriodicTable().GetRcovalent(z) for z in range(10)]
    lengths, angles = [], []
    for i in range(12):
        one = some[i]
        n, x = len(one.species), one.coordinates
        near = [[j for j in range(n) if j != i and math.dist(x[i], x[j]) < 1.25 * (radii[one.species[i]] +
                 radii[one.species[j]])] for i in range(n)]  # fmt: skip
        lengths += [math.dist(x[i], x[j]) for i in range(n) for j in near[i] if j > i]
        for i in range(n):
            for j, k in itertools.combinations(near[i], 2):
                a, b = x[j] - x[i], x[k] - x[i]
                angles.append(math.degrees(math.acos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))))
    found = distributions.geometry(some)
    assert np.allclose(np.sort(found.lengths), np.sort(lengths), atol=1e-5)
    assert np.allclose(np.sort(found.angles), np.sort(angles), atol=2e-2)
    assert {distributions.kind_name(int(kind)) for kind in np.unique(found.kinds)} >= {"H-C", "C-C", "C-O"}
    longer = distributions.Geometry(found.lengths + 0.1, found.kinds, found.angles)
    assert distributions.by_pair(longer, found) == pytest.approx(0.1, abs=1e-5)
    lacking = found.kinds != 106
    fewer = distributions.Geometry(found.lengths[lacking], found.kinds[lacking], found.angles)
    hydrogens = found.lengths[~lacking]
    assert distributions.by_pair(fewer, found) == pytest.approx(hydrogens.sum() / len(found.lengths), rel=1e-5)


def test_strain_is_what_relaxation_gains(real):
    from rdkit.Chem import AllChem

    some = molecules.atoms_of(real.select(range(5)))
    molecule = Chem.AddHs(Chem.MolFromSmiles("CCO"))
    AllChem.EmbedMolecule(molecule, randomSeed=1)
    AllChem.MMFFOptimizeMolecule(molecule, maxIters=2000)
    species = np.array([atom.GetAtomicNum() for atom in molecule.GetAtoms()])
    relaxed = molecule.GetConformer().GetPositions()
    random = np.random.default_rng(0)
    found = distributions.strains([(species, relaxed), (species, relaxed + random.normal(0, 0.03, relaxed.shape))], 1)
    assert found[0] == pytest.approx(0, abs=1e-3)
    assert found[1] > 0.2
    assert (distributions.strains(some, 1) > 0).all()


def test_energies_are_of_a_sample_of_all(real, monkeypatch):
    """Not of the first: sources are in the order of size."""
    seen = []
    monkeypatch.setattr(report, "STRAINED", 10)
    monkeypatch.setattr(distributions, "strains", lambda listed, workers: seen.append(listed) or np.ones(1))
    report.molecules_generated(real, real, workers=1)
    first = molecules.atoms_of(real)[:10]
    assert [len(listed) for listed in seen] == [10, 10, 10]
    assert sum(np.array_equal(a[1], b[1]) for a in seen[0] for b in first) < 5


def test_processes_change_nothing(real):
    some = molecules.atoms_of(real.select(range(150)))
    assert molecules.perceive(some, workers=2) == molecules.perceive(some, workers=1)


def _die(item: int) -> int:
    import os

    if item == 100:
        os._exit(1)
    return item


def test_a_process_that_dies_is_one_line():
    with pytest.raises(RunError, match="one of 2 processes died; out of memory"):
        list(mapped(_die, range(200), workers=2, chunk=10))


def test_the_command_scores_generated_molecules(real, tmp_path, capsys):
    made = noisy(real, 0.05)
    write(tmp_path / "made.xyz", [made[i] for i in range(80)])
    with open(tmp_path / "made.xyz", "a") as file:
        file.write("2\nno molecule\nXx 0 0 0\nC 0 0 1\n")
    real.select(range(100, 200)).save(tmp_path / "real.safetensors")
    real.save(tmp_path / "training.safetensors")
    out = tmp_path / "scores.json"
    assert main([str(tmp_path / "made.xyz"), "--real", str(tmp_path / "real.safetensors"), "--training",
                 str(tmp_path / "training.safetensors"), "--out", str(out), "--workers", "1"]) == 0  # fmt: skip
    text = capsys.readouterr().out
    assert "80 generated molecules, rule rdkit" in text
    assert "1 samples could not be read and count as not valid" in text
    result = json.loads(out.read_text())
    direct = [rdkit_directly(made[i]) for i in range(80)]
    valid = [smiles for smiles in direct if smiles is not None]
    assert result["scores"]["valid"] == pytest.approx(len(valid) / 81, abs=1.5 / 81)  # the file's digits
    assert result["real_scores"]["novel_of_unique"] == 0
    assert result["protocol"]["rdkit"] == importlib.metadata.version("rdkit")
    assert result["real"]["count"] == 100
    assert set(result["scores"]) <= set(report.NAMES)
    for name in result["scores"]:
        assert report.NAMES[name] in text


def test_the_command_scores_reconstructions_and_crystals(cells, tmp_path, capsys):
    small = [one for one in cells if len(one.species) <= 4][:12]
    pack(small).save(tmp_path / "cells.safetensors")
    path = str(tmp_path / "cells.safetensors")
    assert main([path, "--of", path, "--workers", "1"]) == 0
    assert re.search(r"match, valid or not +100.00% +100.00%", capsys.readouterr().out)
    assert main([path, "--real", path, "--training", path, "--workers", "1"]) == 0
    assert re.search(r"structure valid +100.00% +100.00%", capsys.readouterr().out)
    with pytest.raises(UserError, match="--of compares reconstructions"):
        main([path, "--of", path, "--real", path])
    water = Structure(np.array([8, 1, 1]), np.array([[0, 0, 0.119], [0, 0.763, -0.477], [0, -0.763, -0.477]]), None, "")
    with pytest.raises(UserError, match="score molecules and crystals apart"):
        report.generated(pack([water, small[0]]), None, None)


def test_a_rule_without_its_package_is_one_line(monkeypatch):
    with pytest.raises(UserError, match="scorer 'smiles' is not known; one of rdkit, rdkit_tight, edm, adit"):
        molecules.ready("smiles")
    monkeypatch.setitem(sys.modules, "openbabel", None)
    monkeypatch.delitem(sys.modules, "openbabel.pybel", raising=False)
    with pytest.raises(
        UserError, match="the scorer adit needs openbabel, which is not installed; pip install openbabel-wheel"
    ):
        molecules.ready("adit")
    monkeypatch.setitem(sys.modules, "smact.screening", None)
    with pytest.raises(UserError, match=r"the scores of crystals needs? smact, which is not installed"):
        crystals.ready()


def test_adits_rule_where_openbabel_is_there(real):
    pytest.importorskip("openbabel")
    found = molecules.perceive(molecules.atoms_of(real), "adit", 1)
    assert molecules.generation(found, None)["valid"] > 0.95


def test_a_crystal_is_no_molecule(cells):
    iron = of_pymatgen(core.Structure(core.Lattice.cubic(2.87), ["Fe"], [[0, 0, 0]]), "iron")
    with pytest.raises(UserError, match="there are crystals among the structures"):
        molecules.atoms_of(pack([iron]))
