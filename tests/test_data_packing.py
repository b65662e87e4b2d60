"""Packing: goes on where it was stopped, takes nothing for what it is not, and writes nowhere else."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from packs import COUNT, MODEL, SIZE, files, one_line, opened, write_packs
from photographs import write_folder
from PIL import Image
from support import ROOT

from unite_fast.base.errors import UserError
from unite_fast.config import DataConfig
from unite_fast.data import WorkerError, open_source
from unite_fast.data import pack as pack_module
from unite_fast.data.pack import main, pack
from unite_fast.data.verify import verify


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("folder"), COUNT)


@pytest.fixture(scope="module")
def packs(folder, tmp_path_factory) -> Path:
    return write_packs(folder, tmp_path_factory.mktemp("packs"), "uint8")


def test_stats_list_names_every_image_and_its_pixels(folder, tmp_path, packs):
    pack(folder, tmp_path / "p", SIZE, per_shard=64, stats=True)
    lines = [line.split("\t") for line in (tmp_path / "p" / "stats.tsv").read_text().splitlines()]
    assert lines.pop(0) == ["number", "class", "sha256", "name"]
    reference = opened(folder, "folder")
    for i, (number, label, digest, name) in enumerate(lines):
        assert (int(number), str(folder / name)) == (i, reference.name(i))
        assert name.startswith(label)
        pixels = np.ascontiguousarray(reference.load(i).permute(1, 2, 0).numpy())
        assert digest == hashlib.sha256(pixels).hexdigest()
    assert len(lines) == COUNT


def test_a_plan_that_cannot_be_read_is_another_one(folder, tmp_path):
    (tmp_path / pack_module.PARTS).mkdir()
    (tmp_path / pack_module.PARTS / "plan.json").write_bytes(b"\x9b\xff")
    with pytest.raises(UserError, match="unfinished pack of other images or options"):
        pack(folder, tmp_path, SIZE)


def test_killed_pack_continues_and_ends_the_same(folder, packs, tmp_path):
    dest = tmp_path / "p"
    words = [str(folder), str(dest), "--size", str(SIZE), "--per-shard", "28", "--workers", "1"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "unite_fast.data.pack", *words], env=environment, start_new_session=True,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not (dest / "shard-00001.bin").exists():
        assert process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (dest / "index.json").exists()
    one_line(dest, "packing has not finished")
    before = (dest / "shard-00000.bin").stat().st_mtime_ns
    with pytest.raises(UserError, match="unfinished pack of other images or options"):
        pack(folder, dest, SIZE, per_shard=29)
    assert main(words) == 0
    assert (dest / "shard-00000.bin").stat().st_mtime_ns == before
    assert files(dest) == files(packs / "uint8")
    assert main([*words, "--stats"]) == 0  # complete: nothing but the list is added
    assert set(files(dest)) - set(files(packs / "uint8")) == {"stats.tsv"}
    with pytest.raises(UserError, match="other images or options"):
        pack(folder, dest, SIZE * 2, per_shard=28)


@pytest.mark.parametrize("change", ["class", "name", "size"])
def test_a_finished_pack_of_images_that_changed_is_not_complete(folder, packs, tmp_path, change, capsys):
    """As many as before, in the same classes by name; earlier packs do not say what they were made of."""
    source, dest = shutil.copytree(folder, tmp_path / "f"), shutil.copytree(packs / "uint8", tmp_path / "p")
    words = [str(source), str(dest), "--size", str(SIZE), "--per-shard", "28", "--workers", "0"]
    assert main(words) == 0
    one, two = (sorted(path for path in (source / name).rglob("*.*"))[-1] for name in sorted(os.listdir(source))[:2])
    if change == "class":
        one.rename(two.with_name(f"zz{one.name}"))
        two.rename(one)
    elif change == "name":
        one.rename(one.with_name(f"zz{one.name}"))
    else:
        one.write_bytes(one.read_bytes() + b"\0")
    with pytest.raises(UserError, match="had other names, classes or sizes; choose a new or empty folder"):
        main(words)
    (dest / "source.sha256").unlink()
    (dest / "made_of.npy").unlink()
    assert main(words) == 0


def rewritten(path: Path) -> None:
    """Another image of the same length under the same name, written at another time."""
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(0, 0))


def test_an_image_that_was_written_anew_with_equal_length(folder, packs, tmp_path):
    """A copy has other times, and is what was packed."""
    source, dest = tmp_path / "f", tmp_path / "p"
    shutil.copytree(folder, source, copy_function=shutil.copyfile)
    words = [str(source), str(dest), "--size", str(SIZE), "--per-shard", "28", "--workers", "0", "--on-error", "skip"]
    assert main(words) == 0
    one = sorted(path for path in source.rglob("*.*"))[-1]
    os.utime(one, ns=(0, 0))
    assert main(words) == 0
    rewritten(one)
    os.utime(one, ns=(1, 1))
    with pytest.raises(UserError, match=rf"a pack from before .*{one.name} was written anew; choose a new or empty"):
        main(words)
    states = np.load(dest / "made_of.npy")
    np.save(dest / "made_of.npy", np.zeros_like(states))  # none could be read for that, for a moment
    assert main(words) == 0
    (dest / "made_of.npy").write_bytes(b"torn")
    assert main(words) == 0  # as one of an earlier version, it does not say


def test_an_unfinished_pack_takes_what_was_written_anew(folder, packs, tmp_path, monkeypatch):
    source, dest = shutil.copytree(folder, tmp_path / "f"), tmp_path / "p"
    words = [str(source), str(dest), "--size", str(SIZE), "--per-shard", "28", "--workers", "0", "--on-error", "skip"]
    with monkeypatch.context() as patch:
        patch.setattr(pack_module, "finish", lambda dest, plan: None)  # stopped just before
        assert main(words) == 0
    made = {path.name: path.stat().st_mtime_ns for path in dest.glob("shard-*")}
    first = open_source(DataConfig(path=str(source), workers=0), MODEL).name(0)
    rewritten(Path(first))
    assert main(words) == 0
    again = {path.name for path in dest.glob("shard-*") if path.stat().st_mtime_ns != made[path.name]}
    assert again == {"shard-00000.bin"}


def test_two_packs_into_one_folder(folder, tmp_path, monkeypatch):
    """Shards of one under the names of the other would be half a file for a while."""
    said = []

    def packed_once(*arguments) -> None:
        monkeypatch.undo()

        def held(descriptor: int, place: object, mend: str) -> bool:  # POSIX locks do not tell a process from itself
            raise UserError(f"{place} is in use; {mend}")

        monkeypatch.setattr(pack_module.locks, "_locked", held)
        with pytest.raises(UserError, match="wait for it, or choose another folder") as error:
            pack(folder, tmp_path / "p", SIZE, per_shard=28)
        said.append(str(error.value))
        monkeypatch.undo()
        pack_shard(*arguments)

    pack_shard = pack_module.pack_shard
    monkeypatch.setattr(pack_module, "pack_shard", packed_once)
    pack(folder, tmp_path / "p", SIZE, per_shard=28)
    assert said
    assert verify(tmp_path / "p")


def test_dead_packing_process_is_one_line(folder, tmp_path, monkeypatch):
    real = pack_module.pack_shard

    def die(source, plan, dest, number, done):
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, plan, dest, number, done)

    monkeypatch.setattr(pack_module, "pack_shard", die)
    with pytest.raises(WorkerError, match="packing process died"):
        pack(folder, tmp_path / "p", SIZE, workers=1, per_shard=28)
    monkeypatch.undo()
    pack(folder, tmp_path / "p", SIZE, workers=2, per_shard=28)
    assert "intact" in verify(tmp_path / "p")


def test_refusals(folder, tmp_path, packs):
    with pytest.raises(UserError, match="lies in"):
        pack(folder, folder / "class_0" / "p", SIZE)
    assert not (folder / "class_0" / "p").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("keep me")
    with pytest.raises(UserError, match="not an unfinished pack"):
        pack(folder, tmp_path / "other", SIZE)
    with pytest.raises(UserError, match="no such folder"):
        pack(tmp_path / "nowhere", tmp_path / "p", SIZE)
    with pytest.raises(UserError, match="decoded images"):
        pack(packs / "uint8", tmp_path / "p", SIZE)
    for words in (["--size", "0"], ["--workers", "-1"], ["--quality", "0"]):
        with pytest.raises(UserError, match="positive"):
            main([str(folder), str(tmp_path / "p"), *words])
    assert (tmp_path / "other" / "mine.txt").read_text() == "keep me"
    path = packs / "uint8"
    one_line(path, "packed images are 64 x 64, but model.image_size is 32", replace(MODEL, image_size=32))
    one_line(path, "RGB, but model.channels is 1", replace(MODEL, channels=1))
    one_line(path, "4 classes but model.num_classes is 7", replace(MODEL, num_classes=7))
    one_line(path, "data.crop=resize_random", crop="resize_random")
    one_line(path, "data.crop=fast", crop="fast")
    one_line(tmp_path / "other", "index.json: no such file")
    one_line(Path(), "index.json: no such file")


def test_bad_images_at_packing(tmp_path, capsys):
    source = write_folder(tmp_path / "f", 40)
    bad = source / "class_1" / "0005.jpg"
    bad.write_bytes(bad.read_bytes()[:800])
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"0005.jpg: .*--on-error skip"):
            pack(source, tmp_path / "p", SIZE, workers=workers, per_shard=16)
    with pytest.raises(UserError, match="other images or options"):
        pack(source, tmp_path / "p", SIZE, per_shard=16, on_error="skip")
    for workers, name in ((0, "q"), (1, "r")):
        capsys.readouterr()
        pack(source, tmp_path / name, SIZE, workers=workers, per_shard=16, on_error="skip", stats=True)
        assert capsys.readouterr().err.count(f"left out: {bad}: ") == 1
    assert files(tmp_path / "q") == files(tmp_path / "r")
    packed, reference = opened(tmp_path / "q"), opened(source, "folder")
    kept = [i for i in range(40) if reference.name(i) != str(bad)]
    assert len(packed) == len(kept) == 39
    assert torch.equal(packed.labels, reference.labels[kept])
    assert torch.equal(packed.load(20), reference.load(kept[20]))
    assert "0005" not in (tmp_path / "q" / "stats.tsv").read_text()
    for number in range(8, 20):
        (source / f"class_{number % 4}" / f"{number:04d}.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="more than the 5 that --on-error skip allows"):
        pack(source, tmp_path / "s", SIZE, per_shard=16, on_error="skip")


def test_full_disk(folder, packs, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 1000))
        with pytest.raises(UserError, match="GiB are needed, but 0"):
            pack(folder, tmp_path / "p", SIZE, per_shard=28)
    code = (
        "import resource, sys; from pathlib import Path; from unite_fast.data.pack import main; "
        "from unite_fast.base.errors import UserError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "try: main(sys.argv[1:])\n"
        "except UserError as error: sys.exit(str(error))\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    words = [str(folder), str(tmp_path / "p"), "--size", str(SIZE), "--per-shard", "28", "--workers", "0"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True)
    assert "File too large; mend that, then the same command continues" in done.stderr
    assert sorted(files(tmp_path / "p")) == [".parts/.lock", ".parts/plan.json"]
    pack(folder, tmp_path / "p", SIZE, per_shard=28)
    assert files(tmp_path / "p") == files(packs / "uint8")


def test_nothing_is_written_outside_the_destination(folder, packs, tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("keep me")
    pack(folder, tmp_path / "p", SIZE, per_shard=28)
    plan = json.dumps(
        vars(pack_module.make_plan(opened(folder, "folder"), folder, SIZE, "uint8", 95, 28, "fail")), indent=1
    )
    dest = tmp_path / "q"
    (dest / ".parts").mkdir(parents=True)
    (dest / ".parts" / "plan.json").write_text(plan)
    for name in (".shard-00000.bin.incomplete", "shard-00001.bin", ".labels.npy.incomplete", ".index.json"):
        (dest / name).symlink_to(outside)
    pack(folder, dest, SIZE, per_shard=28)
    assert outside.read_text() == "keep me"
    assert (dest / "shard-00001.bin").read_bytes() == (packs / "uint8" / "shard-00001.bin").read_bytes()
    assert not (dest / "shard-00001.bin").is_symlink()


def test_elongated_image_is_refused(tmp_path):
    (tmp_path / "f" / "a").mkdir(parents=True)
    Image.new("L", (200_000, 1)).save(tmp_path / "f" / "a" / "x.png")
    with pytest.raises(UserError, match="too elongated"):
        pack(tmp_path / "f", tmp_path / "p", 1024)
