"""Packs of photographs: what the tests of packing and of training on packs share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from unite_fast.base.errors import UserError
from unite_fast.config import DataConfig, ModelConfig
from unite_fast.data import open_source
from unite_fast.data.pack import pack

SIZE, COUNT = 64, 100
MODEL = ModelConfig(image_size=SIZE, num_classes=4)


def write_packs(folder: Path, root: Path, *formats: str) -> Path:
    """One pack per format, with shards that do not divide the number of images."""
    for format in formats:
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
