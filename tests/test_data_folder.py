"""Image folders: real photographs in three formats, files that are damaged, workers that fail."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import signal
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from photographs import equal
from PIL import Image

from unite_fast.base.errors import UserError
from unite_fast.config import DataConfig, ModelConfig
from unite_fast.data import BadImage, WorkerError, all_images, batch_of_images, listing, open_source, stream
from unite_fast.data import encoded as encoded_module
from unite_fast.data.folder import Folder
from unite_fast.data.loader import skip_limit
from unite_fast.data.order import Order
from unite_fast.data.transforms import RANDOM_CROPS, adm_crop, to_tensor

MODEL = ModelConfig(image_size=32, num_classes=3)


@pytest.fixture(scope="session")
def photos() -> list[Image.Image]:
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(array) for array in load_sample_images().images]


@pytest.fixture
def root(tmp_path, photos) -> Path:
    """Three classes of 14 files: crops of two photographs, in sizes from 24x30 to 300x213, JPEG, PNG and WebP."""
    sizes = [(24, 30), (64, 64), (65, 90), (128, 70), (150, 149), (300, 213), (40, 200)]
    for k, (label, suffix) in enumerate([("ape", "JPEG"), ("bee", "png"), ("cat", "webp")]):
        (tmp_path / label / "deeper").mkdir(parents=True)
        for i, (width, height) in enumerate(sizes * 2):
            left, top = 11 * i + 40 * k, 7 * i + 20 * k
            crop = photos[i % 2].crop((left, top, left + width, top + height))
            crop.save(tmp_path / label / ("deeper" if i % 5 == 4 else "") / f"{i:02d}.{suffix}")
    return tmp_path


def config(root: Path, **changes) -> DataConfig:
    return replace(DataConfig(source="folder", path=str(root), workers=0, timeout=20), **changes)


def take(source, steps: int, **options):
    return list(itertools.islice(stream(source, 5, **options), steps))


# --- folders ---------------------------------------------------------------------------------------------


def test_folder_reads_photos(root):
    source = open_source(config(root), MODEL)
    assert len(source) == 42
    assert source.class_names == ["ape", "bee", "cat"]
    assert torch.equal(source.labels.bincount(), torch.tensor([14, 14, 14]))
    paths = [source.name(i) for i in range(42)]
    assert len(set(paths)) == 42
    assert all(Path(p).parts[len(root.parts)] in ("ape", "bee", "cat") for p in paths)
    batch = next(all_images(source, 42))
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (42, 3, 32, 32)
    for i, path in enumerate(paths):
        assert torch.equal(batch.images[i], to_tensor(adm_crop(Image.open(path).convert("RGB"), 32)))
    gray = open_source(config(root), replace(MODEL, channels=1)).load(0)
    assert torch.equal(gray, to_tensor(adm_crop(Image.open(paths[0]).convert("L"), 32)))


@pytest.mark.parametrize("crop", ["adm", "resize_random", "random_resized"])
def test_folder_stream(root, crop):
    source = open_source(config(root, crop=crop), MODEL)
    alone = take(source, 8, global_batch=12)
    assert equal(alone[3:], take(source, 5, start=36, global_batch=12))
    for world_size in (2, 3):
        ranks = [take(source, 8, global_batch=12, rank=r, world_size=world_size) for r in range(world_size)]
        for k, whole in enumerate(alone):
            parts = [rank[k].tensors() for rank in ranks]
            for name, tensor in whole.tensors().items():
                assert torch.equal(torch.cat([part[name] for part in parts]), tensor)
    index = Order(42, 5).indices(0, 96).tolist()
    images = torch.cat([b.images for b in alone])
    plain = next(all_images(source, 42)).images[index]
    same = (images == plain).flatten(1).all(1)
    mirrored = (images == plain.flip(-1)).flatten(1).all(1)
    if crop == "adm":
        assert (same | mirrored).all()
        assert 0.3 < mirrored.float().mean() < 0.7
    else:
        assert (same | mirrored).float().mean() < 0.1
        assert source.lanes == 1 + RANDOM_CROPS[crop][0]
    for p in (0, 17, 95):
        assert torch.equal(source.load(index[p], p, 5), images[p])


def test_workers_change_nothing(root, monkeypatch, recwarn):
    """Nor is it remarked upon that there are more of them than cores, which the doctor says."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    source = open_source(config(root, crop="random_resized"), MODEL)
    alone = take(source, 3, start=30, global_batch=80)  # more than one chunk per batch
    state = torch.get_rng_state()
    assert equal(alone, take(source, 3, start=30, global_batch=80, workers=2))
    assert torch.equal(state, torch.get_rng_state())
    assert equal(list(all_images(source, 40)), list(all_images(source, 40, workers=2)))
    assert not [str(w.message) for w in recwarn]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("workers", [0, 2])
