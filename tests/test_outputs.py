"""No command writes over what it reads, over what is not its own, or finds out after its work that it cannot write."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import command_of, tiny_run

import sample
import train
from unite_fast import analyse, evaluate, export, report, sweep
from unite_fast.base import outputs
from unite_fast.base.errors import UserError
from unite_fast.data import pack
from unite_fast.data.atoms import __main__ as atoms
from unite_fast.evaluation import small, statistics
from unite_fast.evaluation.atoms import __main__ as score_atoms
from unite_fast.report import gallery

WATER = "3\n\nO 0 0 0\nH 0.76 0.59 0\nH -0.76 0.59 0\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A run of two steps, a folder of images, a file of atoms, a file of somebody else's, an npz of statistics."""
    place = tiny_run(tmp_path_factory.mktemp("outputs"), "train.max_steps=2")
    for i in range(10):
        (place / "photos" / str(i)).mkdir(parents=True)
        Image.new("L", (8, 8), 20 * i).save(place / "photos" / str(i) / "a.png")
    (place / "atoms.xyz").write_text(WATER)
    (place / "notes").write_text("mine")
    (place / "others").mkdir()
    (place / "others" / "thesis.txt").write_text("mine")
    (place / "mine.jsonl").write_text("mine")
    Image.new("L", (8, 8)).save(place / "mine.png")
    (place / "sweep.yaml").write_text("config: tiny.yaml\nout: others\nruns: {a: []}\n")
    (place / "in_itself.yaml").write_text("config: tiny.yaml\nout: in_itself.yaml\nruns: {a: []}\n")
    np.savez(place / "reference.npz", mu=np.zeros(64), sigma=np.eye(64))
    return place


def state(place: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(place.rglob("*")) if p.is_file()}


SAMPLE = (sample.main, "--checkpoint", "run", "--seeds", "0-3", "--out")
RECONSTRUCT = (sample.main, "--checkpoint", "run", "--reconstruct", "photos", "--out")
RFID = (evaluate.main, "rfid", "--checkpoint", "run", "--extractor", "digits", "--out")
FID = (evaluate.main, "fid", "--checkpoint", "run", "--extractor", "digits", "--reference", "reference.npz", "--out")
SEARCH, TABLE = (evaluate.main, "search", *FID[2:]), (evaluate.main, "table", *FID[2:])
HELDOUT = (evaluate.main, "heldout", "--checkpoint", "run", "--out")
STATISTICS = (statistics.main, "--config", "tiny.yaml", "--extractor", "digits", "--out")
OF_FOLDER = (statistics.main, "--config", "tiny.yaml", "data.source=folder", "data.path=photos", "--extractor",
             "inception", "--out")  # fmt: skip
EXPORT = (export.main, "run", "--out")
REPORT = (report.main, "run", "--out")
PACK = (pack.main, "photos", "--size", "8", "--workers", "0")
ATOMS = (atoms.main, "files", "atoms.xyz", "--out")
SCORES = (score_atoms.main, "atoms.xyz", "--out")
ANALYSE = (analyse.main, "run", "--only", "entropy", "--out")
GALLERY = (gallery.main, "between-images", "run", "photos/0/a.png", "photos/1/a.png", "--out")
SWEEP = (sweep.main, "--slurm", "array.sh")
SMALL = (small.main, "run", "--classifier", "c.safetensors", "--out")
TRAIN = (train.main, "--config", "tiny.yaml", "data.source=folder", "data.path=photos")

