"""Packed shards: equal to the folder they were made of, restartable, and honest about damage and full disks."""

from __future__ import annotations

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
from photographs import check_streams, equal, take, write_folder, write_tars
from PIL import Image
from support import ROOT

from unite_fast.base.errors import UserError
from unite_fast.config import DataConfig, ModelConfig
from unite_fast.data import WorkerError, all_images, open_source
from unite_fast.data import pack as pack_module
from unite_fast.data.ahead import ahead
from unite_fast.data.index import main as index_main
from unite_fast.data.pack import main, pack
from unite_fast.data.verify import verify
from unite_kernels import extension
from unite_kernels.gather import gather_rows, gather_rows_reference

SIZE, COUNT = 64, 100
MODEL = ModelConfig(image_size=SIZE, num_classes=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("folder"), COUNT)


@pytest.fixture(scope="module")
def packs(folder, tmp_path_factory) -> Path:
    """One pack per format, with shards that do not divide the number of images."""
    root = tmp_path_factory.mktemp("packs")
    for format in ("uint8", "jpeg", "png"):
        pack(folder, root / format, SIZE, format, per_shard=28)
    return root


def opened(path: Path, source: str = "packed", **changes):
    return open_source(replace(DataConfig(source=source, path=str(path), workers=0), **changes), MODEL)


def files(path: Path) -> dict[str, bytes]:
    """Of a pack: all that does not depend on where its images came from."""
    found = {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}
    return {name: content for name, content in found.items() if name not in ("source.sha256", "made_of.npy")}


def one_line(path: Path, words: str, model: ModelConfig = MODEL, **changes) -> None:
    with pytest.raises(UserError, match=words) as caught:
        open_source(replace(DataConfig(source="packed", path=str(path)), **changes), model)
    assert "\n" not in str(caught.value)


