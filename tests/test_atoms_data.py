"""Molecules and crystals in memory: readers against a direct reading of the same files, splits."""

from __future__ import annotations

import csv
import importlib.metadata
from pathlib import Path

import numpy as np
import pytest
import torch

from unite_fast.base.errors import UserError
from unite_fast.data.atoms import (
    Structure,
    Structures,
    augment,
    checks,
    crystals,
    join,
    lattice,
    open_structures,
    pack,
    qm9,
)
from unite_fast.data.atoms.checks import faults, neighbours, typical_distance
from unite_fast.data.atoms.structures import load
from unite_kernels import philox

Chem = pytest.importorskip("rdkit.Chem")
pytest.importorskip("ase")
core = pytest.importorskip("pymatgen.core")
Crystal, Lattice = core.Structure, core.Lattice
StructureMatcher = pytest.importorskip("pymatgen.analysis.structure_matcher").StructureMatcher

# Methanol and water by hand; rock salt, and two one-atom cells.
METHANOL = Structure(
    np.array([6, 8, 1, 1, 1, 1]),
    np.array(
        [
            [-0.047, 0.663, 0.0],
            [-0.047, -0.758, 0.0],
            [-1.093, 0.970, 0.0],
            [0.438, 1.071, 0.890],
            [0.438, 1.071, -0.890],
            [0.878, -1.051, 0.0],
        ]
    ),
    None,
    "methanol",
    "CO",
)
WATER = Structure(
    np.array([8, 1, 1]), np.array([[0.0, 0.0, 0.119], [0.0, 0.763, -0.477], [0.0, -0.763, -0.477]]), None, "water", "O"
)


def pymatgen_crystals() -> list:
    salt = Crystal.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    rutile = Crystal.from_spacegroup(
        "P4_2/mnm", Lattice.tetragonal(4.594, 2.959), ["Ti", "O"], [[0, 0, 0], [0.305, 0.305, 0]]
    )
    skew = Lattice.from_parameters(3.1, 4.2, 9.7, 61, 75, 118)  # not reduced
    return [
        salt.get_primitive_structure(),
        rutile,
        Crystal(Lattice.cubic(2.87), ["Fe", "Fe"], [[0, 0, 0], [0.5, 0.5, 0.5]]),
        Crystal(skew, ["Ba", "O"], [[0.1, -0.2, 1.3], [0.6, 0.3, 0.8]]),
    ]


def rattled(count: int) -> Structures:
    """Molecules and crystals of different sizes."""
    random = np.random.default_rng(0)
    listed = []
    for k in range(count):
        one = (METHANOL, WATER)[k % 2]
        listed.append(one._replace(coordinates=one.coordinates + random.normal(0, 0.02, one.coordinates.shape)))
        if k % 3 == 0:
            listed.append(crystals.of_pymatgen(pymatgen_crystals()[k % 4], f"crystal {k}"))
    return pack(listed)


def write_csv(path: Path, structures: list) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", "material_id", "formation_energy_per_atom", "cif"])
        for k, structure in enumerate(structures):
            writer.writerow([k, f"mp-{k}", -0.1 * k, structure.to(fmt="cif")])


