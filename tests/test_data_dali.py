"""DALI on the CPU: our order and geometry, its stated difference from Pillow, and one bad image out of a batch."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from photographs import SIZES, check_streams, crop, equal, jpeg, photographs, take, write_folder, write_tars
from PIL import Image

from unite_fast.base.errors import UserError
from unite_fast.config import DataConfig, ModelConfig
from unite_fast.data import WorkerError, all_images, open_source
from unite_fast.data.dali import cut, most_halvings
from unite_fast.data.index import main as index_main
from unite_fast.data.pack import pack
from unite_fast.data.transforms import MAX_PIXELS, RANDOM_CROPS, transform

pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI: pip install nvidia-dali-cuda130")

MODEL = ModelConfig(image_size=64, num_classes=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("folder"), 80)


def opened(path: Path, source: str = "dali", **changes):
    return open_source(replace(DataConfig(source=source, path=str(path), workers=0), **changes), MODEL)


def difference(a, b) -> torch.Tensor:
    return (a.images.int() - b.images.int()).abs().float()


def test_order_labels_resume_and_world_size(folder):
    source, reference = opened(folder), opened(folder, "folder")
    whole = take(source, 3, global_batch=70)  # more than a chunk, less than two
    check_streams(source, source, steps=3, batch=42, workers=2)
    for a, b in zip(whole, take(reference, 3, global_batch=70), strict=True):
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.samples, b.samples)
        assert difference(a, b).flatten(1).mean(1).max() < 6  # the same picture, mirrored or not
    assert torch.equal(source.load(7, position=3, seed=5), opened(folder).load(7, position=3, seed=5))


@pytest.mark.parametrize("name", ["adm", "resize_random", "random_resized"])
def test_difference_from_pillow_without_halving(tmp_path, name):
    """The figures of dali.py for images that are not halved first."""
    for k in range(24):
        (tmp_path / "a").mkdir(exist_ok=True)
        image = crop(9 * k + (0, 1, 2, 4)[k % 4]).resize((70 + k, 120 - k), Image.Resampling.BICUBIC)
        (tmp_path / "a" / f"{k}.jpg").write_bytes(jpeg(image))
    model = replace(MODEL, num_classes=1)
    data = DataConfig(source="folder", path=str(tmp_path), crop=name)
    a = take(open_source(data, model), 2, global_batch=24)
    b = take(open_source(replace(data, source="dali"), model), 2, global_batch=24)
    for x, y in zip(a, b, strict=True):
        assert difference(x, y).mean() < 0.3
        assert difference(x, y).max() <= 12
        assert difference(x, y).max() > 0


def test_difference_from_pillow_after_halving(tmp_path):
    (tmp_path / "a").mkdir()
    for k, (width, height) in enumerate([(300, 213), (427, 301), (256, 256), (640, 427), (512, 320), (130, 420)]):
        (tmp_path / "a" / f"{k}.jpg").write_bytes(jpeg(photographs()[k % 2].crop((0, 0, width, height))))
    model = replace(MODEL, num_classes=1)
    data = DataConfig(source="folder", path=str(tmp_path), flip=False)
    a = next(all_images(open_source(data, model)))
    b = next(all_images(open_source(replace(data, source="dali"), model)))
    means = difference(a, b).flatten(1).mean(1)
    assert means.max() < 4
    assert means[[2, 4]].max() < 1.5  # even sides at every halving
    assert (a.images.float() - b.images.float()).mean().abs() < 1  # Pillow rounds up in each halving


@pytest.mark.parametrize("name", ["adm", *RANDOM_CROPS])
def test_geometry_is_that_of_the_pillow_crop(name):
    """The numbers handed to DALI, carried out by Pillow, give Pillow's crop."""
    generator = torch.Generator().manual_seed(2)
    for width, height in [*SIZES, (64, 64), (1, 9), (1000, 130)]:
        image = Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))
        draw = torch.rand(1 + RANDOM_CROPS.get(name, (0,))[0], generator=generator)
        plan = cut(width, height, 64, name, draw)
        ours = image
        for size in plan.halved:
            ours = ours.resize(size[::-1], Image.Resampling.BOX)
        (top, left), (h, w), (y, x) = plan.corner, plan.kept, plan.anchor
        ours = ours.crop((left, top, left + w, top + h)).resize(plan.resized[::-1], Image.Resampling.BICUBIC)
        ours = torch.from_numpy(np.array(ours.crop((x, y, x + 64, y + 64)))).permute(2, 0, 1)
        assert torch.equal(ours, transform(image, 64, name, False, draw))


def test_enough_halvings_for_any_allowed_image():
    for size in (8, 64, 256):
        side = int(MAX_PIXELS**0.5)
        assert len(cut(side, side, size, "adm", None).halved) <= most_halvings(size)


def test_tars_and_jpeg_shards(folder, tmp_path):
    tars = write_tars(tmp_path / "tars", folder)
    index_main([str(tars)])
    assert equal(take(opened(tars), 2, global_batch=60), take(opened(folder), 2, global_batch=60))
    pack(folder, tmp_path / "packed", 64, "jpeg", per_shard=30)
    plain = opened(tmp_path / "packed", "packed")
    for a, b in zip(
        take(opened(tmp_path / "packed"), 2, global_batch=60), take(plain, 2, global_batch=60), strict=True
    ):
        assert equal([a], [b])  # decoding is exact, and nothing is resized