# --- equality --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_packed_equals_folder_bit_for_bit(folder, packs, workers):
    source, reference = opened(packs / "uint8"), opened(folder, "folder")
    assert source.class_names == reference.class_names
    assert torch.equal(source.labels, reference.labels)
    check_streams(source, reference, workers=workers)
    assert equal(list(all_images(source, 30)), list(all_images(reference, 30)))
    for i in (0, 27, 28, 99):
        assert torch.equal(source.load(i, position=i, seed=3), reference.load(i, position=i, seed=3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("workers", [0, 2])
def test_packed_on_the_gpu(packs, workers):
    source = opened(packs / "uint8")
    batches = take(source, 6, global_batch=36, device="cuda", workers=workers)
    assert all(b.images.is_cuda and b.images.dtype == torch.uint8 for b in batches)
    assert equal(take(source, 6, global_batch=36), [[t.cpu() for t in b] for b in batches])


def test_png_shards_are_exact_and_jpeg_shards_close(folder, packs):
    reference, png, close = opened(folder, "folder"), opened(packs / "png"), opened(packs / "jpeg", crop="fast")
    check_streams(png, reference, steps=3)
    difference = (next(all_images(close, 100)).images.int() - next(all_images(reference, 100)).images.int()).abs()
    assert 0 < difference.float().mean() < 2
    assert equal(take(png, 2, global_batch=40, workers=1), take(reference, 2, global_batch=40))


def test_pack_from_tars_and_parquet_equals_pack_from_folder(folder, packs, tmp_path):
    tars = write_tars(tmp_path / "tars", folder)
    assert index_main([str(tars)]) == 0
    pack(tars, tmp_path / "of_tars", SIZE, per_shard=28)
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    reference = opened(folder, "folder")
    rows = [{"bytes": reference.encoded(i), "path": None} for i in range(COUNT)]
    features = {"label": {"names": reference.class_names}}
    table = pyarrow.table({"image": rows, "label": reference.labels.numpy()})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    (tmp_path / "tables").mkdir()
    pq.write_table(table.slice(0, 60), tmp_path / "tables" / "a.parquet", row_group_size=17)
    pq.write_table(table.slice(60), tmp_path / "tables" / "b.parquet", row_group_size=17)
    pack(tmp_path / "tables", tmp_path / "of_tables", SIZE, per_shard=28)
    assert files(packs / "uint8") == files(tmp_path / "of_tars") == files(tmp_path / "of_tables")


def test_stats_list_names_every_image_and_its_pixels(folder, tmp_path, packs):
    pack(folder, tmp_path / "p", SIZE, per_shard=64, stats=True)
    lines = [line.split("\t") for line in (tmp_path / "p" / "stats.tsv").read_text().splitlines()]
    assert lines.pop(0) == ["number", "class", "sha256", "name"]
    reference = opened(folder, "folder")
    import hashlib

    for i, (number, label, digest, name) in enumerate(lines):
        assert (int(number), str(folder / name)) == (i, reference.name(i))
        assert name.startswith(label)
        pixels = np.ascontiguousarray(reference.load(i).permute(1, 2, 0).numpy())
        assert digest == hashlib.sha256(pixels).hexdigest()
    assert len(lines) == COUNT


def test_manifest_is_for_sha256sum(packs):
    for format in ("uint8", "png"):
        done = subprocess.run(
            ["sha256sum", "-c", "manifest.sha256"], cwd=packs / format, capture_output=True, text=True
        )
        assert done.returncode == 0
        assert done.stdout.count(": OK") == len(files(packs / format)) - 1


def test_pipeline_identifies_what_decides_the_pixels(folder, packs):
    import PIL

    plain, fast = opened(folder, "folder").pipeline_id(), opened(folder, "folder", crop="fast").pipeline_id()
    assert PIL.__version__ in plain
    assert "simplejpeg" in fast
    assert plain in opened(packs / "uint8").pipeline_id() != opened(packs / "jpeg").pipeline_id()


# --- stopping, continuing, refusing ----------------------------------------------------------------------


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


# --- damage ----------------------------------------------------------------------------------------------


def copy(packs: Path, format: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packs / format, tmp_path / format))


def test_damage_is_found_at_start_or_by_verify(packs, tmp_path, capsys):
    path = copy(packs, "uint8", tmp_path)
    shard, labels, index = path / "shard-00001.bin", path / "labels.npy", path / "index.json"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    one_line(path, "shard-00001.bin: .* bytes instead of .*truncated")
    shard.unlink()
    one_line(path, "shard-00001.bin: No such file")
    shard.write_bytes(content[:500] + bytes([content[500] ^ 1]) + content[501:])
    opened(path)  # the size is right: only verify can tell
    with pytest.raises(UserError, match=r"damaged: shard-00001.bin: its sha256"):
        main(["verify", str(path)])
    shard.write_bytes(content)
    assert main(["verify", str(path)]) == 0
    assert "100 images in 4 shards are intact" in capsys.readouterr().out
    good = labels.read_bytes()
    labels.write_bytes(good[:-1] + b"\x07")
    one_line(path, "labels.npy: its sha256")
    labels.write_bytes(good)
    text = index.read_text()
    for wrong in ("", "[]", "{}", "nul", text.replace('"uint8"', '"tiff"'), text.replace('"size": 64', '"size": -1')):
        index.write_text(wrong)
        one_line(path, "index.json: not")
    index.write_text(text.replace('"version": 1', '"version": 2'))
    one_line(path, "not of version 1")
    index.write_text(text.replace('"count": 28', '"count": 27', 1))
    one_line(path, "bytes for the 27 images")


@pytest.mark.parametrize(
    "change",
    [{"class_names": [1, 2]}, {"class_names": 3}, {"crop": 7}, {"size": 64.0}, {"size": True}, {"labels_sha256": None},
     {"shards": [{"count": 1e999, "bytes": 1, "sha256": ""}]}, {"shards": 7}],
    ids=str,
)  # fmt: skip
def test_an_index_of_other_types_is_one_line(packs, tmp_path, change):
    root = shutil.copytree(packs / "uint8", tmp_path / "p")
    text = json.dumps(json.loads((root / "index.json").read_text()) | change)
    (root / "index.json").write_text(text.replace("Infinity", "1e999"))
    one_line(root, "index.json: not an index of packed shards; pack the images again")
    (root / "index.json").write_text("[" * 100_000)
    one_line(root, "index.json: not valid JSON; pack the images again")


def test_damaged_record_of_an_encoded_shard(packs, tmp_path):
    path = copy(packs, "png", tmp_path)
    source = opened(path)
    start = int(source._extents[40, 0])
    shard = path / "shard-00001.bin"
    content = bytearray(shard.read_bytes())
    content[start + 60 : start + 90] = bytes(30)
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-00001.bin, image 12: "):
        source.load(40)
    with pytest.raises(UserError, match=r"damaged: shard-00001.bin.*and 1 more"):
        verify(path)
    skipping = opened(path, on_error="skip", flip=False)
    images = next(all_images(skipping, 100)).images
    assert torch.equal(images[40], images[41])
    assert list(skipping.skipped) == [40]


def test_shard_that_vanishes_after_start(packs, tmp_path):
    path = copy(packs, "uint8", tmp_path)
    source = opened(path)
    (path / "shard-00003.bin").unlink()
    for workers in (0, 1):
        with pytest.raises(UserError, match="shards were there at start"):
            list(all_images(source, 100, workers=workers))


# --- the gather and the thread ---------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3, 64])
@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (3, 64, 64)])
def test_gather_rows(shape, threads):
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randint(0, 256, (n, *shape), generator=generator, dtype=torch.uint8) for n in (1, 9, 4)]
    part = torch.randint(0, 3, (23,), generator=generator)
    row = (torch.rand(23, generator=generator) * torch.tensor([1, 9, 4])[part]).long()
    out, expected = torch.full((2, 23, *shape), 77, dtype=torch.uint8)
    gather_rows(parts, part, row, out, threads)
    gather_rows_reference(parts, part, row, expected)
    assert torch.equal(out, expected)
    gather_rows(parts, part[:0], row[:0], out[:0], threads)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"row": torch.tensor([0, 9])}, "row 9 of 9"),
        ({"row": torch.tensor([0, -1])}, "row -1"),
        ({"part": torch.tensor([0, 1])}, "part 1 of 1"),
        ({"part": torch.tensor([0.0, 0.0])}, "part must be int64"),
        ({"row": torch.tensor([0])}, "row must have shape"),
        ({"out": torch.zeros(2, 5, dtype=torch.uint8)}, "4 bytes, of out 5"),
        ({"out": torch.zeros(2, 4)}, "out must be uint8"),
        ({"out": torch.zeros(4, 2, dtype=torch.uint8).t()}, "out must be contiguous"),
        ({"threads": 0}, "threads must be positive"),
    ],
)
def test_gather_rows_refuses(change, words):
    arguments = {
        "parts": [torch.zeros(9, 4, dtype=torch.uint8)],
        "part": torch.tensor([0, 0]),
        "row": torch.tensor([0, 8]),
        "out": torch.zeros(2, 4, dtype=torch.uint8),
    }
    gather_rows(**arguments)
    with pytest.raises(RuntimeError, match=words):
        gather_rows(**arguments | change)