def test_qm9_is_what_a_direct_reading_of_its_package_gives():
    try:
        root = Path(str(importlib.metadata.distribution("qm9pack").locate_file("qm9pack/data")))
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("qm9pack is not installed")
    structures = qm9.read_package()
    assert len(structures) == 130_831
    assert int(structures.offsets[-1]) == 2_359_210
    counts = torch.bincount(structures.species.long())
    assert {z: int(n) for z, n in enumerate(counts) if n} == {
        1: 1_208_486, 6: 831_925, 7: 132_498, 8: 183_265, 9: 3_036
    }  # fmt: skip
    assert torch.bincount(structures.heavy_atoms())[1:].tolist() == [3, 5, 9, 31, 127, 608, 3138, 17879, 109031]
    histogram = structures.histogram()
    assert (int(histogram.argmax()), len(histogram) - 1, int(histogram[28]), int(histogram[:3].sum())) == (19, 29, 0, 0)
    offsets, coordinates = structures.offsets.numpy(), structures.coordinates.numpy()
    worst, row = 0.0, 0
    for part in (1, 2, 3):
        with open(root / f"qm9_part{part}.csv", newline="") as file:
            records = list(csv.DictReader(file))
        for k, record in enumerate(records[::50]):
            symbols = record["Elements"].strip("[]").replace("'", "").split(",")
            found = structures[row + 50 * k]
            assert [Chem.Atom(s).GetAtomicNum() for s in symbols] == found.species.tolist()
            assert (found.name, found.smiles) == (f"gdb_{record['Index']}", record["SMILES"])
        sizes = np.array([int(record["N_atoms"]) for record in records])
        assert [record["XYZ_Ang"].count(",") + 1 for record in records] == (3 * sizes).tolist()
        here = offsets[row : row + len(records) + 1]
        assert np.diff(here).tolist() == sizes.tolist()
        numbers = ",".join(record["XYZ_Ang"] for record in records).replace("[", "").replace("]", "").split(",")
        positions = np.array(list(map(float, numbers))).reshape(-1, 3)
        centers = np.add.reduceat(positions, here[:-1] - here[0]) / sizes[:, None]
        apart = coordinates[here[0] : here[-1]] - (positions - centers.repeat(sizes, 0))
        worst = max(worst, float(np.abs(apart).max()))
        row += len(records)
    assert row == 130_831
    assert worst < 1e-6
    assert not faults(structures, 29)
    assert 0.9 < typical_distance(structures, 29)[0] < 1.1
    small = structures.select((structures.heavy_atoms() <= 7).nonzero()[:, 0])
    assert len(small) == 3_921


def test_the_split_is_edms():
    """The rule of EDM's preparation, written out again on the numbers of the data set."""
    excluded = np.random.default_rng(1).choice(133_885, 3_054, replace=False)
    included = np.array(sorted(set(range(133_885)) - set(excluded.tolist())))
    np.random.seed(0)  # as theirs
    order = np.random.permutation(len(included))
    test = int(0.1 * len(included))
    theirs = {
        "train": included[order[:100_000]],
        "valid": included[order[100_000 : len(included) - test]],
        "test": included[order[len(included) - test :]],
    }
    ours = qm9.edm_split()
    assert [len(ours[part]) for part in ("train", "valid", "test")] == [100_000, 17_748, 13_083]
    for part, indices in ours.items():
        assert set(included[indices].tolist()) == set(theirs[part].tolist())
        assert (np.diff(indices) > 0).all()


def test_the_other_split_has_adits_sizes():
    parts = qm9.adit_sizes_split()
    assert [len(part) for part in parts.values()] == [100_000, 18_000, 12_831]
    assert np.array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(130_831))
    assert not np.array_equal(parts["train"], qm9.adit_sizes_split(seed=10)["train"])
    for split in (qm9.edm_split, qm9.adit_sizes_split):
        with pytest.raises(UserError, match="needs all 130,831 molecules, there are 500"):
            split(500)


def write_gdb9(root: Path, structures: Structures, left_out: list[int]) -> None:
    root.mkdir(exist_ok=True)
    with Chem.SDWriter(str(root / "gdb9.sdf")) as writer:
        for i in range(len(structures)):
            one = structures[i]
            lines = [f"{Chem.Atom(int(z)).GetSymbol()} {x} {y} {w}" for z, (x, y, w) in
                     zip(one.species, one.coordinates, strict=True)]  # fmt: skip
            molecule = Chem.MolFromXYZBlock("\n".join([str(len(lines)), "", *lines]) + "\n")
            molecule.SetProp("_Name", f"gdb_{i + 1}")
            writer.write(molecule)
    head = [f"header line {k}" if k else "" for k in range(9)]
    rows = [f"   {number}   C   1.0" for number in left_out]
    (root / "uncharacterized.txt").write_text("\n".join([*head, *rows, "3054 compounds in all?", ""][:-2]) + "\n\n")


def test_gdb9_sdf_less_the_uncharacterised(tmp_path):
    molecules = pack([METHANOL, WATER] * 6)
    write_gdb9(tmp_path, molecules, [2, 3, 12])
    found = open_structures("qm9", tmp_path, "all")
    assert [found.names[i] for i in range(len(found))] == [f"gdb_{n}" for n in (1, 4, 5, 6, 7, 8, 9, 10, 11)]
    expected = molecules.select([0, 3, 4, 5, 6, 7, 8, 9, 10])
    assert torch.equal(found.species, expected.species)
    assert (found.coordinates - expected.coordinates).abs().max() < 1e-4  # the file's four decimals
    with pytest.raises(UserError, match="needs all 130,831 molecules, there are 9"):
        open_structures("qm9", tmp_path, "train")
    (tmp_path / "uncharacterized.txt").write_text("99 x\n")
    with pytest.raises(UserError, match=r"12 records, but uncharacterized.txt names number 99"):
        open_structures("qm9", tmp_path, "all")
    (tmp_path / "uncharacterized.txt").unlink()
    with pytest.raises(UserError, match=r"it lists the molecules of gdb9.sdf to leave out"):
        open_structures("qm9", tmp_path, "all")


