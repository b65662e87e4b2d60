"""Files of molecules and crystals: what is bad is one line and counted, what is good comes back; the command."""

from __future__ import annotations

import importlib.metadata
import os
import sys

import numpy as np
import pytest
import torch
from test_atoms_data import METHANOL, WATER, Chem, Crystal, Lattice, StructureMatcher, pymatgen_crystals, write_gdb9

from unite_fast.base.errors import UserError
from unite_fast.config import DataConfig, ModelConfig
from unite_fast.data import open_source
from unite_fast.data.atoms import (
    crystals,
    describe,
    join,
    open_structures,
    pack,
    qm9,
)
from unite_fast.data.atoms.__main__ import main
from unite_fast.data.atoms.structures import load
from unite_fast.data.atoms.writers import check, write

GOOD_XYZ = "3\nwater\nO 0 0 0.119\nH 0 0.763 -0.477\nH 0 -0.763 -0.477\n"


CIF = Crystal(Lattice.cubic(2.87), ["Fe"], [[0, 0, 0]]).to(fmt="cif")


BAD = {
    "unknown element": ("a.xyz", GOOD_XYZ.replace("O 0", "Xx 0"), "unknown element: 'Xx'"),
    "overlap": ("a.xyz", GOOD_XYZ.replace("0.763", "0.01"), "overlapping atoms: atoms 2 and 3 are 0.02 Å apart"),
    "not a number": ("a.xyz", GOOD_XYZ.replace("0.119", "nan"), "not a number: a coordinate or a cell"),
    "infinite": ("a.xyz", GOOD_XYZ.replace("0.119", "inf"), "not a number: a coordinate or a cell"),
    "a word": ("a.xyz", GOOD_XYZ.replace("0.119", "up"), "broken XYZ: "),
    "too many": ("a.xyz", "9\n\n" + "".join(f"C {1.5 * k} 0 0\n" for k in range(9)), "too many atoms: 9, and the"),
    "truncated": ("a.xyz", GOOD_XYZ.replace("3\n", "7\n"), "broken XYZ: line 1 begins no complete frame"),
    "no count": ("a.xyz", "water\n" + GOOD_XYZ, "broken XYZ: line 1 begins no complete frame"),
    "empty molecule": ("a.xyz", "0\n\n", "no atoms: the structure is empty|broken XYZ"),
    "slab": (
        "a.extxyz",
        GOOD_XYZ.replace("water", 'Lattice="9 0 0 0 9 0 0 0 9" pbc="T T F" Properties=species:S:1:pos:R:3'),
        "not periodic in three directions",
    ),
    "flat cell": (
        "a.cif", CIF.replace("_cell_angle_gamma   90.0", "_cell_angle_gamma   0.0001"),
        "broken CIF: |no reduced cell|flat"),
    "disordered": ("a.cif", CIF[:CIF.rindex("1")] + "0.5\n",
                   "disordered: site 1 holds Fe:0.5"),
    "broken cif": ("a.cif", CIF[: len(CIF) // 2], "broken CIF: "),
    "text": ("a.cif", "this is no CIF", "broken CIF: "),
    "broken sdf": ("a.sdf", "x\n\n\n  9  9  0\nnothing\n$$$$\n", "broken SDF: the record cannot be read"),
    "unreadable sdf": ("a.sdf", "garbage\n$$$$\n", "broken SDF: the record cannot be read"),
}  # fmt: skip


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.xyz")
    with pytest.raises(UserError, match=r"a\.xyz.*not a regular file"):
        open_structures("files", tmp_path, "all", largest=8)


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_structure_is_one_line_and_is_counted(kind, tmp_path, caplog):
    name, content, expected = BAD[kind]
    (tmp_path / name).write_text(content)
    (tmp_path / "good.xyz").write_text(GOOD_XYZ * 3)
    with pytest.raises(UserError, match=expected) as error:
        open_structures("files", tmp_path, "all", largest=8)
    text = str(error.value)
    assert "1 of 4 structures cannot be used (1 " in text
    assert "set data.on_error=skip" in text
    assert str(tmp_path / name) in text
    assert "\n" not in text
    left = open_structures("files", tmp_path, "all", largest=8, on_error="skip")
    assert len(left) == 3
    lines = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(lines) == 1
    assert str(tmp_path / name) in lines[0]
    (tmp_path / "good.xyz").unlink()
    with pytest.raises(UserError, match="nothing is left"):
        open_structures("files", tmp_path, "all", largest=8, on_error="skip")


@pytest.mark.parametrize(
    ("factor", "unit"), [(1 / 0.529177, "bohr"), (0.1, "nm"), (100.0, "pm"), (3.7, "must be in Å")]
)
def test_the_wrong_unit_is_named(factor, unit, tmp_path):
    wrong = pack([one._replace(coordinates=one.coordinates * factor) for one in (METHANOL, WATER, METHANOL)])
    write(tmp_path / "a.xyz", [wrong[i] for i in range(3)])
    with pytest.raises(UserError, match=unit):
        open_structures("files", tmp_path, "all", on_error="skip")


def test_folders_that_hold_nothing(tmp_path):
    with pytest.raises(UserError, match=r"holds no .xyz, .extxyz, .sdf, .cif files"):
        open_structures("files", tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        open_structures("files", tmp_path / "absent")
    with pytest.raises(UserError, match=r"data.path is empty; data.source=mp20 needs a folder"):
        open_structures("mp20")
    with pytest.raises(UserError, match="source 'zinc' is not known; one of qm9, mp20"):
        open_structures("zinc")
    (tmp_path / "a.xyz").write_text(GOOD_XYZ)
    with pytest.raises(UserError, match="nothing is left of its part test"):
        open_structures("files", tmp_path, "test")


@pytest.mark.parametrize("suffix", [".sdf", ".xyz", ".extxyz"])
def test_molecules_come_back_from_files(suffix, tmp_path):
    molecules = pack([METHANOL, WATER])
    assert write(tmp_path / f"a{suffix}", [molecules[0], molecules[1]]) == 2
    found = open_structures("files", tmp_path / f"a{suffix}", "all")
    assert torch.equal(found.species, molecules.species)
    assert (found.coordinates - molecules.coordinates).abs().max() < (1e-4 if suffix == ".sdf" else 1e-6)
    if suffix == ".sdf":
        read = [Chem.MolToSmiles(m) for m in Chem.SDMolSupplier(str(tmp_path / "a.sdf"))]
        assert read == ["CO", "O"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"a{suffix}"]


def test_a_molecule_without_valences_is_written_without_bonds(tmp_path):
    odd = METHANOL._replace(species=np.array([6, 8, 1, 1, 1, 6]))
    write(tmp_path / "a.sdf", [odd])
    molecule = next(iter(Chem.SDMolSupplier(str(tmp_path / "a.sdf"), sanitize=False, removeHs=False)))
    assert (molecule.GetNumAtoms(), molecule.GetNumBonds()) == (6, 0)


@pytest.mark.parametrize("name", ["a.extxyz", "folder"])
def test_crystals_come_back_from_files(name, tmp_path):
    listed = [crystals.of_pymatgen(structure, "x") for structure in pymatgen_crystals()]
    assert write(tmp_path / name, listed) == 4
    found = open_structures("files", tmp_path / name, "all")
    for k, structure in enumerate(listed):
        assert StructureMatcher().fit(crystals.to_pymatgen(structure), crystals.to_pymatgen(found[k]))
    # Again: the folder is replaced.
    assert write(tmp_path / name, listed[:1]) == 1
    assert len(open_structures("files", tmp_path / name, "all")) == 1


def test_a_format_that_cannot_hold_a_structure_is_refused(tmp_path):
    salt = crystals.of_pymatgen(pymatgen_crystals()[0], "salt")
    with pytest.raises(UserError, match=r".xyz has no cell; write crystals to .extxyz or to a folder of .cif"):
        write(tmp_path / "a.xyz", [salt])
    with pytest.raises(UserError, match=r"a folder of .cif is for crystals"):
        write(tmp_path / "a", [METHANOL])
    with pytest.raises(UserError, match=r"one of .sdf, .xyz, .extxyz"):
        check(tmp_path / "a.mol2", periodic=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("pymatgen", lambda root: open_structures("crystals")),
        ("ase", lambda root: open_structures("files", root)),
        ("rdkit", lambda root: open_structures("qm9", root, "all")),
    ],
)
def test_a_missing_package_is_one_line(package, call, tmp_path, monkeypatch):
    write_gdb9(tmp_path, pack([WATER]), [])
    for module in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs {package}, which is not installed; pip install {package}"):
        call(tmp_path)


def test_a_missing_data_set_is_one_line(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    qm9.read_package.cache_clear()  # another test may have read it
    with pytest.raises(UserError, match="needs the package qm9pack, which holds the data set"):
        open_structures("qm9")


def test_the_command_packs_and_describes(tmp_path, capsys):
    write(tmp_path / "a.xyz", [WATER] * 5)
    out = tmp_path / "a.safetensors"
    assert main(["files", str(tmp_path / "a.xyz"), "--part", "train", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "4 molecules of 3 to 3 atoms (H 8, O 4)" in said
    assert len(load(out)) == 4
    source, path = (word.partition("=")[2] for word in said.split() if word.startswith("data."))
    reading, model = DataConfig(source=source, path=path), ModelConfig(modality="atoms", num_classes=1, num_latents=5)
    assert len(open_source(reading, model)) == 4  # what it says to use is what a run takes
    assert "5 molecules and 1 crystals" in describe(
        join([pack([WATER] * 5), pack([crystals.of_pymatgen(pymatgen_crystals()[2], "iron")])])
    )
