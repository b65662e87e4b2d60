"""Packed shards: images cropped once by ``python -m unite_fast.data.pack``, in files of a fixed number of samples.

    index.json          what the pack is: format, size, how it was cropped, class names, shards with sha256
    labels.npy          int32 (n,)
    extents.npy         int64 (n, 2): offset in the shard and length in bytes; jpeg and png only
    shard-00000.bin     uint8: images (count, 3, size, size), no header; jpeg and png: encoded images end to end
    manifest.sha256     hashes of all the above, in the form that ``sha256sum -c`` reads

uint8 shards are memory-mapped; a batch is gathered by C++ threads (``data.workers`` of them), one batch ahead, into
pinned memory when the device is a GPU, travels as uint8 and is flipped on the device. jpeg and png shards are decoded
by worker processes like files. Sizes of all files and the hashes of the small ones are checked when the pack is
opened; damage inside a shard is found by ``python -m unite_fast.data.pack verify DEST``, not in training.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from unite_fast.base import files
from unite_fast.base.errors import UserError
from unite_fast.base.files import file_sha256
from unite_fast.config import DataConfig, ModelConfig
from unite_fast.data.ahead import ahead
from unite_fast.data.batch import Batch, batch_of_images
from unite_fast.data.encoded import HEAD_BYTES, MAX_ENCODED_BYTES, EncodedSource, check_bytes
from unite_fast.data.folder import place
from unite_fast.data.source import BadImage, Request, Source, check_classes, mirror, to_device
from unite_fast.data.transforms import is_mirrored
from unite_kernels import extension
from unite_kernels.gather import gather_rows

VERSION = 1
Format = Literal["uint8", "jpeg", "png"]
FORMATS = get_args(Format)
BATCHES_AHEAD = 2


@dataclass(frozen=True)
class Shard:
    count: int  # images
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """What index.json says."""

    format: Format
    size: int  # pixels, height and width
    crop: str  # pipeline id of the source at packing
    class_names: list[str]
    shards: list[Shard]
    labels_sha256: str
    extents_sha256: str  # empty for uint8
    skipped: list[tuple[str, str]]  # name and reason of images that were left out

    def to_json(self) -> str:
        shards = [vars(shard) for shard in self.shards]
        return json.dumps({"version": VERSION} | vars(self) | {"shards": shards}, indent=1) + "\n"


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.bin"


def _bad(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: {reason}; pack the images again with python -m unite_fast.data.pack")


def read_index(root: Path, field: str) -> Index:
    """index.json of the pack at ``root``. Raises UserError when it is missing, damaged or of another version."""
    path = root / "index.json"
    try:
        content: dict[str, Any] = json.loads(files.read_text(path))
    except FileNotFoundError:
        if (root / ".parts").is_dir():
            how = f"packing has not finished; go on with python -m unite_fast.data.pack SOURCE {root}"
        elif root.exists():  # perhaps what is to be packed
            how = f"no such file; pack what is there with python -m unite_fast.data.pack {root} {root}-packed"
        else:
            how = f"no such folder; write it with python -m unite_fast.data.pack SOURCE {root}"
        raise UserError(f"{field} {root}: index.json: {how}") from None
    except OSError as error:
        raise UserError(f"{field} {root}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise _bad(path, "not valid JSON") from None
    try:
        if content.pop("version") != VERSION:
            raise _bad(path, f"not of version {VERSION}")
        shards = [Shard(int(s["count"]), int(s["bytes"]), str(s["sha256"])) for s in content.pop("shards")]
        skipped = [(str(name), str(reason)) for name, reason in content.pop("skipped")]
        index = Index(shards=shards, skipped=skipped, **content)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise _bad(path, "not an index of packed shards") from None
    names = index.class_names if isinstance(index.class_names, list) else [None]
    texts = (*names, index.crop, index.labels_sha256, index.extents_sha256)
    of_their_types = all(isinstance(text, str) for text in texts)
    if not of_their_types or index.format not in FORMATS or type(index.size) is not int or index.size < 1 or not shards:
        raise _bad(path, "not an index of packed shards")
    return index


def _array(root: Path, name: str, sha256: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    path = root / name
    try:
        if file_sha256(path) != sha256:
            raise _bad(path, "its sha256 is not the one in index.json")
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise _bad(path, str(error)) from None
    if array.dtype != dtype or array.shape != shape:
        raise _bad(path, f"{array.dtype} {array.shape} instead of {dtype} {shape}")
    return array


def check_sizes(root: Path, index: Index) -> None:
    """Raises UserError unless every shard is there and as long as the index says."""
    for number, shard in enumerate(index.shards):
        path = root / shard_name(number)
        if index.format == "uint8" and shard.bytes != shard.count * 3 * index.size**2:
            raise _bad(root / "index.json", f"{shard.bytes} bytes for the {shard.count} images of {path.name}")
        try:
            size = path.stat().st_size
        except OSError as error:
            raise _bad(path, error.strerror or "cannot be read") from None
        if size != shard.bytes:
            raise _bad(path, f"{size} bytes instead of {shard.bytes}: truncated or overwritten")


def read_labels(root: Path, index: Index) -> Tensor:
    """int64 (n,). Raises UserError."""
    count = sum(shard.count for shard in index.shards)
    labels = torch.from_numpy(_array(root, "labels.npy", index.labels_sha256, "int32", (count,)).astype(np.int64))
    if count and (labels.min() < 0 or labels.max() >= max(1, len(index.class_names))):
        raise _bad(root / "labels.npy", f"a label outside the {len(index.class_names)} classes")
    return labels


def read_extents(root: Path, index: Index) -> np.ndarray:
    """int64 (n, 2), offset and length of every encoded image, all inside their shards. Raises UserError."""
    counts = [shard.count for shard in index.shards]
    extents = _array(root, "extents.npy", index.extents_sha256, "int64", (sum(counts), 2))
    limits = np.repeat([shard.bytes for shard in index.shards], counts)
    if len(extents) and (extents.min() < 0 or (extents.sum(1) > limits).any()):
        raise _bad(root / "extents.npy", "an image lies outside its shard")
    return extents


def shards_sha256(index: Index) -> str:
    """Of the content of a pack, from the hashes in its index."""
    return files.digest([shard.sha256 for shard in index.shards])


class Shards:
    """The memory-mapped files of a pack; each process maps a file when it first needs it."""

    def __init__(self, root: Path, index: Index) -> None:
        self.root, self.index = root, index
        self.ends = torch.tensor([shard.count for shard in index.shards]).cumsum(0)
        self._maps: dict[int, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_maps": {}}

    def locate(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Shard and place in it of samples (B,): int64 (B,) each."""
        shard = torch.searchsorted(self.ends, indices, right=True)
        counts = torch.tensor([0, *self.ends.tolist()])
        return shard, indices - counts[shard]

    def bytes_of(self, number: int) -> Tensor:
        """The file as uint8 (bytes,). Raises RuntimeError when it is gone or shorter."""
        if number not in self._maps:
            path, size = str(self.root / shard_name(number)), self.index.shards[number].bytes
            # A private mapping: nothing written to it could reach the file. No descriptor stays open.
            self._maps[number] = torch.from_file(path, shared=False, size=size, dtype=torch.uint8)
        return self._maps[number]

    def images_of(self, number: int) -> Tensor:
        """The images of a uint8 shard, uint8 (count, 3, size, size)."""
        size = self.index.size
        return self.bytes_of(number).view(-1, 3, size, size)


