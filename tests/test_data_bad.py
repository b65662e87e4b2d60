"""Every kind of unusual or damaged image through every source that decodes, and 500 mutated JPEGs."""

from __future__ import annotations

import hashlib
import io
import struct
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from photographs import crop, jpeg, write_tars
from PIL import Image

from unite_fast.base.errors import UserError
from unite_fast.config import DataConfig, ModelConfig
from unite_fast.data import BadImage, Source, all_images, open_source
from unite_fast.data import loader as loader_module
from unite_fast.data.containers import open_container
from unite_fast.data.encoded import EncodedSource
from unite_fast.data.index import main as index_main
from unite_fast.data.packed import Index, Shard, shard_name
from unite_fast.data.transforms import adm_crop, to_tensor

SIZE = 48
MODEL = ModelConfig(image_size=SIZE, num_classes=1)
KINDS = ("folder", "fast", "tar", "packed", "parquet", "dali")


def write_folder(root: Path, images: list[bytes]) -> None:
    (root / "a").mkdir(parents=True)
    for k, content in enumerate(images):
        (root / "a" / f"{k:04d}.jpg").write_bytes(content)


def write_pack(root: Path, images: list[bytes]) -> None:
    """A pack of jpeg whose records are any bytes at all."""
    root.mkdir()
    lengths = np.array([len(content) for content in images])
    arrays = {
        "labels.npy": np.zeros(len(images), dtype=np.int32),
        "extents.npy": np.stack([np.cumsum([0, *lengths[:-1]]), lengths], 1).astype(np.int64),
    }
    hashes = {}
    for name, array in arrays.items():
        np.save(root / name, array)
        hashes[name] = hashlib.sha256((root / name).read_bytes()).hexdigest()
    content = b"".join(images)
    (root / shard_name(0)).write_bytes(content)
    shards = [Shard(len(images), len(content), hashlib.sha256(content).hexdigest())]
    index = Index("jpeg", SIZE, "test", ["a"], shards, hashes["labels.npy"], hashes["extents.npy"], [])
    (root / "index.json").write_text(index.to_json())


def source_of(kind: str, images: list[bytes], root: Path, **changes) -> Source:
    """A source of ``kind`` over these files' contents, in this order."""
    needs = {"dali": "nvidia.dali", "parquet": "pyarrow.parquet", "fast": "simplejpeg"}
    module = pytest.importorskip(needs[kind]) if kind in needs else None
    write_folder(root / "folder", images)
    data = DataConfig(source="folder", path=str(root / "folder"), workers=0, flip=False)
    if kind == "fast":
        data = replace(data, crop="fast")
    elif kind == "dali":
        data = replace(data, source="dali")
    elif kind == "tar":
        index_main([str(write_tars(root / "tars", root / "folder", tars=2))])
        data = replace(data, source="tar", path=str(root / "tars"))
    elif kind == "packed":
        write_pack(root / "packed", images)
        data = replace(data, source="packed", path=str(root / "packed"))
    elif kind == "parquet":
        import pyarrow

        rows = [{"bytes": content, "path": None} for content in images]
        module.write_table(pyarrow.table({"image": rows, "label": [0] * len(images)}), root / "a.parquet")
        return open_container(root / "a.parquet", "SOURCE", replace(data, **changes), MODEL)
    return open_source(replace(data, **changes), MODEL)


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A small PNG file that declares any size."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", zlib.compress(bytes(99))) + part(b"IEND", b"")


