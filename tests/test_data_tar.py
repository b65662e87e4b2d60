"""Tars in WebDataset's layout: the same images as the folder they were made of, and no trust in what a tar says."""

from __future__ import annotations

import logging
import os
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from photographs import add, check_streams, crop, equal, jpeg, take, write_folder, write_tars
from PIL import Image

from unite_fast.base.errors import UserError
from unite_fast.config import DataConfig, ModelConfig
from unite_fast.data import all_images, open_source
from unite_fast.data import tar as tar_module
from unite_fast.data.ahead import spread
from unite_fast.data.index import main as index_main
from unite_fast.data.tar import index_path, write_index

MODEL = ModelConfig(image_size=48, num_classes=4)


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "folder", 60)


@pytest.fixture
def tars(folder, tmp_path) -> Path:
    root = write_tars(tmp_path / "tars", folder)
    assert index_main([str(root)]) == 0
    return root


def opened(path: Path, source: str = "tar", **changes):
    return open_source(replace(DataConfig(source=source, path=str(path), workers=0), **changes), MODEL)


def one_line(path: Path, words: str, model: ModelConfig = MODEL) -> None:
    with pytest.raises(UserError, match=words) as caught:
        open_source(DataConfig(source="tar", path=str(path)), model)
    assert "\n" not in str(caught.value)


def test_tar_equals_folder(folder, tars, monkeypatch):
    source, reference = opened(tars), opened(folder, "folder")
    assert source.class_names == reference.class_names
    check_streams(source, reference, steps=3)
    monkeypatch.setattr(tar_module, "OPEN_FILES", 1)  # descriptors are closed and opened again
    assert equal(take(opened(tars), 4, global_batch=30), take(reference, 4, global_batch=30))
    assert equal(take(source, 2, global_batch=30, workers=2), take(reference, 2, global_batch=30))
    assert source.name(0).endswith("000.tar/0000.jpg")
    single = opened(tars / "001.tar")
    assert torch.equal(single.load(3), reference.load(23))


def test_threads_read_the_right_bytes_while_files_are_closed(folder, tars, monkeypatch):
    monkeypatch.setattr(tar_module, "OPEN_FILES", 1)
    source, reference = opened(tars), opened(folder, "folder")
    truth = [reference.encoded(i) for i in range(60)]
    order = [int(i) for i in np.random.default_rng(0).integers(0, 60, 4000)]
    before = len(os.listdir("/proc/self/fd"))
    read = spread(source.encoded, order, 8)
    assert all(data == truth[i] for i, data in zip(order, read, strict=True))
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_random_crops_and_the_fast_crop(folder, tars):
    for name in ("random_resized", "fast"):
        a, b = opened(tars, crop=name), opened(folder, "folder", crop=name)
        assert equal(take(a, 2, global_batch=30), take(b, 2, global_batch=30))


def test_labels_from_json_and_numbers_as_names(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "deep/x.jpg", jpeg(crop(1)))
        add(archive, "deep/x.json", b'{"label": 2, "caption": "a"}')
        add(archive, "y.json", b'["no label here"]')
        add(archive, "y.cls", b" 3\n")
        add(archive, "y.PNG", jpeg(crop(2)))  # decided by content
        add(archive, "y.seg.png", b"another kind of data")
        add(archive, "notes.txt", b"ignored")
    index = write_index(tmp_path / "a.tar")
    assert index.labels.tolist() == [2, 3]
    source = opened(tmp_path)
    assert source.class_names == ["0", "1", "2", "3"]
    assert torch.equal(source.labels, torch.tensor([2, 3]))