def test_other_formats_go_through_pillow(folder, tmp_path):
    for k, (mode, suffix) in enumerate([("RGBA", "png"), ("CMYK", "jpg"), ("P", "png"), ("RGB", "webp"), ("L", "jpg")]):
        (tmp_path / f"{k}").mkdir()
        crop(k).convert(mode).save(tmp_path / f"{k}" / f"x.{suffix}")
    model = replace(MODEL, num_classes=5)
    data = DataConfig(source="folder", path=str(tmp_path))
    a, b = (take(open_source(replace(data, source=kind), model), 8, global_batch=5) for kind in ("folder", "dali"))
    for x, y in zip(a, b, strict=True):
        other = x.labels != 4
        assert torch.equal(x.images[other], y.images[other])
        assert difference(x, y).flatten(1).mean(1).max() < 4


def test_exif_orientation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.jpg").write_bytes(jpeg(crop(0), exif=exif))
    (tmp_path / "a" / "1.jpg").write_bytes(jpeg(crop(0)))
    source = open_source(DataConfig(source="dali", path=str(tmp_path)), replace(MODEL, num_classes=1))
    assert torch.equal(source.load(0), source.load(1))


@pytest.fixture
def damaged(tmp_path) -> Path:
    """Image 5 is cut in two (DALI loses the batch), 40 and 41 are no images, 79 is empty."""
    root = write_folder(tmp_path, 80)
    paths = sorted(root.rglob("*.jpg"), key=lambda p: (p.parent.name, p.name))
    paths[5].write_bytes(paths[5].read_bytes()[:2000])
    paths[40].write_bytes(b"text")
    paths[41].write_bytes(b"text")
    paths[79].write_bytes(b"")
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_fail_names_the_image(damaged, workers):
    source = opened(damaged, on_error="fail")
    with pytest.raises(UserError, match=r"0020.jpg: .*truncated.*on_error=skip") as caught:
        list(all_images(source, 30, workers=workers))
    assert "\n" not in str(caught.value)
    for index, words in ((40, r"0002.jpg: not a JPEG"), (79, "the file is empty")):
        with pytest.raises(UserError, match=words):
            source.load(index)


def test_skip_replaces_by_the_same_neighbours_as_pillow(damaged, caplog):
    source, reference = opened(damaged, on_error="skip"), opened(damaged, "folder", on_error="skip")
    with caplog.at_level(logging.WARNING, "unite_fast.data"):
        a = take(source, 3, global_batch=60, workers=2)
        count = len(caplog.records)
        b = take(reference, 3, global_batch=60)
    assert count == len(source.skipped) == 4
    assert source.skipped.keys() == reference.skipped.keys()
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.labels, y.labels)
        assert difference(x, y).flatten(1).mean(1).max() < 6
    plain = next(all_images(opened(damaged, on_error="skip"), 80))
    assert torch.equal(plain.images[5], plain.images[6])
    assert torch.equal(plain.images[40], plain.images[42])
    assert torch.equal(plain.images[79], plain.images[0])
    assert plain.labels[79] == 0


def test_skip_stops_above_the_limit(damaged):
    for path in sorted(damaged.rglob("*.jpg"))[20:25]:
        path.write_bytes(b"")
    with pytest.raises(UserError, match="6 of 80 images are unreadable, more than the 5"):
        list(all_images(opened(damaged, on_error="skip"), 80))


def test_stalled_storage_names_the_file(folder, monkeypatch):
    import time

    source = opened(folder)
    real = source.inner.encoded
    monkeypatch.setattr(source.inner, "encoded", lambda i: time.sleep(30) if i == 9 else real(i))
    with pytest.raises(WorkerError, match=rf"no images for 1 s .*{source.name(9)}"):
        list(all_images(source, 20, workers=2, timeout=1))


def test_refusals(folder, tmp_path):
    for changes, words in (
        ({"crop": "fast"}, "data.crop=fast is for"),
        ({"path": ""}, "data.path is empty"),
        ({"path": str(tmp_path / "none")}, "no such folder"),
    ):
        with pytest.raises(UserError, match=words):
            open_source(replace(DataConfig(source="dali", path=str(folder)), **changes), MODEL)
    with pytest.raises(UserError, match="RGB images, but"):
        open_source(DataConfig(source="dali", path=str(folder)), replace(MODEL, channels=1))
    with pytest.raises(UserError, match="4 classes but"):
        open_source(DataConfig(source="dali", path=str(folder)), replace(MODEL, num_classes=9))


def test_pipeline_names_dali_its_version_and_the_device(folder):
    import nvidia.dali

    source = opened(folder)
    assert f"dali-{nvidia.dali.__version__}-cpu" in source.pipeline_id("cpu")
    assert f"dali-{nvidia.dali.__version__}-mixed" in source.pipeline_id("cuda:1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_mixed_is_close_to_the_cpu(folder):
    for a, b in zip(
        take(opened(folder), 3, global_batch=70),
        take(opened(folder), 3, global_batch=70, device="cuda", workers=2),
        strict=True,
    ):
        assert b.images.is_cuda
        assert torch.equal(a.labels, b.labels.cpu())
        assert (a.images.int() - b.images.cpu().int()).abs().float().mean() < 3