def test_without_the_library_a_pack_of_pixels_is_refused(packs, monkeypatch):
    monkeypatch.setattr(extension, "obstacle", lambda kind: f"_C_{kind}.so is not built")
    one_line(packs / "uint8", "data.source=packed: _C_cpu.so is not built")
    assert len(opened(packs / "png")) == COUNT  # decoded by Pillow


def test_ahead_keeps_order_passes_errors_and_ends():
    import threading

    assert list(ahead(lambda x: x * x, range(50), 2, 10, str)) == [x * x for x in range(50)]

    def fail(x: int) -> int:
        if x == 3:
            raise ValueError("three")
        return x

    seen = []
    with pytest.raises(ValueError, match="three"):
        seen.extend(ahead(fail, range(9), 2, 10, str))
    with pytest.raises(WorkerError, match=r"no images for 0.2 s \(data.timeout\) while reading that shard"):
        next(ahead(time.sleep, [3], 2, 0.2, lambda: "that shard"))
    before = set(threading.enumerate())
    endless = ahead(lambda x: x, iter(int, 1), 2, 10, str)
    assert next(endless) == 0
    (thread,) = set(threading.enumerate()) - before
    endless.close()
    thread.join(20)
    assert not thread.is_alive()


def test_packed_forked_and_pickled(packs):
    import pickle

    source = opened(packs / "uint8")
    source.load(3)
    again = pickle.loads(pickle.dumps(source))
    assert torch.equal(again.load(99), source.load(99))


def test_elongated_image_is_refused(tmp_path):
    (tmp_path / "f" / "a").mkdir(parents=True)
    Image.new("L", (200_000, 1)).save(tmp_path / "f" / "a" / "x.png")
    with pytest.raises(UserError, match="too elongated"):
        pack(tmp_path / "f", tmp_path / "p", 1024)
