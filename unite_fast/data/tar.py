"""Tars in WebDataset's layout: ``key.jpg`` (or .jpeg, .png, .webp) beside ``key.cls``, a class number in ASCII.

``key.json`` with an integer "label" may stand in for ``key.cls``. Samples are ordered by tar, then by place in it.
``classes.txt`` beside the tars, one name per line, names the classes; without it they are called by their numbers.

Each tar needs an index (``NAME.tar.index.npz``: offsets, lengths, labels, names), written once by

    python -m unite_fast.data.index FOLDER

so that any sample is one read at a known place. A tar that was written or copied after its index is scanned again when
it is opened, and refused when the index is not that of its headers and labels.

Members are only ever read in memory, nothing is extracted. Members that are links or devices, or whose names leave the
archive (absolute, or with "..") are refused with a warning.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import tarfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from unite_fast.base import files
from unite_fast.base.errors import UserError
from unite_fast.config import DataConfig, ModelConfig
from unite_fast.data.encoded import EXTENSIONS, HEAD_BYTES, MAX_ENCODED_BYTES, EncodedSource, Names, check_bytes
from unite_fast.data.folder import place
from unite_fast.data.listing import files_of
from unite_fast.data.source import BadImage, check_channels, check_classes, numbered

VERSION = 2
COMMAND = "python -m unite_fast.data.index"
OPEN_FILES = 64  # descriptors kept per process
MAX_LABEL_BYTES = 2**20
UNLABELLED = -1  # the label of every image in an index without labels
log = logging.getLogger("unite_fast.data")


class TarIndex(NamedTuple):
    """The samples of one tar, in the order of its images."""

    extents: np.ndarray  # int64 (n, 2): offset and length in bytes of each image
    labels: np.ndarray  # int64 (n,)
    names: list[str]  # members


def index_path(tar: Path) -> Path:
    return tar.with_name(tar.name + ".index.npz")


def _refusal(member: tarfile.TarInfo) -> str:
    """Why a member is not read; empty when it may be."""
    if member.name.startswith("/") or ".." in Path(member.name).parts:
        return "its name leaves the archive"
    if member.issym() or member.islnk():
        return "it is a link"
    if not (member.isfile() or member.isdir()):
        return "it is not a regular file"
    return ""


def _label(kind: str, text: bytes) -> int | None:
    """The class number in a .cls or .json member, or None."""
    try:
        label = int(text) if kind == ".cls" else json.loads(text)["label"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return label if type(label) is int and 0 <= label < 2**31 else None


def scan(tar: Path, labelled: bool = True) -> TarIndex:
    """Reads the headers and the labels of a tar; without ``labelled`` each label is UNLABELLED.

    Raises UserError when it is truncated, compressed or has no labels.
    """
    images: OrderedDict[str, tuple[int, int, str]] = OrderedDict()
    labels: dict[str, int] = {}
    try:
        size = tar.stat().st_size
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                if reason := _refusal(member):
                    log.warning("%s: member %r is skipped: %s", tar, member.name, reason)
                    continue
                if not member.isfile():
                    continue
                if member.offset_data + member.size > size:
                    raise UserError(f"{tar} is truncated: {member.name!r} ends after the file does")
                folder, _, base = member.name.rpartition("/")
                stem, dot, suffix = base.partition(".")
                key, kind = f"{folder}/{stem}", (dot + suffix).lower()
                if kind in EXTENSIONS:
                    if key in images:
                        raise UserError(f"{tar}: two images are called {stem!r}: {images[key][2]} and {member.name}")
                    images[key] = (member.offset_data, member.size, member.name)
                elif kind == ".cls" or (kind == ".json" and key not in labels):
                    file = archive.extractfile(member) if member.size <= MAX_LABEL_BYTES else None
                    label = _label(kind, file.read() if file is not None else b"")
                    if label is None and kind == ".cls":
                        raise UserError(f"{tar}: {member.name!r} holds no class number")
                    if label is not None:
                        labels[key] = label
    except tarfile.TarError as error:
        raise UserError(f"{tar}: not a complete, uncompressed tar ({error})") from None
    except OSError as error:
        raise UserError(f"{tar}: {error.strerror or error}") from None
    if not labelled:
        labels = dict.fromkeys(images, UNLABELLED)
    if missing := [images[key][2] for key in images if key not in labels]:
        raise UserError(
            f"{tar}: {len(missing)} of {len(images)} images have no label (.cls), first {missing[0]!r}; "
            f"write an index without labels with {COMMAND} --unlabelled"
        )
    extents = np.array([entry[:2] for entry in images.values()], dtype=np.int64).reshape(-1, 2)
    return TarIndex(extents, np.array([labels[key] for key in images], dtype=np.int64), [e[2] for e in images.values()])


def write_index(tar: Path, labelled: bool = True) -> TarIndex:
    """Scans a tar and writes its index. Raises UserError."""
    try:
        status = tar.stat()  # before the scan: what is written meanwhile is noticed later
    except OSError as error:
        raise UserError(f"{tar}: {error.strerror}") from None
    index = scan(tar, labelled)
    target = index_path(tar)
    names = np.frombuffer("\0".join(index.names).encode("utf-8", "surrogateescape"), dtype=np.uint8)
    with files.refusals(str(target)), files.replacing(target) as file:
        np.savez(
            file, version=VERSION, size=status.st_size, modified=status.st_mtime_ns, extents=index.extents,
            labels=index.labels, names=names,
        )  # fmt: skip
    return index


def read_index(tar: Path, field: str) -> TarIndex:
    """The index of a tar. Raises UserError when it is missing, damaged, or not that of the tar as it is now."""
    path = index_path(tar)
    again = f"write it again with {COMMAND} {tar}"
    try:
        with np.load(io.BytesIO(files.read(path)), allow_pickle=False) as content:
            version, size = int(content["version"]), int(content["size"])
            modified = int(content["modified"]) if "modified" in content else 0
            extents, labels, names = content["extents"], content["labels"], content["names"]
    except FileNotFoundError:
        raise UserError(f"{field} {tar} has no index; write it with {COMMAND} {tar.parent}") from None
    except Exception:  # a damaged zip raises nearly anything
        raise UserError(f"{path}: not a readable index; {again}") from None
    members = names.tobytes().decode("utf-8", "surrogateescape").split("\0") if len(names) else []
    shapes = (extents.shape, extents.dtype, labels.shape, labels.dtype, len(members))
    n = len(labels)
    if version != VERSION or shapes != ((n, 2), np.dtype("int64"), (n,), np.dtype("int64"), n):
        raise UserError(f"{path}: not an index of version {VERSION}; {again}")
    status = tar.stat()
    actual = status.st_size
    if actual != size or (n and (extents.min() < 0 or extents.sum(1).max() > actual or labels.min() < UNLABELLED)):
        raise UserError(f"{tar} has {actual} bytes, but had {size} when its index was written: truncated? else {again}")
    index = TarIndex(extents, labels, members)
    if status.st_mtime_ns != modified and not _same(index, scan(tar, n == 0 or labels.min() > UNLABELLED)):
        raise UserError(f"{tar} holds other images or labels than when its index was written: {again}")
    return index


def _same(a: TarIndex, b: TarIndex) -> bool:
    return np.array_equal(a.extents, b.extents) and np.array_equal(a.labels, b.labels) and a.names == b.names


def class_names(tars: list[Path], largest: int) -> list[str]:
    """The lines of classes.txt, or numbers up to the largest label. Raises UserError."""
    path = tars[0].parent / "classes.txt"
    if not path.is_file():
        return numbered(largest, str(tars[0].parent))
    names = path.read_text(encoding="utf-8").split("\n")
    names = names[:-1] if names[-1] == "" else names
    if largest >= len(names):
        raise UserError(f"{path} names {len(names)} classes, but label {largest} occurs in the tars")
    return names


def list_tars(tars: list[Path], field: str, labelled: bool) -> tuple[list[Path], list[TarIndex], list[str]]:
    """The tars, their indexes and the class names, none where not ``labelled``. Raises UserError."""
    indexes = [read_index(tar, field) for tar in tars]
    if not sum(len(index.labels) for index in indexes):
        raise UserError(f"{field} {tars[0].parent}: no images in its {len(tars)} tars")
    if not labelled:
        return tars, indexes, []
    if bare := [tar for tar, i in zip(tars, indexes, strict=True) if len(i.labels) and i.labels.min() == UNLABELLED]:
        raise UserError(f"{field} {bare[0]}: its index is one without labels; set model.num_classes=0")
    return tars, indexes, class_names(tars, max(int(i.labels.max()) for i in indexes if len(i.labels)))


class _File:
    """A file open for reading until nobody refers to it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # at exit the module's names are gone
        if hasattr(self, "descriptor"):
            close(self.descriptor)


