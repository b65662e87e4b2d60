"""A folder of images: one sub-folder per class, JPEG, PNG or WebP at any depth below it.

Classes are the sub-folders' names in sorted order, samples the sorted paths inside each, as in torchvision's
ImageFolder. Names that begin with a dot are ignored. What becomes of an image's bytes is said in encoded.py.
"""

from __future__ import annotations

import os
import stat
import unicodedata
from collections import Counter
from pathlib import Path

from PIL import Image

from unite_fast.base.errors import UserError
from unite_fast.config import DataConfig, ModelConfig
from unite_fast.data.encoded import (
    EXTENSIONS,
    HEAD_BYTES,
    MAX_ENCODED_BYTES,
    EncodedSource,
    Names,
    check_bytes,
    decode,
    explain,
    labels_of,
)
from unite_fast.data.listing import Folders, check_split_folders, images_below, say_left_out
from unite_fast.data.source import BadImage, NoPath, check_channels, check_classes


def read_file(path: str, most: int = MAX_ENCODED_BYTES) -> bytes:
    """The first bytes of a regular, non-empty file of a size that check_bytes allows. Raises BadImage or OSError."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise BadImage("not a regular file")
    check_bytes(status.st_size)
    with open(path, "rb") as file:
        return file.read(most)


def read_image(path: str | Path, mode: str = "RGB", alpha: str = "white", mend: str = "") -> Image.Image:
    """One image that a user names; mode, alpha: as of ``decode``. Raises UserError, which ends with ``mend``."""
    try:
        return decode(read_file(str(path)), mode, alpha)
    except Exception as error:  # Pillow's readers raise many kinds; each means an unreadable image
        raise UserError(f"cannot read {path}: {explain(error)}{mend}") from None


class Folder(EncodedSource):
    """The images of an image folder."""

    def __init__(
        self, root: Path, paths: list[str], labels: list[int], names: list[str], data: DataConfig, model: ModelConfig
    ) -> None:
        super().__init__(labels_of(labels), names, data, model)
        self._paths, self._root = Names(paths), len(os.fsencode(root))

    def names_sha256(self) -> str:
        return self._paths.sha256(self._root)

    def name(self, index: int) -> str:
        return self._paths[index]

    def file(self, index: int) -> str:
        return self._paths[index]

    def length(self, index: int) -> int:
        try:
            return os.stat(self._paths[index]).st_size
        except OSError:  # said when it is read
            return 0

    def encoded(self, index: int) -> bytes:
        return read_file(self._paths[index])

    def head(self, index: int) -> bytes:
        return read_file(self._paths[index], HEAD_BYTES)


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
        raise UserError(
            f"{field} {root} holds images but no class folders; move each class into a sub-folder, or train without "
            "classes by model.num_classes=0"
        )
    if not entries:
        raise UserError(f"{field} {root} holds no class folders and no images; put one sub-folder per class there")
    composed = Counter(normal(entry) for entry in entries)
    if twice := [entry for entry in entries if composed[normal(entry)] > 1]:
        raise UserError(
            f"{field} {root}: two class folders are called '{normal(twice[0])}', which Unicode writes in two ways; "
            "move their images into one"
        )
    return entries


def normal(name: str) -> str:
    """A name as it is compared: file systems write the same letters in several ways."""
    return unicodedata.normalize("NFC", name)


def list_folder(root: Path, field: str, labelled: bool = True) -> tuple[list[str], list[int], list[str]]:
    """Paths and labels of the images, and the class names; without ``labelled`` of all images below ``root``, with the
    label 0 and no names. Raises UserError."""
    if not labelled and not root.is_dir():
        raise UserError(f"{field} {root}: no such folder; give a folder of images")
    names = _class_names(root, field) if labelled else []
    folders, above = ([root / name for name in names], [root]) if labelled else ([root], [])
    left_out: Counter[str] = Counter()
    listed: Folders = {}
    found = [images_below(folder, above, left_out, listed) for folder in folders]
    check_split_folders(root, listed)
    say_left_out(left_out, f"{field} {root}")
    if not any(found):
        where = f"its {len(names)} class folders" if labelled else "it"
        raise UserError(f"{field} {root}: no {', '.join(EXTENSIONS)} files in {where}")
    if empty := [folder.name for folder, paths in zip(folders, found, strict=True) if not paths]:
        more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        raise UserError(f"{field} {root}: class folder '{empty[0]}'{more} holds no images; add some or remove it")
    return [path for paths in found for path in paths], [k for k, paths in enumerate(found) for _ in paths], names


def place(data: DataConfig, split: str, what: str) -> tuple[str, Path]:
    """The name and the value of the path field of a split. Raises NoPath when it is empty."""
    field, where = ("data.path", data.path) if split == "train" else ("data.heldout_path", data.heldout_path)
    if not where:
        raise NoPath(f"{field} is empty; set it to {what}")
    return field, Path(where)


def open_folder(data: DataConfig, model: ModelConfig, split: str) -> Folder:
    """The images below data.path (train) or data.heldout_path (heldout). Raises UserError."""
    field, root = place(data, split, "a folder with one sub-folder of images per class")
    check_channels(model.channels, "data.source folder")
    if model.num_classes == 0:
        return Folder(root, *list_folder(root, field, labelled=False), data, model)
    names = _class_names(root, field)
    hint = " (did you mean its 'train' sub-folder?)" if "train" in names else ""
    check_classes(len(names), model.num_classes, f"{field} {root}{hint}")
    paths, labels, _ = list_folder(root, field)
    if split == "heldout" and data.path and os.path.isdir(data.path):
        trained, found = ([normal(n) for n in listed] for listed in (_class_names(Path(data.path), "data.path"), names))
        if trained != found:
            odd = sorted(set(trained) ^ set(found) or {"their order"})[0]
            raise UserError(f"{field} {root}: its class folders differ from those of data.path, first at '{odd}'")
    return Folder(root, paths, labels, names, data, model)