def test_edms_npz(tmp_path):
    molecules = pack([METHANOL, WATER, METHANOL])
    batch = molecules.gather(torch.arange(3), 9)
    for part in qm9.NPZ_PARTS:
        arrays = {"num_atoms": batch.sizes, "charges": batch.species, "positions": batch.positions + 4.0}
        np.savez_compressed(tmp_path / f"{part}.npz", index=np.array([5, 6, 7]), **arrays)
    found = open_structures("qm9", tmp_path, "test")
    assert torch.equal(found.species, molecules.species)
    assert (found.coordinates - molecules.coordinates).abs().max() < 1e-6
    assert found.names[2] == "gdb_7"
    assert len(open_structures("qm9", tmp_path, "all")) == 9
    np.savez_compressed(tmp_path / "test.npz", num_atoms=batch.sizes, charges=batch.species[:, :4],
                        positions=batch.positions)  # fmt: skip
    with pytest.raises(UserError, match="do not match"):
        open_structures("qm9", tmp_path, "test")
    (tmp_path / "test.npz").write_bytes(b"PK\x03\x04 no zip")
    with pytest.raises(UserError, match="write it again"):
        open_structures("qm9", tmp_path, "test")


def test_mp20_csv_is_what_pymatgen_reduces(tmp_path):
    listed = pymatgen_crystals()
    write_csv(tmp_path / "train.csv", listed)
    write_csv(tmp_path / "val.csv", listed[:1])
    found = open_structures("mp20", tmp_path, "train", largest=20)
    assert [found.names[i] for i in range(4)] == [f"train.csv:mp-{k}" for k in range(4)]
    lengths, angles = lattice.parameters(found.lattices)
    for k, structure in enumerate(listed):
        read_back = Crystal.from_str(structure.to(fmt="cif"), fmt="cif")
        reduced = read_back.get_reduced_structure()
        assert np.allclose(lengths[k], reduced.lattice.abc, atol=1e-4)
        assert np.allclose(angles[k], reduced.lattice.angles, atol=1e-3)
        one = found[k]
        assert one.species.tolist() == [site.specie.Z for site in reduced]
        assert np.abs((one.coordinates - reduced.frac_coords + 0.5) % 1 - 0.5).max() < 1e-6
        assert one.coordinates.min() >= 0
        assert one.coordinates.max() < 1
        assert StructureMatcher().fit(structure, crystals.to_pymatgen(one))
    assert len(open_structures("mp20", tmp_path, "valid", largest=20)) == 1
    with pytest.raises(UserError, match=r"neither test.csv nor all.csv"):
        open_structures("mp20", tmp_path, "test")
    write_csv(tmp_path / "all.csv", listed * 5)
    assert len(open_structures("mp20", tmp_path, "test", largest=20, workers=2)) == 4
    (tmp_path / "val.csv").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UserError, match="git lfs pull"):
        open_structures("mp20", tmp_path, "valid")


def test_real_crystals_of_packages(tmp_path):
    """Those of pymatgen, and of a folder as Avogadro has it what is new, ordered and small enough."""
    found = tmp_path / "kinds"
    found.mkdir()
    salt, _, iron, _ = pymatgen_crystals()
    garnet = Crystal(Lattice.cubic(12.0), ["Si"] * 81, np.random.default_rng(0).random((81, 3)))
    alloy = Crystal(Lattice.cubic(3.6), [{"Cu": 0.5, "Au": 0.5}], [[0, 0, 0]])
    new = Crystal(Lattice.orthorhombic(5.1, 6.2, 7.3), ["La", "Cl", "F"], [[0, 0, 0], [0.5, 0.5, 0], [0, 0.5, 0.5]])
    for name, structure in {"salt": salt, "iron": iron, "large": garnet, "alloy": alloy, "new": new}.items():
        (found / f"{name}.cif").write_text(structure.to(fmt="cif"))
    (found / "broken.cif").write_text("no crystal")
    read = crystals.read_packages(tmp_path)
    assert len(read.structures) == 248
    assert [read.structures.names[i] for i in (246, 247)] == ["avogadro:kinds/iron", "avogadro:kinds/new"]
    assert not faults(read.structures, 20)
    assert 0.8 < typical_distance(read.structures, 20)[0] < 1.2
    halite = next(read.structures[i] for i in range(246) if read.structures.names[i].endswith("Halite, Rock Salt"))
    assert crystals.identity(halite) == ("NaCl", 225)
    kept, apart = crystals.held_out(246)
    assert len(apart) == 24
    assert set(kept.tolist()) | set(apart.tolist()) == set(range(246))