def jpeg_of_size(width: int, height: int) -> bytes:
    """A JPEG file whose header declares any size."""
    content = bytearray(jpeg(crop(0)))
    at = content.index(b"\xff\xc0") + 5
    content[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(content)


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return jpeg(crop(0), exif=exif)


GRAY16 = Image.fromarray(np.asarray(crop(0).convert("L")).astype(np.uint16) * 3)
USUAL = {
    "plain": lambda: jpeg(crop(0)),
    "progressive": lambda: jpeg(crop(0), progressive=True, optimize=True),
    "without subsampling": lambda: jpeg(crop(0), subsampling=0),
    "cmyk": lambda: jpeg(crop(0).convert("CMYK")),
    "gray": lambda: jpeg(crop(0).convert("L")),
    "exif rotated": turned,
    "tiny": lambda: jpeg(Image.new("RGB", (1, 1), (10, 200, 30))),
    "palette": lambda: encoded(crop(0).convert("P"), "PNG"),
    "transparent": lambda: encoded(crop(0).convert("RGBA"), "PNG"),
    "webp": lambda: encoded(crop(0), "WEBP"),
}
DAMAGED = {
    "truncated": (lambda: jpeg(crop(1))[: len(jpeg(crop(1))) // 2], "truncated"),
    "without end": (lambda: jpeg(crop(0))[:-40], "truncated"),
    "header alone": (lambda: jpeg(crop(0))[:100], "."),
    "empty": (lambda: b"", "empty"),
    "text": (lambda: b"this is not an image", "not a JPEG, PNG or WebP"),
    "zeros": (lambda: bytes(5000), "not a JPEG, PNG or WebP"),
    "gif": (lambda: encoded(crop(0), "GIF"), "not a JPEG, PNG or WebP"),
    "truncated png": (lambda: encoded(crop(0), "PNG")[:3000], "."),
    "bomb": (lambda: png_header(14000, 14000), "pixels"),
    "jpeg bomb": (lambda: jpeg_of_size(60000, 60000), "pixels"),
    "16 bit": (lambda: encoded(GRAY16, "PNG"), "gray of 16 bits, which 8 would clip"),
    "elongated": (lambda: encoded(Image.new("L", (60_000, 1)), "PNG"), "too elongated"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_unusual_images_become_what_pillow_makes_of_them(kind, tmp_path):
    images = [make() for make in USUAL.values()]
    source = source_of(kind, images, tmp_path)
    for i, (name, content) in enumerate(zip(USUAL, images, strict=True)):
        expected = to_tensor(adm_crop(Image.open(io.BytesIO(content)).convert("RGB"), SIZE))
        difference = (source.load(i).int() - expected.int()).abs()
        allowed = {"fast": 3, "dali": 12}.get(kind, 0)
        assert difference.max() <= allowed, name


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_images_are_named_and_replaced(kind, tmp_path, monkeypatch):
    good = jpeg(crop(1))
    images = [good]
    for make, _ in DAMAGED.values():
        images += [make(), good]
    source = source_of(kind, images, tmp_path)
    started = time.monotonic()
    for i, (name, (_, words)) in enumerate(DAMAGED.items()):
        with pytest.raises(UserError, match=words) as caught:
            source.load(2 * i + 1)
        assert "\n" not in str(caught.value), name
        assert str(caught.value).startswith(source.name(2 * i + 1)), name
    with pytest.raises(UserError, match=r"data\.on_error=skip"):
        list(all_images(source, 64))
    monkeypatch.setattr(loader_module, "MIN_SKIPPED", len(DAMAGED))
    source.on_error = "skip"
    batch = next(all_images(source, 64))
    assert (batch.images == batch.images[:1]).all()
    assert len(source.skipped) == len(DAMAGED)
    assert time.monotonic() - started < 20


def mutated(count: int) -> list[bytes]:
    """Real JPEGs, cut short, with bytes changed, exchanged, or removed; some keep their length."""
    generator = np.random.default_rng(7)
    originals = [jpeg(crop(k), progressive=k % 3 == 0) for k in range(4)]
    results = []
    for k in range(count):
        content = bytearray(originals[k % 4])
        for _ in range(generator.integers(1, 9)):
            at = int(generator.integers(2 if k % 2 else 600, len(content)))
            kind = generator.integers(4)
            if kind == 0:
                content[at] = generator.integers(256)
            elif kind == 1:
                content[at : at + 4] = generator.bytes(4)
            elif kind == 2:
                del content[at : at + int(generator.integers(1, 40))]
            elif k % 5 == 0:
                del content[at:]
                content += bytes(2)
        results.append(bytes(content))
    return results


@pytest.fixture(scope="module")
def fuzzed() -> tuple[list[bytes], list[torch.Tensor | str]]:
    """500 mutated JPEGs and what Pillow makes of each: the ADM crop, or an error."""
    images = mutated(500)
    truth: list[torch.Tensor | str] = []
    for content in images:
        try:
            truth.append(to_tensor(adm_crop(Image.open(io.BytesIO(content), formats=["JPEG"]).convert("RGB"), SIZE)))
        except Exception as error:
            truth.append(type(error).__name__)
    bad = sum(isinstance(result, str) for result in truth)
    assert 100 < bad < 400
    return images, truth


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_fuzz(kind, fuzzed, tmp_path, monkeypatch):
    """No source crashes, hangs, or says anything but BadImage; which images are bad, all agree with Pillow."""
    images, truth = fuzzed
    started = time.monotonic()
    source = source_of(kind, images, tmp_path, on_error="skip")
    if isinstance(source, EncodedSource):
        for i, expected in enumerate(truth):
            try:
                image = source.read(i, None, 0)
            except BadImage as error:
                assert isinstance(expected, str), (i, str(error))  # noqa: PT017
                continue
            assert isinstance(expected, torch.Tensor), i
            assert (image.int() - expected.int()).abs().max() <= (3 if kind == "fast" else 0)
    else:
        monkeypatch.setattr(loader_module, "MIN_SKIPPED", 500)
        count = sum(len(batch.images) for batch in all_images(source, 125, workers=1, timeout=60))
        assert count == 500
        wrong = [i for i, expected in enumerate(truth) if (i in source.skipped) != isinstance(expected, str)]
        assert len(wrong) < 25  # DALI is stricter or laxer than Pillow about a few
    assert time.monotonic() - started < 60