class Packed(Source):
    """uint8 images of uint8 shards."""

    per_core = 37_669

    def __init__(self, root: Path, index: Index, flip: bool) -> None:
        if why := extension.obstacle("cpu"):
            raise UserError(f"data.source=packed: {why}")
        check_sizes(root, index)
        super().__init__(read_labels(root, index), index.class_names, flip)
        self.root, self.index, self.shards = root, index, Shards(root, index)

    def name(self, index: int) -> str:
        number, place_in = (int(x) for x in self.shards.locate(torch.tensor([index])))
        return f"{self.root / shard_name(number)}, image {place_in}"

    def names_sha256(self) -> str:
        return shards_sha256(self.index)

    def pipeline_id(self, device: str = "cpu") -> str:
        return f"packed-uint8:{self.index.crop}"

    def gather(self, indices: Tensor, threads: int = 1, pinned: bool = False) -> Tensor:
        """Images (B, 3, size, size) uint8 on the CPU. Raises UserError when a shard can no longer be opened."""
        size = self.index.size
        out = torch.empty(len(indices), 3, size, size, dtype=torch.uint8, pin_memory=pinned)
        number, row = self.shards.locate(indices)
        needed, part = torch.unique(number, return_inverse=True)
        try:
            parts = [self.shards.images_of(n) for n in needed.tolist()]
        except RuntimeError as error:
            raise UserError(f"{self.root}: {str(error).splitlines()[0]}; all shards were there at start") from None
        gather_rows(parts, part, row, out, threads)
        return out

    def read(self, index: int, draw: Tensor | None, seed: int) -> Tensor:
        image = self.gather(torch.tensor([index]))[0]
        return image.flip(-1) if is_mirrored(self.flip, draw) else image

    def batches(
        self, plan: Iterator[Request], seed: int, device: torch.device, workers: int, timeout: float
    ) -> Iterator[Batch]:
        """As Source.batches; ``workers`` are threads, and 0 gathers here and now instead of ahead."""

        def fetch(request: Request) -> tuple[Request, Tensor, Tensor | None]:
            with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
                images = self.gather(request.indices, max(1, workers), device.type == "cuda")
            flips = self.mirrored(seed, request.positions) if request.augment and self.flip else None
            return request, images, flips

        fetched = (
            ahead(fetch, plan, BATCHES_AHEAD, timeout, lambda: f"shards in {self.root}")
            if workers
            else map(fetch, plan)
        )
        for request, host, flips in fetched:
            images = host.to(device, non_blocking=True)
            if flips is not None:
                images = mirror(images, flips)
            labels = to_device(self.labels[request.indices], device)
            yield batch_of_images(images, labels, to_device(request.positions, device))


