"""F16, F18, F21-F24: images and the processes that read them, in whole runs on two ranks."""

from __future__ import annotations

import os
import signal
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import TINY, equal
from PIL import Image

fault = pytest.mark.fault
MODES = ("RGB", "L", "CMYK", "RGBA", "P", "LA", "1")


@pytest.fixture
def images(tmp_path) -> Path:
    """Ten classes of 16 photographs of noise, in every mode, some tiny, one turned by EXIF."""
    rng, root = np.random.default_rng(0), tmp_path / "images"
    for label in range(10):
        (root / f"c{label}").mkdir(parents=True)
        for i in range(16):
            mode = MODES[i % len(MODES)]
            image = Image.fromarray(rng.integers(0, 255, (9 + i, 12, 3), dtype=np.uint8)).convert(mode)
            name = "jpg" if mode in ("RGB", "L", "CMYK") else "png"
            exif = Image.Exif()
            exif[0x0112] = 6 if i == 7 else 1
            image.save(root / f"c{label}" / f"{i:02d}.{name}", exif=exif)
    Image.new("RGB", (1, 1), (9, 8, 7)).save(root / "c0" / "00.jpg")
    return root


def folder_job(jobs, images, name="job"):
    return jobs(name, TINY.replace("{source: digits,", f"{{source: folder, path: {images},"))