def test_members_that_leave_the_archive_are_refused(tmp_path, caplog):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "good.jpg", jpeg(crop(1)))
        add(archive, "good.cls", b"3")
        for name in ("../evil.jpg", "/evil.jpg", "a/../../evil.jpg"):
            add(archive, name, jpeg(crop(2)))
        for name, kind in (
            ("soft.jpg", tarfile.SYMTYPE),
            ("hard.jpg", tarfile.LNKTYPE),
            ("pipe.jpg", tarfile.FIFOTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    before = set(tmp_path.parent.rglob("*"))
    with caplog.at_level(logging.WARNING, "unite_fast.data"):
        assert index_main([str(tmp_path / "a.tar")]) == 0
    assert [r.getMessage().split(": ", 2)[2] for r in caplog.records] == [
        *["its name leaves the archive"] * 3, "it is a link", "it is a link", "it is not a regular file",
    ]  # fmt: skip
    source = opened(tmp_path)
    assert len(source) == 1
    source.load(0)
    assert set(tmp_path.parent.rglob("*")) - before == {index_path(tmp_path / "a.tar")}


def test_truncated_tar_is_found_when_indexed_and_at_start(tars):
    path = tars / "001.tar"
    content = path.read_bytes()
    for cut in (len(content) // 2, len(content) // 2 + 300, 700, 100):
        path.write_bytes(content[:cut])
        one_line(tars, "001.tar has .* bytes, but had .* truncated")
        with pytest.raises(UserError, match=r"001.tar.*(truncated|not a complete)"):
            index_main([str(tars)])
    path.write_bytes(content)
    opened(tars)


def test_missing_foreign_and_damaged_indexes(tars, tmp_path):
    path = index_path(tars / "002.tar")
    good = path.read_bytes()
    path.unlink()
    one_line(tars, r"002.tar has no index; write it with python -m unite_fast.data.index")
    generator = np.random.default_rng(1)
    refused = []
    for _ in range(40):
        bad = bytearray(good[: generator.integers(0, len(good))] if generator.random() < 0.3 else good)
        for at in generator.integers(0, max(1, len(bad)), 20) if bad else []:
            bad[at] = generator.integers(256)
        path.write_bytes(bad)
        try:
            opened(tars)
        except UserError as error:
            refused.append(str(error))
    assert len(refused) > 30
    assert all("002.tar" in reason and "\n" not in reason for reason in refused)
    for version, size in ((99, 1), (2, 1)):
        with open(path, "wb") as file:
            empty = np.zeros(0, np.int64)
            np.savez(file, version=version, size=size, extents=empty.reshape(0, 2), labels=empty, names=empty)
        one_line(tars, "not an index of version 2" if version == 99 else "but had 1 when")


def rewritten(tar: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(tar, "w") as archive:
        for name, content in members:
            add(archive, name, content)


def test_a_tar_written_again_after_its_index(tmp_path):
    """Tars are padded, so the size may be the same: other places and other labels are noticed, a copy is no change."""
    x, y = (jpeg(Image.new("RGB", (50, 50), gray)) for gray in ("black", "white"))
    members = [("x.jpg", x), ("x.cls", b"0"), ("y.jpg", y), ("y.cls", b"1")]
    tar, model = tmp_path / "a.tar", replace(MODEL, num_classes=2)
    rewritten(tar, members)
    index_main([str(tar)])
    size = tar.stat().st_size
    for others in (members[2:] + members[:2], [("x.jpg", x), ("x.cls", b"1"), ("y.jpg", y), ("y.cls", b"0")]):
        rewritten(tar, others)
        os.utime(tar, ns=(1, tar.stat().st_mtime_ns + 1))
        assert tar.stat().st_size == size
        one_line(tar, "other images or labels than when its index was written: write it again with", model)
    rewritten(tar, members)
    os.utime(tar, ns=(1, 1))
    assert len(open_source(DataConfig(source="tar", path=str(tar)), model)) == 2


def test_wrong_places(tars, tmp_path):
    one_line(tmp_path / "none", "no such file or folder")
    one_line(tars / "classes.txt", "no .tar files there")
    one_line(tars, "4 classes but model.num_classes is 5", replace(MODEL, num_classes=5))
    one_line(tars, "model.channels is 2", replace(MODEL, channels=2))
    (tars / "classes.txt").write_text("a\nb\n")
    one_line(tars, "names 2 classes, but label 3 occurs")
    with pytest.raises(UserError, match=r"no \.tar files"):
        index_main([str(tmp_path / "none")])


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"a.jpg": b"x"}, r"1 of 1 images have no label \(.cls\), first 'a.jpg'"),
        ({"a.jpg": b"x", "a.cls": b"seven"}, "'a.cls' holds no class number"),
        ({"a.jpg": b"x", "a.cls": b"-1"}, "'a.cls' holds no class number"),
        ({"a.jpg": b"x", "a.png": b"x", "a.cls": b"1"}, "two images are called 'a'"),
    ],
)
def test_unusable_members(tmp_path, members, words):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in members.items():
            add(archive, name, content)
    with pytest.raises(UserError, match=words):
        write_index(tmp_path / "a.tar")
    assert not index_path(tmp_path / "a.tar").exists()


def test_compressed_and_empty_tars(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as archive:
        add(archive, "a.jpg", jpeg(crop(1)))
    with pytest.raises(UserError, match="not a complete, uncompressed tar"):
        write_index(tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar", "w"):
        pass
    write_index(tmp_path / "a.tar")
    one_line(tmp_path, "no images in its 1 tars")


def test_damaged_member_names_tar_and_member(tars):
    source = opened(tars, on_error="skip", flip=False)
    path = tars / "001.tar"
    content = bytearray(path.read_bytes())
    offset, length = source._extents[25].tolist()
    content[offset : offset + length] = bytes(length)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"001.tar/\d+.jpg: not a JPEG"):
        source.load(25)
    images = next(all_images(source, 60)).images
    assert torch.equal(images[25], images[26])
    path.write_bytes(content[: offset + 10])  # after the start
    with pytest.raises(UserError, match="the tar has become shorter"):
        source.load(25)


def test_tars_of_the_tar_program(folder, tmp_path):
    """Long names and an archive written by another program."""
    name = "n" * 150
    (tmp_path / f"{name}.jpg").write_bytes(jpeg(crop(3)))
    (tmp_path / f"{name}.cls").write_text("0")
    subprocess.run(["tar", "cf", "a.tar", f"{name}.jpg", f"{name}.cls"], cwd=tmp_path, check=True)
    index = write_index(tmp_path / "a.tar")
    assert index.names == [f"{name}.jpg"]
    source = open_source(DataConfig(source="tar", path=str(tmp_path)), replace(MODEL, num_classes=1))
    assert source.encoded(0) == (tmp_path / f"{name}.jpg").read_bytes()
