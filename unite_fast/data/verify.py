"""Reads a pack back: hashes and images (``verify``), and the input list of FID statistics (``write_stats``)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from unite_fast.base import files, progress
from unite_fast.base.errors import UserError
from unite_fast.base.files import file_sha256
from unite_fast.config import DataConfig, ModelConfig
from unite_fast.data.encoded import EncodedSource
from unite_fast.data.packed import Index, open_packed, read_index, shard_name
from unite_fast.data.source import BadImage


def _open(dest: Path, index: Index):
    data = DataConfig(source="packed", path=str(dest), flip=False)
    return open_packed(data, ModelConfig(image_size=index.size, num_classes=len(index.class_names)), "train")


def images_of(dest: Path, index: Index) -> Iterator[tuple[str, Tensor | str]]:
    """(name, image uint8 (3, size, size), or the reason why there is none) of every packed image in order."""
    source = _open(dest, index)
    for i in range(len(source)):
        try:
            yield source.name(i), source.read(i, None, 0)
        except BadImage as error:
            yield source.name(i), str(error)


def verify(dest: Path) -> str:
    """Checks the hashes of a pack's files and decodes every jpeg or png image. Raises UserError naming what is bad."""
    index = read_index(dest, "DEST")
    _open(dest, index)  # sizes, labels, extents
    wrong = []
    total = sum(shard.bytes for shard in index.shards)
    with progress.bar(total=total, unit="B", unit_scale=True, desc="hashing") as bar:
        for number, shard in enumerate(index.shards):
            if file_sha256(dest / shard_name(number)) != shard.sha256:
                wrong.append(f"{shard_name(number)}: its sha256 is not the one in index.json")
            bar.update(shard.bytes)
    count = sum(shard.count for shard in index.shards)
    if index.format != "uint8":
        for name, image in progress.bar(images_of(dest, index), total=count, unit="image", desc="decoding"):
            if isinstance(image, str):
                wrong.append(f"{name}: {image}")
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise UserError(f"{dest} is damaged: {wrong[0]}{more}; remove it and pack again")
    return f"{dest}: {count:,} images in {len(index.shards)} shards are intact"


def _shown(name: str) -> str:
    """In one field of one line."""
    return name.replace("\t", "\\t").replace("\n", "\\n")


def write_stats(dest: Path, source: EncodedSource, source_path: Path) -> None:
    """Writes stats.tsv (see pack.py) for the pack at DEST of ``source``. Raises UserError."""
    index = read_index(dest, "DEST")
    left_out = {name for name, _ in index.skipped}
    names = (name for i in range(len(source)) if (name := source.name(i)) not in left_out)
    labels = _open(dest, index).labels.tolist()
    images = progress.bar(images_of(dest, index), total=len(labels), unit="image", desc="listing")
    with files.refusals(str(dest)), files.replacing(dest / "stats.tsv") as file:
        file.write(b"number\tclass\tsha256\tname\n")
        for number, (label, name, (where, image)) in enumerate(zip(labels, names, images, strict=True)):
            if isinstance(image, str):
                raise UserError(f"{where}: {image}; run verify")
            digest = hashlib.sha256(image.permute(1, 2, 0).numpy().tobytes()).hexdigest()
            name_in = os.path.relpath(name, source_path)
            row = f"{number}\t{_shown(index.class_names[label])}\t{digest}\t{_shown(name_in)}\n"
            file.write(row.encode(errors="surrogateescape"))