def test_folder_on_the_gpu(root, workers):
    source = open_source(config(root), MODEL)
    batches = take(source, 4, global_batch=80, device="cuda", workers=workers)
    assert all(b.images.is_cuda and b.labels.is_cuda for b in batches)
    assert equal(
        take(source, 4, global_batch=80),
        [batch_of_images(*(t.cpu() for t in (b.images, b.labels, b.samples))) for b in batches],
    )


def one_line(data: DataConfig, words: str, model: ModelConfig = MODEL, split: str = "train") -> None:
    with pytest.raises(UserError, match=words) as caught:
        open_source(data, model, split)
    assert "\n" not in str(caught.value)


def test_links_are_followed_and_loops_refused(root, tmp_path_factory):
    """A link to a folder above would repeat all images for ever; one to another folder is a class of its own."""
    images = tmp_path_factory.mktemp("links")
    for name in ("ape", "bee", "cat"):
        (images / name).symlink_to(root / name)
    assert len(open_source(config(images), MODEL)) == 42
    for target in ("..", "."):
        (root / "bee" / "again").symlink_to(target)
        one_line(config(root), "bee/again is a link to a folder that it lies in; remove the link")
        (root / "bee" / "again").unlink()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_cannot_be_read(root):
    (root / "bee").chmod(0)
    try:
        one_line(config(root), "bee: Permission denied")
    finally:
        (root / "bee").chmod(0o755)


def test_a_folder_that_the_system_refuses(root, monkeypatch):
    real = os.scandir

    def refuse(path):
        if str(path).endswith("bee"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    one_line(config(root), "bee: Permission denied; make it readable")
    # Nor do the files of a pattern, or of a folder of them, come without those that nobody can see.
    for listed in (lambda: listing.matching(root / "*" / "*.JPEG"), lambda: listing.files_of(root / "bee", ".tar")):
        with pytest.raises(UserError, match="bee: Permission denied; make it readable"):
            listed()
    assert len(listing.matching(root / "[a]pe" / "*.JPEG")) == len(list((root / "ape").glob("*.JPEG"))) > 0


def test_wrong_folders(root, tmp_path_factory):
    one_line(config(root / "none"), "none: no such folder")
    one_line(config(root / "ape" / "00.JPEG"), "Not a directory")
    one_line(replace(config(root), path=""), "data.path is empty")
    one_line(config(root / "ape" / "deeper"), "images but no class folders")
    one_line(config(root), "3 classes .* 1000", ModelConfig(image_size=32))
    one_line(config(root), "model.channels is 2", replace(MODEL, channels=2))
    one_line(config(root), "data.heldout_path is empty", split="heldout")
    one_line(config(tmp_path_factory.mktemp("empty")), "no class folders and no images")
    hollow = tmp_path_factory.mktemp("hollow")
    for name in ("a", "b", "c"):
        (hollow / name).mkdir()
    one_line(config(hollow), "files in its 3 class folders")
    outer = tmp_path_factory.mktemp("outer")
    (outer / "train").mkdir()
    (outer / "val").mkdir()
    one_line(config(outer), "mean its 'train' sub-folder.* 2 classes .* 3")
    (root / "dog").mkdir()
    one_line(config(root), "class folder 'dog' holds no images", replace(MODEL, num_classes=4))
    (root / ".cache").mkdir()
    (root / "dog" / "._x.jpg").write_bytes(b"x")
    one_line(config(root), "class folder 'dog' holds no images", replace(MODEL, num_classes=4))


def test_held_out_folder(root, tmp_path_factory):
    held_out = tmp_path_factory.mktemp("val")
    for name in ("ape", "bee", "cow"):
        (held_out / name).mkdir()
        (held_out / name / "1.png").write_bytes((root / "bee" / "00.png").read_bytes())
    data = config(root, heldout_path=str(held_out))
    one_line(data, "differ from those of data.path, first at 'cat'", split="heldout")
    (held_out / "cow").rename(held_out / "cat")
    assert len(open_source(data, MODEL, "heldout")) == 3


# --- unusual and damaged files ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["CMYK", "L", "P", "RGBA", "LA", "1", "I;16"])
def test_modes_become_rgb(root, photos, mode):
    image = photos[0].crop((0, 0, 80, 60))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16))
        assert image.mode == mode
    else:
        image = image.convert(mode)
    path = root / "ape" / ("00b.jpg" if mode in ("CMYK", "L") else "00b.png")
    image.save(path)
    source = open_source(config(root), MODEL)
    assert source.name(1) == str(path)
    assert torch.equal(source.load(1), to_tensor(adm_crop(Image.open(path).convert("RGB"), 32)))