def test_one_huge_structure_needs_no_memory_for_all(monkeypatch):
    """Distances are taken in parts of equal cost, and not at all of what is too large anyway."""
    huge = Structure(np.full(3000, 6), np.random.default_rng(0).normal(0, 60, (3000, 3)), None, "huge")
    structures = pack([WATER] * 50 + [huge] + [METHANOL] * 50)
    parts = list(structures.parts(2))
    assert [(low, len(part), part.largest) for low, part in parts] == [(0, 50, 3), (50, 1, 3000), (51, 50, 6)]
    seen = []
    monkeypatch.setattr(checks, "neighbours", lambda part: seen.append(part.largest) or neighbours(part))
    assert list(faults(structures, 29)) == [50]
    assert 0.9 < typical_distance(structures, 29)[0] < 1.1
    assert max(seen) == 6


def test_cells_are_pymatgens():
    random = np.random.default_rng(3)
    lengths, angles = random.uniform(2, 12, (50, 3)), random.uniform(65, 115, (50, 3))
    expected = np.stack([Lattice.from_parameters(*row).matrix for row in np.concatenate([lengths, angles], 1)])
    found = lattice.matrix(torch.from_numpy(lengths), torch.from_numpy(angles))
    assert np.allclose(found, expected, atol=1e-9)
    back = lattice.parameters(found)
    assert np.allclose(back[0], lengths, atol=1e-9)
    assert np.allclose(back[1], angles, atol=1e-9)
    assert not any(values.any() for values in lattice.parameters(torch.zeros(2, 3, 3)))


def test_a_padded_batch_is_its_structures_one_by_one():
    structures = rattled(9)
    indices = torch.tensor([3, 0, 3, len(structures) - 1, 1])
    batch = structures.gather(indices, structures.largest + 2)
    for row, index in enumerate(indices.tolist()):
        one, n = structures[index], int(batch.sizes[row])
        assert n == len(one.species)
        assert batch.species[row, :n].tolist() == one.species.tolist()
        assert np.allclose(batch.positions[row, :n], one.positions, atol=1e-5)
        assert np.allclose(batch.lattice[row], np.zeros((3, 3)) if one.lattice is None else one.lattice)
        assert np.allclose(batch.fractional[row, :n], 0 if one.lattice is None else one.coordinates)
        assert batch.mask[row].tolist() == [k < n for k in range(batch.species.shape[1])]
        for padded in (batch.species, batch.positions, batch.fractional):
            assert not padded[row, n:].any()
    wider = structures.gather(indices, 40)
    assert torch.equal(wider.positions[:, : batch.positions.shape[1]], batch.positions)
    with pytest.raises(ValueError, match="2 slots cannot hold structures of up to 6 atoms"):
        structures.gather(indices, 2)
    means = [structures[i].coordinates.mean(0) for i in range(len(structures)) if structures[i].lattice is None]
    assert np.abs(means).max() < 1e-6


def test_gathering_reads_nothing_back():
    """On a device without data, a value that the host asked for would raise."""
    structures = rattled(4)
    batch = structures.to("meta").gather(torch.zeros(3, dtype=torch.int64), 8)
    assert batch.positions.shape == (3, 8, 3)
    assert batch.mask.device.type == "meta"


