"""Sets of images in the idx format of MNIST (LeCun), as Debian's package ``dataset-fashion-mnist``, held in memory.

``data.path`` is a folder with the four files under their published names, each with ``.gz`` or without:

    train-images-idx3-ubyte  train-labels-idx1-ubyte     what is trained on
    t10k-images-idx3-ubyte   t10k-labels-idx1-ubyte      what is held out; of ``data.heldout_path`` where that is given

and, where it has one, ``classes.txt``, the classes' names in their order, a line each; else they are their numbers.

A file is 2 zero bytes, the type (8: unsigned byte), the number of dimensions, each dimension as a big-endian int32, and
the values.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unite_fast.base.errors import UserError
from unite_fast.base.files import read_text
from unite_fast.config import DataConfig, ModelConfig
from unite_fast.data.folder import place
from unite_fast.data.source import HeldSource, check_channels, check_classes, numbered

UNSIGNED_BYTE = 8
MOST_BYTES = 1 << 32  # what a file may say that it holds: more is no set for memory
PARTS = {"train": "train", "heldout": "t10k"}


class Idx(HeldSource):
    """uint8 images."""

    def __init__(self, images: Tensor, labels: Tensor, flip: bool, names: list[str], sha256: str = "") -> None:
        """sha256: of the pixels before they were resized, which not every machine rounds alike."""
        super().__init__(images, labels, names or numbered(int(labels.max()), "the labels"), flip)
        self._sha256 = sha256

    def bytes_sha256(self) -> str:
        return self._sha256


def read(folder: Path, name: str, dimensions: int) -> Tensor:
    """The uint8 tensor of FOLDER/NAME or FOLDER/NAME.gz. Raises UserError."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise UserError(f"{folder} has neither {name} nor {name}.gz; data.source=idx needs its four files there")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            zeros, kind, found = struct.unpack(">HBB", file.read(4))
            if zeros or kind != UNSIGNED_BYTE or found != dimensions:
                raise UserError(f"{path}: not an idx file of unsigned bytes in {dimensions} dimensions")
            shape = struct.unpack(f">{found}I", file.read(4 * found))
            size = math.prod(shape)
            if not 0 < size <= MOST_BYTES:
                raise UserError(f"{path}: says that it holds {size} bytes; between 1 and {MOST_BYTES} can be read")
            content = file.read(size + 1)
    except (OSError, EOFError, struct.error, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); fetch it again") from None
    if len(content) != size:
        raise UserError(f"{path}: {len(content)} values or more, but its head says {size}; fetch it again")
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8).reshape(shape).copy())


def class_names(folder: Path) -> list[str]:
    """Those of FOLDER/classes.txt; none where there is no such file. Raises UserError."""
    path = folder / "classes.txt"
    try:
        names = [line.strip() for line in read_text(path).splitlines()] if path.is_file() else []
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); mend or remove it") from None
    if "" in names or len(set(names)) != len(names):
        raise UserError(f"{path}: an empty name, or one that stands twice; write each class once, a line each")
    return names


def open_idx(data: DataConfig, model: ModelConfig, split: str) -> Idx:
    """The images at model.image_size (antialiased bicubic where theirs is another), gray or repeated to RGB."""
    if data.crop != "adm":
        raise UserError(f"data.crop={data.crop} is for image folders; set data.crop=adm for data.source=idx")
    check_channels(model.channels, "data.source idx")
    key, folder = place(data, split if data.heldout_path else "train", "a folder with the four files of a set")
    if not folder.is_dir():
        raise UserError(f"{key}={folder}: no such folder; data.source=idx reads its four files there")
    images, labels = (
        read(folder, f"{PARTS[split]}-images-idx3-ubyte", 3),
        read(folder, f"{PARTS[split]}-labels-idx1-ubyte", 1),
    )
    if len(images) != len(labels):
        raise UserError(f"{folder}: {len(images)} images of {split} but {len(labels)} labels; fetch them again")
    names, classes = class_names(folder), int(labels.max()) + 1
    if names and len(names) != classes:
        raise UserError(f"{folder / 'classes.txt'}: {len(names)} names for {classes} classes; mend or remove it")
    check_classes(classes, model.num_classes, str(folder))
    pixels = images[:, None]
    size = (model.image_size, model.image_size)
    if pixels.shape[-2:] != size:
        pixels = torch.cat([_resized(part, size) for part in pixels.split(4096)])
    sha256 = hashlib.sha256(images.numpy().data).hexdigest()
    return Idx(pixels.repeat(1, model.channels, 1, 1), labels.long(), data.flip, names, sha256)


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 (n, 1, H, W) -> uint8 (n, 1, *size)."""
    made = F.interpolate(images.float(), size, mode="bicubic", antialias=True, align_corners=False)
    return made.round().clamp(0, 255).to(torch.uint8)