def test_exif_orientation_is_not_applied_and_tiny_images_are_enlarged(root, photos):
    exif = Image.Exif()
    exif[0x0112] = 6
    photos[0].crop((0, 0, 80, 60)).save(root / "ape" / "00b.jpg", exif=exif)
    photos[0].crop((0, 0, 80, 60)).save(root / "ape" / "00c.jpg")
    Image.new("RGB", (1, 1), (10, 200, 30)).save(root / "ape" / "00d.png")
    source = open_source(config(root), MODEL)
    assert torch.equal(source.load(1), source.load(2))
    assert torch.equal(source.load(3), torch.tensor([10, 200, 30], dtype=torch.uint8)[:, None, None].expand(3, 32, 32))


def png_of(width: int, height: int) -> bytes:
    """A small PNG file that declares any size."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", zlib.compress(bytes(99))) + part(b"IEND", b"")


def damage(kind: str, path: Path, good: bytes) -> None:
    path.unlink(missing_ok=True)
    if kind == "truncated":
        path.write_bytes(good[: len(good) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("this is not an image")
    elif kind == "gif":
        Image.new("P", (9, 9)).save(path, "GIF")
    elif kind == "bomb":
        path.write_bytes(png_of(14000, 14000))
    elif kind == "large":
        path.write_bytes(png_of(10000, 9000))  # between Pillow's warning and its error
    elif kind == "elongated":
        Image.new("L", (200_000, 1)).save(path, "PNG")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "dangling":
        path.symlink_to(path.with_name("nowhere"))
    else:
        path.write_bytes(png_of(0, 5) if kind == "no width" else good)


CASES = {
    "truncated": "[Tt]runcated",
    "empty": "the file is empty",
    "text": "not a JPEG, PNG or WebP image",
    "gif": "not a JPEG, PNG or WebP image",
    "bomb": "pixels",
    "large": "90?0{0}.*pixels, more than",
    "elongated": "too elongated",
    "pipe": "not a regular file",
    "dangling": "No such file",
    "oversized": "bytes, more than",
    "no width": ".",
}


@pytest.mark.parametrize("kind", CASES)
def test_damaged_file_fails_in_one_line(root, kind, monkeypatch):
    path = root / "ape" / "01.JPEG"
    if kind == "oversized":
        monkeypatch.setattr(encoded_module, "MAX_ENCODED_BYTES", 100)
    damage(kind, path, path.read_bytes())
    model = replace(MODEL, image_size=1024) if kind == "elongated" else MODEL
    source = open_source(config(root), model)
    index = next(i for i in range(len(source)) if source.name(i) == str(path))
    started = time.monotonic()
    with pytest.raises(BadImage, match=CASES[kind]):
        source.read(index, None, 0)
    with pytest.raises(UserError, match=CASES[kind]):
        source.load(index)
    with pytest.raises(UserError, match=r"data\.on_error=skip") as caught:
        list(all_images(source, indices=torch.arange(index + 1)))
    assert time.monotonic() - started < 5
    assert "\n" not in str(caught.value)
    if kind != "oversized":  # there the first image is refused, too
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", ["JPEG", "png", "webp"])
def test_fuzzed_files_never_raise_anything_else(root, suffix):
    source = open_source(config(root), MODEL)
    index = next(i for i in range(len(source)) if source.name(i).endswith(suffix))
    path = Path(source.name(index))
    good, generator = path.read_bytes(), np.random.default_rng(3)
    refused = []
    for _ in range(100):
        bad = bytearray(good[: generator.integers(1, len(good) + 1)] if generator.random() < 0.3 else good)
        for at in generator.integers(0, len(bad), 8):
            bad[at] = generator.integers(256)
        path.write_bytes(bad)
        try:
            assert source.read(index, None, 0).shape == (3, 32, 32)
        except BadImage as error:
            refused.append(str(error))
    assert len(refused) > 10
    assert all(refused)
    assert "\n" not in "".join(refused)


def test_skip_is_deterministic_and_counts(root, caplog):
    for name in ("ape/deeper/09.JPEG", "bee/03.png", "bee/05.png"):  # the first is the last of its class
        damage("truncated", root / name, (root / name).read_bytes())
    source = open_source(config(root, on_error="skip"), MODEL)
    with caplog.at_level(logging.WARNING, "unite_fast.data"):
        batches = take(source, 10, global_batch=42)
    assert len(caplog.records) == 3
    assert len(source.skipped) == 3
    assert all("truncated" in reason.lower() for reason in source.skipped.values())
    assert all("bee" in r.getMessage() or "09.JPEG" in r.getMessage() for r in caplog.records)
    plain = next(all_images(source, 42))
    bad = sorted(source.skipped)
    for i in bad:
        assert torch.equal(plain.images[i], plain.images[i + 1])
        assert plain.labels[i] == source.labels[i + 1]
    assert any(source.labels[i] != source.labels[i + 1] for i in bad)  # the label comes with the image
    for options in ({"workers": 0}, {"workers": 2}):
        fresh = open_source(config(root, on_error="skip"), MODEL)
        assert equal(batches, take(fresh, 10, global_batch=42, **options))
        assert fresh.skipped == source.skipped
        assert equal(batches[4:], take(fresh, 6, start=168, global_batch=42, **options))


def test_skip_stops_above_the_limit(root):
    assert [skip_limit(n) for n in (42, 5000, 6000, 1_281_167)] == [5, 5, 6, 1281]
    for i in range(8):
        damage("empty", root / "cat" / ("deeper" if i == 4 else "") / f"{i:02d}.webp", b"")
    source = open_source(config(root, on_error="skip"), MODEL)
    for workers in (0, 1):
        source.skipped.clear()
        with pytest.raises(UserError, match=r"6 of 42 images are unreadable, more than the 5 .*webp: the file is"):
            list(all_images(source, 42, workers=workers))


# --- workers ---------------------------------------------------------------------------------------------


class Trouble(Folder):
    """A folder whose image 9 kills or hangs whoever reads it."""

    trouble = "kill"

    def read(self, index, draw, seed):
        if index == 9 and self.trouble == "kill":
            time.sleep(1)  # until the main process waits for this image
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 9 and self.trouble == "hang":
            time.sleep(1000)
        if index == 9:
            raise RuntimeError("a defect of the program")
        return super().read(index, draw, seed)


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ("kill", "worker .*died while reading {path}; out of memory"),
        ("hang", "no images for 2 s .*still reading {path};"),
    ],
)
def test_worker_that_dies_or_hangs(root, trouble, words):
    source = open_source(config(root), MODEL)
    source.__class__, source.trouble = Trouble, trouble  # type: ignore[assignment,attr-defined]
    started = time.monotonic()
    with pytest.raises(WorkerError, match=words.format(path=source.name(9))) as caught:
        list(all_images(source, 4, workers=2, timeout=2 if trouble == "hang" else 60))
    assert time.monotonic() - started < 20
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("whose", [0, 1])
def test_worker_that_dies_between_batches_is_reported_at_the_next(root, whose):
    """DataLoader alone would raise in the loop that stands for a training step here."""
    streams, workers = [], []
    for seed in range(2):
        known = {child.pid for child in multiprocessing.active_children()}
        streams.append(stream(open_source(config(root), MODEL), seed, global_batch=4, workers=1, timeout=60))
        next(streams[seed])
        workers.append({child.pid for child in multiprocessing.active_children()} - known)
    (pid,) = workers[whose]
    os.kill(pid, signal.SIGKILL)
    for _ in range(50):
        time.sleep(0.01)
    started = time.monotonic()
    with pytest.raises(WorkerError, match=rf"worker \(pid {pid}\) died.*out of memory"):
        list(itertools.islice(streams[whose], 9))
    assert time.monotonic() - started < 10
    next(streams[1 - whose])
    streams[1 - whose].close()
    assert "unite_fast" not in getattr(signal.getsignal(signal.SIGCHLD), "__module__", "")


@pytest.fixture
def dies_at_the_socket(monkeypatch):
    """In place of the wait for a batch: the workers die, the connection breaks, and the DataLoader raises what it says.

    SIGCHLD tells of the death, which it does once, only when the loader begins to stop its workers.
    """
    from torch.utils.data._utils import signal_handling

    from unite_fast.data import loader

    tell, stop = signal_handling._error_if_any_worker_fails, loader._stop_workers
    monkeypatch.setattr(signal_handling, "_error_if_any_worker_fails", lambda: None)

    def breaks(iterator):
        for worker in iterator._workers:
            os.kill(worker.pid, signal.SIGKILL)
        raise ConnectionResetError(104, "Connection reset by peer")

    def stops(iterator):
        signal_handling._error_if_any_worker_fails = tell
        signal.raise_signal(signal.SIGCHLD)
        stop(iterator)

    monkeypatch.setattr(loader, "_stop_workers", stops)
    return breaks


def test_worker_that_dies_while_it_hands_an_image_over(root, monkeypatch, dies_at_the_socket):
    from unite_fast.data import loader

    monkeypatch.setattr(loader._deaths, "wait", dies_at_the_socket)
    with pytest.raises(WorkerError, match=r"worker \(pid \d+\) died.*out of memory"):
        list(all_images(open_source(config(root), MODEL), 4, workers=1))


def test_a_dead_worker_is_no_news_for_another_stream(root, monkeypatch, dies_at_the_socket):
    from unite_fast.data import loader

    other = stream(open_source(config(root), MODEL), 0, global_batch=4, workers=1, timeout=60)
    next(other)
    with monkeypatch.context() as patch:
        patch.setattr(loader._deaths, "wait", dies_at_the_socket)
        with pytest.raises(WorkerError):
            list(all_images(open_source(config(root), MODEL), 4, workers=2))
    list(itertools.islice(other, 9))


def test_a_death_is_told_to_the_loader_that_it_concerns():
    from unite_fast.data import loader

    def tells(number, frame):
        raise RuntimeError("DataLoader worker (pid 70) is killed by signal: Killed.")

    class Waits(Iterator):
        def __init__(self, pid):
            self._workers = [SimpleNamespace(pid=pid)]

        def __next__(self):
            deaths._on_signal(signal.SIGCHLD, None)
            return torch.empty(0), torch.empty(0), []

    deaths = loader._Deaths()
    deaths._before = tells
    deaths.wait(Waits(71))
    deaths._before = None
    with pytest.raises(RuntimeError, match="pid 70"):
        deaths.wait(Waits(70))
    deaths.wait(Waits(70))


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ("(pid 70) exited unexpectedly with exit code 3. Details", "70"),
        ("(pid(s) 70, 71) exited unexpectedly", "70, 71"),
    ],
)
def test_dead_workers_are_named_by_their_pids_alone(root, monkeypatch, said, named):
    from unite_fast.data import loader

    def tells(iterator):
        raise RuntimeError(f"DataLoader worker {said}")

    monkeypatch.setattr(loader._deaths, "wait", tells)
    with pytest.raises(WorkerError, match=rf"worker \(pid {named}\) died"):
        list(all_images(open_source(config(root), MODEL), 4, workers=1))


def test_a_broken_connection_is_no_dead_worker(root, monkeypatch):
    from unite_fast.data import loader

    def breaks(iterator):
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(loader._deaths, "wait", breaks)
    with pytest.raises(ConnectionResetError):
        list(all_images(open_source(config(root), MODEL), 4, workers=1))


def test_a_defect_in_a_worker_keeps_its_traceback(root):
    source = open_source(config(root), MODEL)
    source.__class__, source.trouble = Trouble, "raise"  # type: ignore[assignment,attr-defined]
    with pytest.raises(RuntimeError, match="a defect of the program") as caught:
        list(all_images(source, 4, workers=1))
    assert not isinstance(caught.value, WorkerError)