def test_selecting_joining_and_saving_keep_every_array(tmp_path):
    structures = rattled(5)
    chosen = structures.select([4, 1, 1])
    for row, index in enumerate((4, 1, 1)):
        assert np.array_equal(chosen[row].coordinates, structures[index].coordinates)
        assert chosen[row].name == structures[index].name
    both = join([structures, chosen])
    assert both.labels.tolist() == [0] * len(structures) + [1] * 3
    assert np.array_equal(both[len(structures)].coordinates, structures[4].coordinates)
    both.save(tmp_path / "both.safetensors")
    again = load(tmp_path / "both.safetensors")
    assert again.digest() == both.digest() != structures.digest()
    assert [again.names[i] for i in range(len(again))] == [both.names[i] for i in range(len(both))]
    assert again.smiles is not None
    assert (again[0].smiles, again.largest) == (both[0].smiles, 6)
    assert len(open_structures("packed", tmp_path / "both.safetensors")) == len(both)
    with pytest.raises(UserError, match="is one part; name another file for the held-out structures"):
        open_structures("packed", tmp_path / "both.safetensors", "test")
    content = bytearray((tmp_path / "both.safetensors").read_bytes())
    content[-20] ^= 1
    (tmp_path / "both.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        load(tmp_path / "both.safetensors")
    (tmp_path / "both.safetensors").write_bytes(content[:50])
    with pytest.raises(UserError, match="write it again with python -m"):
        load(tmp_path / "both.safetensors")


def distances(batch, row: int) -> np.ndarray:
    """Of all pairs of a sample's atoms; in a crystal to the nearest image, as pymatgen has it."""
    n = int(batch.sizes[row])
    if batch.lattice[row].any():
        cell = Lattice(batch.lattice[row].double().numpy())
        fractional = batch.fractional[row, :n].double().numpy()
        again = cell.get_fractional_coords(batch.positions[row, :n].double().numpy())
        assert np.abs((again - fractional + 0.5) % 1 - 0.5).max() < 1e-5
        return cell.get_all_distances(fractional, fractional)
    return torch.cdist(batch.positions[row, :n], batch.positions[row, :n]).numpy()


def test_poses_change_no_distance_and_no_hand():
    structures = rattled(9)
    batch = structures.gather(torch.arange(len(structures)), 10)
    uniforms = philox.uniform(3, 1 << 20, torch.arange(len(structures)), (augment.LANES,))
    moved = augment.posed(batch, uniforms)
    for row in range(len(structures)):
        n = int(batch.sizes[row])
        assert np.allclose(distances(moved, row), distances(batch, row), atol=1e-4)
        assert not moved.positions[row, n:].any()
        assert not moved.fractional[row, n:].any()
        if batch.lattice[row].any():
            assert torch.linalg.det(moved.lattice[row]) == pytest.approx(
                float(torch.linalg.det(batch.lattice[row])), 1e-5
            )
            step = (moved.fractional[row, :n] - batch.fractional[row, :n]) % 1
            assert np.allclose((step - uniforms[row, 3:] + 0.5) % 1, 0.5, atol=1e-6)
            assert moved.fractional.max() < 1
        else:
            a, b = batch.positions[row, :3], moved.positions[row, :3]
            fourth = 3 if n > 3 else 0
            hand = [
                torch.linalg.det(x[:, :3] - p[row, fourth]) for x, p in ((a, batch.positions), (b, moved.positions))
            ]
            assert hand[1] == pytest.approx(float(hand[0]), abs=1e-4)
            assert not torch.allclose(a, b, atol=0.1)
            assert moved.positions[row].mean(0).abs().max() < 1e-6
    alone = structures.gather(torch.tensor([4]), 10)
    same = augment.posed(alone, philox.uniform(3, 1 << 20, torch.tensor([4]), (augment.LANES,)))
    assert torch.equal(same.positions[0], moved.positions[4])  # whatever else is in the batch


def test_rotations_are_uniform():
    """Haar's measure: means of matrices and of their products vanish, angles have the density (1 - cos) / pi."""
    matrices = augment.rotations(philox.uniform(0, 1 << 20, torch.arange(20_000), (3,))).double()
    assert torch.allclose(matrices @ matrices.transpose(1, 2), torch.eye(3).double().expand_as(matrices), atol=1e-5)
    assert torch.allclose(torch.linalg.det(matrices), torch.ones(()).double(), atol=1e-5)
    assert matrices.mean(0).abs().max() < 0.02
    second = torch.einsum("nij,nkl->ijkl", matrices, matrices) / len(matrices)
    expected = torch.einsum("ik,jl->ijkl", torch.eye(3), torch.eye(3)).double() / 3
    assert (second - expected).abs().max() < 0.02
    angles = torch.arccos(((matrices.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2).clamp(-1, 1))
    for angle in (0.5, 1.0, 2.0, 2.8):
        share = float((angles < angle).double().mean())
        assert share == pytest.approx((angle - np.sin(angle)) / np.pi, abs=0.01)
