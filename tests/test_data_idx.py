"""data.source=idx: MNIST's files, compressed or not, equal to their bytes; damaged ones are one line."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from unite_fast import data
from unite_fast.base.errors import UserError
from unite_fast.config import DataConfig, ModelConfig

GENERATOR = np.random.default_rng(0)
PIXELS = {name: GENERATOR.integers(0, 256, (n, 6, 6), dtype=np.uint8) for name, n in (("train", 12), ("t10k", 5))}
LABELS = {name: (np.arange(len(x)) % 3).astype(np.uint8) for name, x in PIXELS.items()}
MODEL = ModelConfig(image_size=6, patch_size=3, channels=1, num_classes=3)


def encoded(values: np.ndarray) -> bytes:
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in PIXELS:
        (tmp_path / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(encoded(PIXELS[name])))
        (tmp_path / f"{name}-labels-idx1-ubyte").write_bytes(encoded(LABELS[name]))
    return tmp_path


def opened(folder: Path, model: ModelConfig = MODEL, split: str = "train", **keys: str) -> data.Source:
    return data.open_source(DataConfig(source="idx", path=str(folder), flip=False, **keys), model, split)  # type: ignore[arg-type]


@pytest.mark.parametrize(("split", "name"), [("train", "train"), ("heldout", "t10k")])
def test_images_are_those_of_the_files(folder, split, name):
    source = opened(folder, split=split)
    (batch,) = data.all_images(source, 100)
    assert np.array_equal(batch.images[:, 0].numpy(), PIXELS[name])
    assert np.array_equal(batch.labels.numpy(), LABELS[name])


def test_another_size_and_colour(folder):
    model = ModelConfig(image_size=12, patch_size=3, channels=3, num_classes=3)
    image = opened(folder, model).load(0)
    assert image.shape == (3, 12, 12)
    assert image.dtype == torch.uint8
    assert abs(float(image.float().mean()) - PIXELS["train"][0].mean()) < 8


IMAGES, TEXT = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte"
WRONG = {
    "missing": (lambda p: (p / IMAGES).unlink(), "has neither"),
    "cut": (lambda p: (p / IMAGES).write_bytes((p / IMAGES).read_bytes()[:-20]), "cannot be read"),
    "short": (lambda p: (p / TEXT).write_bytes((p / TEXT).read_bytes()[:-1]), "its head says 12"),
    "long": (lambda p: (p / TEXT).write_bytes((p / TEXT).read_bytes() + b"x"), "its head says 12"),
    "head": (lambda p: (p / TEXT).write_bytes(b"\0"), "cannot be read"),
    "kind": (lambda p: (p / TEXT).write_bytes(encoded(PIXELS["t10k"])), "not an idx file"),
    "huge": (lambda p: (p / TEXT).write_bytes(struct.pack(">HBBI", 0, 8, 1, (1 << 32) - 1)), "its head says"),
    "none": (lambda p: (p / TEXT).write_bytes(encoded(LABELS["train"][:0])), "holds 0 bytes"),
    "unequal": (lambda p: (p / TEXT).write_bytes(encoded(LABELS["t10k"])), "12 images of train but 5 labels"),
    "classes": (lambda p: (p / TEXT).write_bytes(encoded(LABELS["train"] + 1)), "has 4 classes"),
}


@pytest.mark.parametrize("damage", WRONG)
def test_what_is_wrong_is_one_line(folder, damage):
    change, words = WRONG[damage]
    change(folder)
    with pytest.raises(UserError, match=words) as raised:
        opened(folder)
    assert "\n" not in str(raised.value)


def test_names_of_classes(folder):
    assert opened(folder).class_names == ["0", "1", "2"]
    for text, words in (("cat\ndog\n", "2 names for 3 classes"), ("cat\n\ndog", "an empty name"), ("a\nb\na", "twice")):
        (folder / "classes.txt").write_text(text)
        with pytest.raises(UserError, match=words):
            opened(folder)
    (folder / "classes.txt").write_text("cat\ndog\nüh\n")
    assert opened(folder).class_names == ["cat", "dog", "üh"]


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match=r"data\.path=.*no such folder"):
        opened(tmp_path / "nowhere")
