"""Inputs of which a part, a label or a number would be taken for something else: said, before more is made of it."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import shutil
import tarfile
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import TINY, command

from unite_fast.base import files
from unite_fast.base.errors import UserError
from unite_fast.config import DataConfig, ModelConfig, yaml_text
from unite_fast.data import open_source, verify
from unite_fast.data.atoms.files import read_path
from unite_fast.data.containers import open_container
from unite_fast.data.listing import files_of
from unite_fast.data.source import numbered
from unite_fast.data.tar import write_index
from unite_fast.evaluation import statistics
from unite_fast.evaluation.results import beside_other_commits, is_result_of

MODEL = ModelConfig(image_size=8, patch_size=2, channels=1, num_classes=2)


def png(gray: int, mode: str = "L") -> bytes:
    content = io.BytesIO()
    dtype = np.uint16 if mode == "I;16" else np.uint8
    Image.fromarray(np.full((8, 8, 3) if mode == "RGB" else (8, 8), gray, dtype)).save(content, "PNG")
    return content.getvalue()


def tar(path: Path, labels: list[int]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number, label in enumerate(labels):
            for suffix, content in (("png", png(number)), ("cls", str(label).encode())):
                info = tarfile.TarInfo(f"{path.stem}_{number}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    write_index(path)
    return path


def of_tars(path: object) -> int:
    return len(open_source(DataConfig(source="tar", path=str(path), workers=0, flip=False), MODEL))


# --- splits --------------------------------------------------------------------------------------------------------


def test_splits_in_one_folder_are_not_mixed(tmp_path):
    for number in range(3):
        tar(tmp_path / "t" / f"train-{number:03d}.tar", [0, 1])
    tar(tmp_path / "t" / "validation-000.tar", [0])
    with pytest.raises(UserError, match=r"files of several splits \(train, val\).*those of one, such as '.*/val\*"):
        of_tars(tmp_path / "t")
    assert of_tars(tmp_path / "t" / "train-*.tar") == 6
    assert of_tars(tmp_path / "t" / "train-{000..001}.tar") == 4
    assert of_tars(tmp_path / "t" / "train-00[02].tar") == 4
    assert of_tars(tmp_path / "t" / "{train-001,train-002}.tar") == 4
    with pytest.raises(UserError, match=r"train-003\.tar is not there"):
        of_tars(tmp_path / "t" / "train-{000..003}.tar")
    with pytest.raises(UserError, match="no such file or folder"):
        of_tars(tmp_path / "t" / "other-*.tar")
    with pytest.raises(UserError, match="several splits"):
        of_tars(tmp_path / "t" / "*.tar")
    shutil.copytree(tmp_path / "t", tmp_path / "odd[1]{2}")
    assert of_tars(tmp_path / "odd[1]{2}" / "train-00[02].tar") == 4  # signs in the names of folders are none
    (tmp_path / "t" / "latest.tar").symlink_to("train-000.tar")
    with pytest.raises(UserError, match=r"latest.tar and .*train-000.tar are one file, whose content would count"):
        files_of(tmp_path / "t" / "{latest,train-000}.tar", ".tar")


@pytest.mark.parametrize("names", [("mnist_train", "mnist_test"), ("Train", "EVAL"), ("data.train.0", "data.t10k.0"),
                                   ("x-train-1", "x-hold-out-1"), ("dataTrain", "dataTest"), ("0-train", "0-unlabeled"),
                                   ("train/0", "test/0")])  # fmt: skip
def test_the_advice_on_several_splits_selects_one(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="several splits") as error:
        files_of(tmp_path / "*" if "/" not in names[0] else tmp_path / "*" / "*", ".parquet")
    advice = Path(str(error.value).rpartition("such as ")[2].strip("'"))
    assert len(files_of(advice, ".parquet")) == 1


def test_folders_of_several_splits_are_no_classes(tmp_path):
    """Nor are they mixed without classes, or within one: a set as it was fetched, named one folder too high."""
    for name in ("train", "Validation"):
        for label in ("a", "b"):
            (tmp_path / "s" / name / label).mkdir(parents=True)
            (tmp_path / "s" / name / label / "0.png").write_bytes(png(1))
    for name in ("train", "bus"):  # a class of its own beside others
        (tmp_path / "t" / name).mkdir(parents=True)
        (tmp_path / "t" / name / "0.png").write_bytes(png(1))
    for root, classes in ((tmp_path / "s", 2), (tmp_path / "s", 0), (tmp_path, 2)):
        with pytest.raises(
            UserError, match=r"holds folders of several splits \(train, val\); name one of them, such as"
        ):
            open_container(root, "data.path", DataConfig(), dataclasses.replace(MODEL, num_classes=classes))
    assert len(open_container(tmp_path / "t", "data.path", DataConfig(), MODEL)) == 2
    assert len(open_container(tmp_path / "s" / "train", "data.path", DataConfig(), MODEL)) == 2


def test_splits_of_structures(tmp_path):
    pytest.importorskip("ase")
    for name in ("train", "test/0"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.xyz").write_text("3\n\nO 0 0 0\nH 0.76 0.59 0\nH -0.76 0.59 0\n")
    with pytest.raises(UserError, match=r"files of several splits \(test, train\)"):
        read_path(tmp_path, 9, 1)
    assert len(read_path(tmp_path / "tr*.xyz", 9, 1).structures) == 1
    assert len(read_path(tmp_path / "{train,train}.xyz", 9, 1).structures) == 1
    with pytest.raises(UserError, match=r"one\.xyz is not there"):
        read_path(tmp_path / "{train,one}.xyz", 9, 1)


@pytest.mark.parametrize("names", [("constrained-0", "tests_a"), ("a_train", "b_train"), ("trainer-1", "value-2")])
def test_names_that_are_no_splits(tmp_path, names):
    for name in names:
        (tmp_path / f"{name}.parquet").write_bytes(b"")
    assert len(files_of(tmp_path, ".parquet")) == 2


def test_splits_of_parquet(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        (tmp_path / f"{name}.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"several splits \(test, train\)"):
        open_container(tmp_path, "SOURCE", DataConfig(), MODEL)
    assert len(files_of(tmp_path / "train-*.parquet", ".parquet")) == 2


# --- labels and sizes ----------------------------------------------------------------------------------------------


def test_a_label_makes_no_list_of_its_size(tmp_path):
    tar(tmp_path / "t" / "a.tar", [0, (1 << 31) - 1])
    began = time.process_time()
    with pytest.raises(UserError, match="label 2147483647 is no class number"):
        of_tars(tmp_path / "t")
    with pytest.raises(UserError, match="label 1099511627776 is no class number"):
        numbered(1 << 40, "x")
    assert time.process_time() - began < 1
    assert numbered(2, "x") == ["0", "1", "2"]


@pytest.mark.parametrize("kind", ["dictionary", "compressed", "labels", "good"])
def test_a_small_parquet_does_not_unfold(tmp_path, monkeypatch, kind):
    """Its compression or its dictionaries would make 52 KB gigabytes; a path as long is never read."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    monkeypatch.setattr(files, "MARGIN", 1 << 19)
    n, noise = 200, np.random.default_rng(0).bytes(1 << 16)
    value = {"compressed": bytes(1 << 16), "dictionary": noise}.get(kind, png(1, "RGB"))
    contents = pa.array([value]).take(pa.array([0] * n))
    paths = pa.array(["x" * (1 << 16)]).take(pa.array([0] * n))
    labels = [0] * n
    if kind == "labels":
        contents, paths, labels = pa.nulls(1 << 18, pa.binary()), pa.nulls(1 << 18, pa.string()), [0] * (1 << 18)
    table = pa.table({"image": pa.StructArray.from_arrays([contents, paths], ["bytes", "path"]), "label": labels})
    how = {"compression": "zstd", "use_dictionary": kind != "compressed", "dictionary_pagesize_limit": 1 << 30}
    parquet.write_table(table, tmp_path / "a.parquet", **how)
    model = ModelConfig(image_size=8, patch_size=2, channels=3, num_classes=2)
    if kind == "good":
        assert open_container(tmp_path, "SOURCE", DataConfig(), model).load(n - 1).shape == (3, 8, 8)
    else:
        with pytest.raises(UserError, match=r"labels unfold to more than|row group 0 unfolds to"):
            open_container(tmp_path, "SOURCE", DataConfig(), model).load(0)


