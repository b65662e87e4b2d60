"""Packed shards: equal to the folder they were made of, and honest about damage."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from packs import COUNT, SIZE, files, one_line, opened, write_packs
from photographs import check_streams, equal, take, write_folder, write_tars

from unite_fast.base.errors import UserError
from unite_fast.data import all_images
from unite_fast.data.index import main as index_main
from unite_fast.data.pack import main, pack
from unite_fast.data.verify import verify
from unite_kernels import extension


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("folder"), COUNT)


@pytest.fixture(scope="module")
def packs(folder, tmp_path_factory) -> Path:
    return write_packs(folder, tmp_path_factory.mktemp("packs"), "uint8", "jpeg", "png")


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


def test_without_the_library_a_pack_of_pixels_is_refused(packs, monkeypatch):
    monkeypatch.setattr(extension, "obstacle", lambda kind: f"_C_{kind}.so is not built")
    one_line(packs / "uint8", "data.source=packed: _C_cpu.so is not built")
    assert len(opened(packs / "png")) == COUNT  # decoded by Pillow


def test_packed_forked_and_pickled(packs):
    source = opened(packs / "uint8")
    source.load(3)
    again = pickle.loads(pickle.dumps(source))
    assert torch.equal(again.load(99), source.load(99))