class Tar(EncodedSource):
    """The images of indexed tars."""

    def __init__(
        self, tars: list[Path], indexes: list[TarIndex], names: list[str], data: DataConfig, model: ModelConfig
    ) -> None:
        super().__init__(torch.from_numpy(np.concatenate([i.labels for i in indexes])), names, data, model)
        self.tars = tars
        self._ends = np.cumsum([len(index.labels) for index in indexes])
        self._extents = np.concatenate([index.extents for index in indexes])
        self._members = Names([name for index in indexes for name in index.names])
        self._files: OrderedDict[int, _File] = OrderedDict()  # by number of the tar, oldest first

    def __getstate__(self) -> dict:
        return vars(self) | {"_files": OrderedDict()}

    def names_sha256(self) -> str:
        shards = [(tar.name, int(end)) for tar, end in zip(self.tars, self._ends, strict=True)]
        return files.digest([shards, self._members.sha256()])

    def _tar(self, index: int) -> int:
        return int(np.searchsorted(self._ends, index, side="right"))

    def name(self, index: int) -> str:
        return f"{self.tars[self._tar(index)]}/{self._members[index]}"

    def file(self, index: int) -> Path:
        return self.tars[self._tar(index)]

    def length(self, index: int) -> int:
        return int(self._extents[index, 1])

    def encoded(self, index: int) -> bytes:
        return self._bytes(index, MAX_ENCODED_BYTES)

    def head(self, index: int) -> bytes:
        return self._bytes(index, HEAD_BYTES)

    def _bytes(self, index: int, most: int) -> bytes:
        """At most the first ``most`` bytes."""
        offset, length = self._extents[index].tolist()
        check_bytes(length)
        number = self._tar(index)
        file = self._files.get(number)  # threads may come here together: each step below leaves the table whole
        if file is None:
            file = self._files[number] = _File(self.tars[number])
            with contextlib.suppress(KeyError):
                while len(self._files) > OPEN_FILES:
                    self._files.popitem(last=False)
        data = os.pread(file.descriptor, min(length, most), offset)
        if len(data) != min(length, most):
            raise BadImage("the tar has become shorter")
        return data


def open_tar(data: DataConfig, model: ModelConfig, split: str) -> Tar:
    """The .tar files in data.path (train) or data.heldout_path (heldout), or that file itself. Raises UserError."""
    field, root = place(data, split, "a folder of .tar files, or one .tar")
    check_channels(model.channels, "data.source tar")
    tars = files_of(root, ".tar")
    if not tars:
        raise UserError(f"{field} {root}: " + ("no .tar files there" if root.exists() else "no such file or folder"))
    source = Tar(*list_tars(tars, field, model.num_classes > 0), data, model)
    check_classes(source.num_classes, model.num_classes, f"{field} {root}")
    return source