@pytest.mark.parametrize(
    ("labels", "words"), [([0, None], "1 of its 2 rows have no label"), ([0.5, 1.0], "classes are integers or texts")]
)
def test_labels_of_parquet_that_are_none(tmp_path, labels, words):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = pa.array([{"bytes": png(1), "path": ""}] * 2, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    parquet.write_table(pa.table({"image": images, "label": labels}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=words):
        open_container(tmp_path, "SOURCE", DataConfig(), MODEL)


def test_a_depth_of_no_network():
    for part in ("encoder", "decoder"):
        with pytest.raises(UserError, match=rf"model\.{part}\.depth must be above 0 and at most 1024"):
            yaml_text.load(None, [f"model.{part}.depth=100000"])


# --- images --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ("a", "b"):
        (tmp_path / "f" / name).mkdir(parents=True)
        (tmp_path / "f" / name / "0.png").write_bytes(png(100))
    return tmp_path / "f"


def opened(folder: Path, **more: object):
    return open_source(DataConfig(path=str(folder), workers=0, flip=False, **more), MODEL)  # type: ignore[arg-type]


def test_gray_of_16_bits_is_not_clipped(folder):
    (folder / "a" / "0.png").write_bytes(png(127 * 257, "I;16"))
    with pytest.raises(UserError, match=r"a/0\.png: gray of 16 bits, which 8 would clip; save it with 8"):
        opened(folder).load(0)
    (folder / "a" / "0.png").write_bytes(png(127, "I;16"))
    assert int(opened(folder).load(0).float().mean()) == 127


def test_images_of_kinds_that_are_not_read_are_counted(folder, caplog):
    for name in ("a/1.bmp", "a/2.BMP", "b/1.tif"):
        (folder / name).write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        assert len(opened(folder)) == 2
    assert caplog.messages == [
        f"data.path {folder}: 2 .bmp, 1 .tif are left out; only .jpg, .jpeg, .png, .webp are read"
    ]


@pytest.mark.parametrize("link", ["c", "b/more"])
def test_a_folder_reached_twice_is_refused(folder, link):
    """Its images would have two labels, or count twice."""
    (folder / link).symlink_to(folder / "a")
    with pytest.raises(UserError, match=r"f/a and .*f/(c|b/more) are one folder, whose files would count twice"):
        open_source(DataConfig(path=str(folder), workers=0), dataclasses.replace(MODEL, num_classes=3 - ("/" in link)))


def test_class_folders_that_unicode_writes_in_two_ways(folder):
    composed, apart = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    (folder / "b").rename(folder / composed)
    (folder / "a").rename(folder / apart)
    with pytest.raises(UserError, match="two class folders are called 'é'"):
        opened(folder)
    (folder / apart).rename(folder / "a")
    other = shutil.copytree(folder, folder.parent / "heldout")
    (other / composed).rename(other / apart)
    reading = DataConfig(path=str(folder), heldout_path=str(other), workers=0, flip=False)
    assert len(open_source(reading, MODEL, "heldout")) == 2
    names = [open_source(reading, MODEL, "heldout").identity()["class names"], opened(folder).identity()["class names"]]
    assert names == [["a", composed]] * 2


def test_a_tab_in_a_class_name_stays_in_its_field():
    assert verify._shown("a\tb\nc") == "a\\tb\\nc"


# --- references ----------------------------------------------------------------------------------------------------


def reference(path: Path, **changes: object) -> str:
    arrays = {"mu": np.zeros(4), "sigma": np.eye(4), "count": 100} | changes
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return str(path)


WRONG = {
    "not symmetric": ({"sigma": np.eye(4) + np.eye(4, k=1)}, "sigma is not symmetric"),
    "negative": ({"sigma": -np.eye(4)}, "the eigenvalue -1, so it is no covariance"),
    "protocol is text": ({"protocol": np.array('"a string"')}, "does not say with which extractor"),
    "protocol is a list": ({"protocol": np.array("[1]")}, "does not say with which extractor"),
    "extractor is text": ({"protocol": np.array('{"extractor": "x"}')}, "does not say with which extractor"),
    "extractor without a hash": ({"protocol": np.array('{"extractor": {}}')}, "does not say with which extractor"),
    "protocol is no JSON": ({"protocol": np.array("{")}, "not a readable .npz"),
    "count is text": ({"count": np.array("many")}, "not a readable .npz"),
    "mu is text": ({"mu": np.array(["a"] * 4)}, "not a readable .npz"),
    "sizes": ({"mu": np.zeros(3)}, "expected"),
    "complex": ({"sigma": np.eye(4) * 1j}, "sigma holds complex128, not numbers"),
    "times": ({"mu": np.zeros(4, "M8[s]")}, r"mu holds datetime64\[s\], not numbers"),
    "negative count": ({"count": np.array(-1)}, "count is -1"),
    "overflow": ({"mu": np.full(4, 1e200)}, "no features are so large"),
    "hash is a number": ({"protocol": np.array('{"extractor": {"sha256": 1, "name": 2}}')}, "with which extractor"),
}


@pytest.mark.parametrize("case", WRONG)
def test_references_that_are_none(tmp_path, case):
    changes, says = WRONG[case]
    with pytest.raises(UserError, match=f"^reference statistics .*{says}"):
        statistics.read(reference(tmp_path / "r.npz", **changes))


def test_a_small_reference_does_not_unfold(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MARGIN", 1 << 19)
    np.savez_compressed(tmp_path / "r.npz", mu=np.zeros(4), sigma=np.zeros((512, 512)))
    with pytest.raises(UserError, match=r"it unfolds to \d+ bytes"):
        statistics.read(str(tmp_path / "r.npz"))


def test_an_array_that_no_memory_holds(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (1 << 30, 1 << 20)})
    import zipfile

    with zipfile.ZipFile(tmp_path / "r.npz", "w") as archive:
        archive.writestr("mu.npy", header.getvalue())
        archive.writestr("sigma.npy", header.getvalue())
    with pytest.raises(UserError, match=r"not a readable \.npz"):
        statistics.read(str(tmp_path / "r.npz"))


def test_rounding_makes_no_reference_wrong(tmp_path):
    x = np.random.default_rng(0).normal(size=(10, 64)).astype(np.float32)
    sigma = np.cov(x.T).astype(np.float32)  # of rank 9: eigenvalues of about -1e-7
    statistics.read(reference(tmp_path / "r.npz", mu=np.zeros(64), sigma=sigma))
    statistics.read(reference(tmp_path / "z.npz", mu=np.zeros(4), sigma=np.zeros((4, 4))))


# --- runs and scores -----------------------------------------------------------------------------------------------


def test_a_run_goes_on_when_its_first_weights_are_gone(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)

    def start(name: str, steps: int, *words: str):
        return command("train.py", "--config", tmp_path / "tiny.yaml", f"run_dir={tmp_path / name}",
                       f"train.max_steps={steps}", *words)  # fmt: skip

    assert start("first", 1).returncode == 0
    begun = f"init_from={tmp_path / 'first'}"
    assert start("second", 1, begun).returncode == 0
    shutil.rmtree(tmp_path / "first")
    said = start("second", 2, begun)
    assert said.returncode == 0, said.stderr
    assert "at step 1: the newest that verifies" in said.stdout
    for manifest in (tmp_path / "second" / "checkpoints").glob("*/manifest.json"):
        manifest.unlink()
    said = start("second", 3, begun)
    assert said.returncode == 2
    assert "none of the checkpoints" in said.stderr
    assert "choose another name or run_dir" in said.stderr


def test_a_result_is_replaced_by_its_own_command_alone(tmp_path):
    """A finished table takes hours, and any other command might be given its name."""
    contents = {
        "fid": {"result": {}, "protocol": {"reference": {}, "extractor": {}}}, "table": {"rows": []},
        "rfid": {"result": {}, "protocol": {"data": {}, "extractor": {"name": "digits"}}},
        "heldout": {"result": {}, "protocol": {"data": {}, "extractor": None}}, "search": {"rows": [], "best": {}},
        "small": {"result": {}, "protocol": {"classifier": {}, "data": "folder"}},
        "atoms": {"result": {}, "protocol": {"heldout": ""}}, "": {"result": {}}, "none": [],
        "training": {"kind": "rfid", "result": {}, "protocol": {"data": {}}},
    }  # fmt: skip
    names = ("fid", "rfid", "heldout", "table", "search", "small", "atoms")
    for command_of_it, content in contents.items():
        (tmp_path / "r.json").write_text(json.dumps(content))
        for name in names:
            assert is_result_of(name)(tmp_path / "r.json") == (name == command_of_it)
    for said in names:
        (tmp_path / "r.json").write_text(json.dumps({"command": said, "result": {}, "protocol": {"data": {}}}))
        assert [name for name in names if is_result_of(name)(tmp_path / "r.json")] == [said]


def test_a_score_of_another_commit_stays(tmp_path):
    path = tmp_path / "fid_a.json"
    here = {"commit": "0123456789abcdef"}
    assert beside_other_commits(path, here) == path
    path.write_text(json.dumps({"protocol": {"environment": here}, "result": {}}))
    assert beside_other_commits(path, here) == path
    for content in ({"protocol": {"environment": {"commit": "f"}}}, {"best": {"environment": {"commit": "f"}}},
                    {"rows": [{"protocol": {"environment": {"commit": "f"}}}]}):  # fmt: skip
        path.write_text(json.dumps(content))
        assert beside_other_commits(path, here) == tmp_path / "fid_a_at_01234567.json"
