"""A folder of images: one sub-folder per class, JPEG, PNG or WebP at any depth below it, decoded by Pillow.

Classes are the sub-folders' names in sorted order, samples the sorted paths inside each, as in torchvision's
ImageFolder. Names that begin with a dot are ignored. Every image becomes what Pillow's ``convert("RGB")`` makes of
it, the same as in the reference pipeline: transparency is dropped, 16-bit gray is clipped at 255 (not scaled), and
EXIF orientation is not applied.
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from unite_fast.config import DataConfig, ModelConfig, UserError
from unite_fast.data.source import BadImage, FileSource, check_channels, check_classes
from unite_fast.data.transforms import MAX_PIXELS, RANDOM_CROPS, transform

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
FORMATS = ("JPEG", "PNG", "WEBP")  # decided by content: a PNG named .jpg is read, anything else is refused
MAX_ENCODED_BYTES = 128 * 2**20


def read_file(path: str) -> bytes:
    """The bytes of a regular, non-empty file of at most MAX_ENCODED_BYTES. Raises BadImage or OSError."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise BadImage("not a regular file")
    if status.st_size == 0:
        raise BadImage("the file is empty")
    if status.st_size > MAX_ENCODED_BYTES:
        raise BadImage(f"{status.st_size} bytes, more than the {MAX_ENCODED_BYTES} allowed")
    with open(path, "rb") as file:
        return file.read(MAX_ENCODED_BYTES)


def decode(data: bytes, mode: str = "RGB") -> Image.Image:
    """The first frame of an encoded image as ``mode`` (RGB, or L: gray made from RGB).

    Raises BadImage for more than MAX_PIXELS (before any pixel is decoded), and whatever Pillow raises.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of sizes (refused below), of palettes and of metadata
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(f"{image.width} x {image.height} pixels, more than the {MAX_PIXELS} allowed")
            rgb = image.convert("RGB")
    return rgb if mode == "RGB" else rgb.convert(mode)


class Paths:
    """A list of strings as two arrays: a million Python objects would be copied into every worker, page by page."""

    def __init__(self, paths: list[str]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self._bytes[self._ends[index] : self._ends[index + 1]].tobytes())


class Folder(FileSource):
    """uint8 images of an image folder."""

    def __init__(self, paths: list[str], labels: list[int], names: list[str], data: DataConfig, model: ModelConfig):
        super().__init__(torch.tensor(labels, dtype=torch.int64), names, data.flip)
        self.on_error = data.on_error
        self.size, self.crop = model.image_size, data.crop
        self.mode = "RGB" if model.channels == 3 else "L"
        self.lanes = 1 + (RANDOM_CROPS[data.crop][0] if data.crop in RANDOM_CROPS else 0)
        self._paths = Paths(paths)

    def name(self, index: int) -> str:
        return self._paths[index]

    def read(self, index: int, draw: Tensor | None, seed: int) -> Tensor:
        path = self._paths[index]
        try:
            return transform(decode(read_file(path), self.mode), self.size, self.crop, self.flip, draw)
        except (BadImage, MemoryError):
            raise
        except UnidentifiedImageError:
            raise BadImage("not a JPEG, PNG or WebP image") from None
        except Exception as error:  # damaged files raise nearly anything: OSError, SyntaxError, struct.error
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise BadImage(" ".join(reason.split()) or type(error).__name__) from error


def _class_names(root: Path, field: str) -> list[str]:
    """Sorted names of the class folders. Raises UserError."""
    try:
        entries = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
        loose = any(name.lower().endswith(EXTENSIONS) for name in os.listdir(root)) if not entries else False
    except FileNotFoundError:
        raise UserError(f"{field} {root}: no such folder; give a folder with one sub-folder per class") from None
    except OSError as error:
        raise UserError(f"{field} {root}: {error.strerror}; give a folder with one sub-folder per class") from None
    if loose:
        raise UserError(f"{field} {root} holds images but no class folders; move each class into a sub-folder")
    if not entries:
        raise UserError(f"{field} {root} holds no class folders and no images; put one sub-folder per class there")
    return entries


def _images_below(folder: Path) -> list[str]:
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = sorted(name for name in files if name.lower().endswith(EXTENSIONS) and not name.startswith("."))
        found += [os.path.join(parent, name) for name in names]
    return found


def open_folder(data: DataConfig, model: ModelConfig, split: str) -> Folder:
    """The images below data.path (train) or data.heldout_path (heldout). Raises UserError."""
    field, where = ("data.path", data.path) if split == "train" else ("data.heldout_path", data.heldout_path)
    if not where:
        raise UserError(f"{field} is empty; set it to a folder with one sub-folder of images per class")
    check_channels(model.channels, "data.source folder")
    root = Path(where)
    names = _class_names(root, field)
    hint = " (did you mean its 'train' sub-folder?)" if "train" in names else ""
    check_classes(len(names), model.num_classes, f"{field} {root}{hint}")
    paths: list[str] = []
    labels: list[int] = []
    empty = []
    for label, name in enumerate(names):
        found = _images_below(root / name)
        if not found:
            empty.append(name)
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise UserError(f"{field} {root}: no {', '.join(EXTENSIONS)} files in its {len(names)} class folders")
    if empty:
        more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        raise UserError(f"{field} {root}: class folder '{empty[0]}'{more} holds no images; add some or remove it")
    if split == "heldout" and data.path and os.path.isdir(data.path):
        trained = _class_names(Path(data.path), "data.path")
        if trained != names:
            odd = sorted(set(trained) ^ set(names))[0]
            raise UserError(f"{field} {root}: its class folders differ from those of data.path, first at '{odd}'")
    return Folder(paths, labels, names, data, model)