IN_SOURCE = [
    (*SAMPLE, "run/checkpoints/a.npz"), (*SAMPLE, "run/checkpoints/step-0000002/images"),
    (*RECONSTRUCT, "photos"), (*RECONSTRUCT, "photos/out"), (*RECONSTRUCT, "out/../photos/0"), (*RECONSTRUCT, "link"),
    (*RFID, "run/checkpoints/r.json"), (*FID, "run/checkpoints/f.json"),
    *((*words, "run/checkpoints/r.json") for words in (TABLE, SEARCH, HELDOUT)),
    (*GALLERY, "photos/0/a.png"), (*GALLERY, "run/checkpoints/g.png"), (*SWEEP, "in_itself.yaml"),
    (*OF_FOLDER, "photos/0/s.npz"),
    (*EXPORT, "run/checkpoints/step-0000002"), (*EXPORT, "run/checkpoints/e"),
    (*REPORT, "run/samples/r.html"), (*REPORT, "run/checkpoints/r.html"),
    (*PACK, "photos"), (*PACK, "photos/packed"),
    (*ATOMS, "atoms.xyz"), (*SCORES, "atoms.xyz"),
    (*ANALYSE, "run/checkpoints"), (*ANALYSE, "run/checkpoints/a"), (*SMALL, "run/checkpoints/s.json"),
    (*TRAIN, "run_dir=photos"), (*TRAIN, "run_dir=photos/run"),
]  # fmt: skip
FOREIGN = [
    (*SAMPLE, "others"), (*SAMPLE, "notes"), (*RECONSTRUCT, "others"), (*RECONSTRUCT, "notes"),
    *((*words, "tiny.json") for words in (TABLE, SEARCH, HELDOUT)), (*SEARCH, "mine.json"),
    (*GALLERY, "mine.png"), (*SWEEP, "sweep.yaml"),
    (*RFID, "tiny.json"), (*STATISTICS, "notes"), (*STATISTICS, "reference.npz"),
    (*EXPORT, "others"), (*EXPORT, "others", "--overwrite"), (*EXPORT, "run"), (*EXPORT, "notes"),
    (*REPORT, "notes"), (*PACK, "others"), (*PACK, "notes"), (*ATOMS, "notes"), (*SCORES, "notes"),
    (*ANALYSE, "others"), (*ANALYSE, "notes"), (*SMALL, "notes"), (*SMALL, "tiny.json"),
]  # fmt: skip
WRONG_KIND = [
    (*SAMPLE, "others/folder.npz"), (*RECONSTRUCT, "rec.png"), (*RFID, "others"), (*RFID, "others/folder.json"),
    (*SEARCH, "rows.jsonl"), (*GALLERY, "others"), (*GALLERY, "g.jpg"),
    (*STATISTICS, "others"), (*EXPORT, "e.safetensors"), (*REPORT, "others"),
    (*ATOMS, "others"), (*SCORES, "others"), (*ANALYSE, "a.json"), (*SMALL, "others"),
]  # fmt: skip
UNWRITABLE = [
    (*words, f"notes/below/x{suffix}")
    for words, suffix in (
        (SAMPLE, ""), (SAMPLE, ".npz"), (RECONSTRUCT, ""), (RFID, ".json"), (STATISTICS, ".npz"), (EXPORT, ""),
        (REPORT, ".html"), (PACK, ""), (ATOMS, ".safetensors"), (SCORES, ".json"),
        (ANALYSE, ""), (SMALL, ".json"), (TABLE, ".json"), (SEARCH, ".json"), (HELDOUT, ".json"), (GALLERY, ".png"),
    )
]  # fmt: skip
UNWRITABLE += [(*TRAIN, "run_dir=notes/run")]


@pytest.mark.parametrize(
    "words", [*IN_SOURCE, *FOREIGN, *WRONG_KIND, *UNWRITABLE],
    ids=lambda words: " ".join([words[0].__module__, *words[1:]])[-70:],
)  # fmt: skip
def test_a_place_that_is_not_for_it_is_refused_before_the_work(place, monkeypatch, words):
    monkeypatch.chdir(place)
    if not os.path.lexists("link"):
        os.symlink("photos", "link")
    (place / "others" / "folder.npz").mkdir(exist_ok=True)
    (place / "others" / "folder.json").mkdir(exist_ok=True)
    (place / "tiny.json").write_text('{"encoder": {}}')
    before = state(place)
    for module in (sample, evaluate, statistics):  # the work would begin with these
        monkeypatch.setattr(module.precision, "autocast", None)
    monkeypatch.setattr(statistics, "of_source", None)
    said = command_of(*words)
    assert said.returncode == 2, said
    lines = said.stderr.strip().splitlines()
    assert len(lines) == 1, said.stderr
    assert lines[0].startswith("error: ")
    assert state(place) == before
    assert said.stdout.count("\n") <= 1


def test_reconstructions_go_to_a_folder_of_any_name_and_once_more(place, monkeypatch):
    monkeypatch.chdir(place)
    for _ in range(2):
        said = command_of(*RECONSTRUCT, "rec_w1.5")
        assert said.returncode == 0, said.stderr
    assert len(list((place / "rec_w1.5").rglob("*.png"))) == 10
    said = command_of(*RECONSTRUCT, "rec_w1.5", "--weights", "model")
    assert said.returncode == 2
    assert "another checkpoint or other options; choose another --out, or remove it" in said.stderr


def test_an_export_is_replaced_when_that_is_asked_for(place, monkeypatch):
    monkeypatch.chdir(place)
    assert command_of(*EXPORT, "exported").returncode == 0
    (place / "exported" / "README.md").write_text("with my words")
    said = command_of(*EXPORT, "exported")
    assert said.returncode == 2
    assert "--overwrite" in said.stderr
    assert (place / "exported" / "README.md").read_text() == "with my words"
    assert command_of(*EXPORT, "exported", "--overwrite").returncode == 0
    assert "written by unite-fast" in (place / "exported" / "README.md").read_text()


def test_what_a_command_made_it_makes_again(place, monkeypatch):
    monkeypatch.chdir(place)
    for words in ((*REPORT, "page.html"), (*GALLERY, "g.png"), (*STATISTICS, "digits.npz"), (*ATOMS, "a.safetensors")):
        for _ in range(2):
            said = command_of(*words)
            assert said.returncode == 0, said.stderr


def test_a_pipe_is_no_place(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="a device, a pipe or a socket"):
        outputs.check_file(tmp_path / "pipe", "--out")
    assert (tmp_path / "pipe").is_fifo()


def test_hard_links_are_the_same_file(tmp_path):
    (tmp_path / "a").write_text("x")
    os.link(tmp_path / "a", tmp_path / "b")
    with pytest.raises(UserError, match="which is read"):
        outputs.check_file(tmp_path / "b", "--out", [tmp_path / "a"], lambda path: True)


def test_a_disk_that_refused_the_first_plan_does_not_refuse_the_second(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    (tmp_path / "p" / ".parts").mkdir(parents=True)
    assert command_of(*PACK, tmp_path / "p").returncode == 0