def bomb(path: Path) -> None:
    """A small PNG that declares 14000 x 14000 pixels."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 14000, 14000, 8, 2, 0, 0, 0)
    packed = zlib.compress(bytes(14000 * 3 * 200))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", packed) + part(b"IEND", b""))


def replaced(jobs, images, path, reason):
    """fail: one line with the path. skip: said once per rank that meets it, and the same run again and again."""
    first = folder_job(jobs, images)
    said = first.train("train.max_steps=10", code=None)
    assert f"{path}: " in said
    assert reason in said
    assert "data.on_error=skip" in said
    one, two = folder_job(jobs, images, "one"), folder_job(jobs, images, "two")
    said = one.train("train.max_steps=20", "train.epochs=10", "data.on_error=skip")
    assert 1 <= said.count(f"{path}") <= 2
    two.train("train.max_steps=20", "train.epochs=10", "data.on_error=skip")
    assert equal(one.tensors(20), two.tensors(20))


@fault("F16", "truncated JPEG", "path logged once; a fixed neighbour replaces it; or one line and the end")
def test_truncated(jobs, images):
    path = images / "c3" / "08.jpg"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    replaced(jobs, images, path, "truncated")


@fault("F16", "truncated JPEG", "too many of them end the run")
def test_too_many_damaged(jobs, images):
    for path in sorted(images.rglob("*.jpg"))[:20]:
        path.write_bytes(path.read_bytes()[:30])
    job = folder_job(jobs, images)
    said = job.train("train.max_steps=20", "train.epochs=10", "data.on_error=skip", code=None)
    assert "error:" in said
    assert "more than" in said


@fault("F16", "truncated JPEG", "too many over ranks, or over starts, end the run; mended ones no longer count")
def test_too_many_damaged_together(jobs, images):
    """Six of 160, of which five may be: each rank meets three, then each start does."""
    from unite_fast.data import Order

    paths = sorted(images.rglob("*.*"))
    order = [paths[i] for i in Order(160, 0).indices(0, 160).tolist()]  # 16 of a step, of which a rank has eight
    whole = {path: path.read_bytes() for path in order}
    harm = lambda places: [order[i].write_bytes(b"no image") for i in places]  # noqa: E731
    skip = ("train.epochs=10", "train.checkpoint_every=5", "data.on_error=skip")
    harm([0, 1, 2, 8, 9, 10])
    said = folder_job(jobs, images, "ranks").train(*skip, "train.max_steps=1", code=2)
    assert said.count("error: 6 of 160 images are unreadable, more than the 5 that") == 1
    for path, content in whole.items():
        path.write_bytes(content)
    job = folder_job(jobs, images, "starts")
    harm([0, 1, 2])
    job.train(*skip, "train.max_steps=5", ranks=1)
    harm([80, 81, 82])
    said = job.train(*skip, "train.max_steps=10", ranks=1, code=2)
    assert "error: 6 of 160 images are unreadable" in said
    order[0].write_bytes(whole[order[0]])
    job.train(*skip, "train.max_steps=10", ranks=1)
    assert len(job.counters(10)["unreadable"]) == 5


@fault("F18", "decompression bomb", "refused before a pixel is decoded, then as F16; memory stays bounded")
def test_bomb(jobs, images):
    path = images / "c4" / "03.png"
    bomb(path)
    replaced(jobs, images, path, "pixels")


@fault("F21", "gray, CMYK, palette, tiny, EXIF-turned images", "decoded as Pillow's convert('RGB'), and trained on")
def test_odd_images(jobs, images):
    from unite_fast.config import DataConfig, ModelConfig
    from unite_fast.data import open_source
    from unite_fast.data.transforms import adm_crop, to_tensor

    source = open_source(
        DataConfig(source="folder", path=str(images), workers=0), ModelConfig(image_size=8, num_classes=10)
    )
    for i in range(0, len(source), 3):
        expected = to_tensor(adm_crop(Image.open(source.name(i)).convert("RGB"), 8))
        assert torch.equal(source.load(i), expected), source.name(i)
    folder_job(jobs, images).train("train.max_steps=10")


@fault("F22", "wrong class count, empty class, no images", "both numbers, exit 2 on every rank before the ranks meet")
def test_wrong_classes(jobs, images):
    job = folder_job(jobs, images)
    started = time.monotonic()
    said = job.train("model.num_classes=7", code=2)
    assert "10 classes but model.num_classes is 7" in said
    (images / "c5").rename(images / "other")
    (images / "c5").mkdir()
    said = job.train("model.num_classes=11", code=2)
    assert "class folder 'c5' holds no images" in said
    assert time.monotonic() - started < 10
    assert not job.run.exists()


@fault("F22", "a path that one rank alone misses", "that rank says so at once, with its number")
def test_path_missing_on_one_rank(jobs, images):
    job = folder_job(jobs, images)
    ranks = job.start(own={1: ["data.path=no/such/folder"]})
    assert ranks[1].wait(5) == 2
    assert "error: rank 1: data.path no/such/folder: no such folder" in ranks[1].said()
    ranks[0].kill(signal.SIGKILL)
    ranks[0].wait()


def worker_of(rank) -> int:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        children = Path(f"/proc/{rank.pid}/task/{rank.pid}/children").read_text().split()
        if children:
            return int(children[0])
        time.sleep(0.02)
    raise AssertionError(rank.said())


@fault("F23", "killed decoding worker", "the job ends with 'out of memory?' and the worker's number")
def test_killed_worker(jobs, images):
    job = folder_job(jobs, images)
    ranks = job.start("train.max_steps=4000", "train.epochs=1000", "data.workers=1")
    ranks[0].until("step 3/")
    started = time.monotonic()
    worker = worker_of(ranks[1])
    os.kill(worker, signal.SIGKILL)
    assert [rank.wait(30) for rank in ranks] == [1, 1]
    assert time.monotonic() - started < 30
    assert (job.status["state"], job.status["rank"]) == ("failed", 1)
    assert f"(pid {worker}) died" in ranks[1].said()
    assert "out of memory?" in ranks[1].said()


@fault("F24", "stalled storage", "data.timeout ends the job with a line that names the image, not a hang")
def test_stalled_storage(jobs, images, monkeypatch, capsys):
    import train
    from unite_fast.base import command
    from unite_fast.data.folder import Folder

    real = Folder.read
    monkeypatch.setattr(
        Folder, "read", lambda self, index, *rest: time.sleep(600) if index == 70 else real(self, index, *rest)
    )
    job = folder_job(jobs, images)
    words = ["--config", str(job.config), f"run_dir={job.run}", "train.epochs=2", "data.workers=1", "data.timeout=2"]
    started = time.monotonic()
    assert command.run(train.main, words) == 1
    assert time.monotonic() - started < 30
    assert "data.timeout" in capsys.readouterr().err
    assert job.status["state"] == "failed"


@fault("F24", "a pipe among the images", "refused at once")
def test_pipe(jobs, images):
    path = images / "c2" / "08.jpg"
    path.unlink()
    os.mkfifo(path)
    said = folder_job(jobs, images).train("train.max_steps=10", code=None, seconds=30)
    assert f"{path}: not a regular file" in said