class PackedEncoded(EncodedSource):
    """Images of jpeg or png shards, decoded when they are read."""

    def __init__(self, root: Path, index: Index, data: DataConfig, model: ModelConfig) -> None:
        check_sizes(root, index)
        super().__init__(read_labels(root, index), index.class_names, data, model)
        self.root, self.index, self.shards = root, index, Shards(root, index)
        self._extents = read_extents(root, index)

    def name(self, index: int) -> str:
        number, place_in = (int(x) for x in self.shards.locate(torch.tensor([index])))
        return f"{self.root / shard_name(number)}, image {place_in}"

    def names_sha256(self) -> str:
        return shards_sha256(self.index)

    def pipeline_id(self, device: str = "cpu") -> str:
        return f"packed-{self.index.format}:{self.index.crop}:{super().pipeline_id(device)}"

    def file(self, index: int) -> Path:
        return self.root / shard_name(int(self.shards.locate(torch.tensor([index]))[0]))

    def encoded(self, index: int) -> bytes:
        return self._bytes(index, MAX_ENCODED_BYTES)

    def head(self, index: int) -> bytes:
        return self._bytes(index, HEAD_BYTES)

    def _bytes(self, index: int, most: int) -> bytes:
        """At most the first ``most`` bytes."""
        offset, length = self._extents[index].tolist()
        check_bytes(length)
        number = int(self.shards.locate(torch.tensor([index]))[0])
        descriptor = os.open(self.root / shard_name(number), os.O_RDONLY)
        try:
            data = os.pread(descriptor, min(length, most), offset)
        finally:
            os.close(descriptor)
        if len(data) != min(length, most):
            raise BadImage("the shard has become shorter")
        return data


def open_packed(data: DataConfig, model: ModelConfig, split: str) -> Packed | PackedEncoded:
    """The pack at data.path (train) or data.heldout_path (heldout). Raises UserError."""
    field, root = place(data, split, "a folder written by python -m unite_fast.data.pack")
    index = read_index(root, field)
    if model.channels != 3:
        raise UserError(f"{field} {root}: packed images are RGB, but model.channels is {model.channels}")
    if index.size != model.image_size:
        raise UserError(
            f"{field} {root}: packed images are {index.size} x {index.size}, but model.image_size is "
            f"{model.image_size}; pack again with --size {model.image_size}"
        )
    if data.crop != "adm" and (data.crop != "fast" or index.format == "uint8"):
        raise UserError(f"data.crop={data.crop}: packed images are center crops already; set data.crop=adm")
    check_classes(len(index.class_names), model.num_classes, f"{field} {root}")
    if split == "heldout" and data.path and (Path(data.path) / "index.json").is_file():
        trained = read_index(Path(data.path), "data.path").class_names
        if trained != index.class_names:
            odd = sorted(set(trained) ^ set(index.class_names) or {"their order"})[0]
            raise UserError(f"{field} {root}: its classes differ from those of data.path, first at '{odd}'")
    return Packed(root, index, data.flip) if index.format == "uint8" else PackedEncoded(root, index, data, model)
