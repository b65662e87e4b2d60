"""What a source of images is, and the two ways to make batches from one.

``FileSource`` reads one image at a time, in worker processes (loader.py). ``ResidentSource`` holds its images in
memory and gathers whole batches on the device. Both follow a plan: an iterator of requests, one per batch.
"""

from __future__ import annotations

import hashlib
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unite_fast.base.errors import RunError, UserError
from unite_fast.data.batch import Batch, batch_of_images
from unite_fast.data.order import Order
from unite_fast.data.transforms import is_mirrored
from unite_kernels.philox import uniform

AUGMENT_STREAM = 1 << 20  # lane 0: flip; further lanes: random crop. Streams of the model are below 1 << 20
MOST_CLASSES = 1 << 20
BYTES = "bytes of images"  # in ``Source.identity``
PIXEL_STREAM = AUGMENT_STREAM + 1  # synthetic pixels


class Request(NamedTuple):
    """One batch to make: which images, for which positions, with or without random transforms."""

    indices: Tensor  # (B,) int64
    positions: Tensor  # (B,) int64
    augment: bool


class BadImage(Exception):
    """A file that cannot be read as an image. The message is the reason, without the path."""


class NoPath(UserError):
    """data.path, or for held-out samples data.heldout_path, is empty, and the source needs one."""


class WorkerError(RunError):
    """A decoding process died or hung: the machine's trouble rather than the data's. One line."""


def check_classes(found: int, expected: int, where: str) -> None:
    """Raises UserError when a source's class count differs from model.num_classes. 0 of these takes any source."""
    if expected and found != expected:
        raise UserError(
            f"{where} has {found} classes but model.num_classes is {expected}; set model.num_classes={found}"
        )


def numbered(largest: int, where: str) -> list[str]:
    """Names of classes that have none: their numbers up to ``largest``. Raises UserError for one that is too large."""
    if largest >= MOST_CLASSES:
        raise UserError(f"{where}: label {largest} is no class number, which are below {MOST_CLASSES}; mend the labels")
    return [str(i) for i in range(largest + 1)]


def check_channels(channels: int, where: str) -> None:
    """Raises UserError unless ``channels`` is 1 (gray) or 3 (RGB)."""
    if channels not in (1, 3):
        raise UserError(f"{where} gives images of 1 or 3 channels, but model.channels is {channels}")


class Source(ABC):
    """Labelled images of one size. Subclasses implement ``read`` and ``batches``."""

    lanes = 1  # uniform numbers per sample that ``read`` takes: the flip, then the crop
    per_core: int | None = None  # images/s of 256 x 256 that a worker delivers (LOG.md, 2026-11-22), where it is known

    def __init__(self, labels: Tensor, class_names: list[str], flip: bool) -> None:
        self.labels = labels  # (n,) int64, on the CPU
        self.class_names = class_names
        self.flip = flip  # mirror half of the images when augmenting
        self.on_error = "fail"  # or "skip": see loader.py
        self.lengths: Tensor | None = None  # (n,) int64: registers of each sample, where they differ
        self.kinds: Tensor | None = None  # (n,) int64: samples of near kinds share a batch; None: any do
        self.skipped: dict[int, str] = {}  # index -> reason, of images that were replaced so far: see loader.py

    def __len__(self) -> int:
        return len(self.labels)

    def order(self, seed: int, global_batch: int) -> Order:
        """That of a run's samples."""
        return Order(len(self), seed, self.kinds, global_batch)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def name(self, index: int) -> str:
        """What to call a sample in a message: for files, the path."""
        return f"sample {index}"

    def pipeline_id(self, device: str = "cpu") -> str:
        """What decides the pixels of a batch on ``device`` ("cpu" or "cuda"), for a run's provenance.

        Two runs whose identifiers are equal saw the same images; libraries and their versions are part of it.
        """
        return type(self).__name__.lower()

    def identity(self, device: str = "cpu") -> dict[str, Any]:
        """Which images these are, plain values: compared over ranks and, in checkpoints, over starts of a run.

        Their number, their order by name, their labels, the beginnings of some, what becomes of them on ``device``.
        """
        labels = hashlib.sha256(self.labels.numpy().tobytes()).hexdigest()[:16]
        classes = [unicodedata.normalize("NFC", name) for name in self.class_names]
        found = {"images": len(self), "class names": classes, "labels": labels}
        found |= {"names of images": self.names_sha256()[:16], BYTES: self.bytes_sha256()[:16]}
        return found | {"pipeline": self.pipeline_id(device)}

    def names_sha256(self) -> str:
        """Of the images' names in order, below the folder that holds them; empty where they have none of their own."""
        return ""

    def bytes_sha256(self) -> str:
        """Of what the images hold, as far as that is read in seconds; empty where ``names_sha256`` or ``pipeline_id``
        say it."""
        return ""

    def remarks(self) -> list[str]:
        """What to know of these images before they are trained on, a line each. Raises UserError."""
        return []

    def forget_labels(self) -> None:
        """Makes unlabelled samples of labelled ones (``model.num_classes=0``)."""
        self.labels, self.class_names = torch.zeros_like(self.labels), []

    def uniforms(self, seed: int, positions: Tensor) -> Tensor:
        """The random numbers of samples at ``positions`` (B,) int64: float32 (B, lanes) in [0, 1), on the CPU."""
        return uniform(seed, AUGMENT_STREAM, positions, (self.lanes,))

    def mirrored(self, seed: int, positions: Tensor) -> Tensor:
        """Which samples at ``positions`` (B,) are mirrored when augmenting with flips: bool (B,), on the CPU."""
        return self.uniforms(seed, positions)[:, 0] < 0.5

    def load(self, index: int, position: int | None = None, seed: int = 0) -> Tensor:
        """One image (C, H, W): a function of (index, position, seed); without a position, no random transform.

        Raises UserError, naming the file, when the image cannot be read (whatever on_error says).
        """
        draw = None if position is None else self.uniforms(seed, torch.tensor([position]))[0]
        try:
            return self.read(index, draw, seed)
        except BadImage as error:
            raise UserError(f"{self.name(index)}: {error}") from error

    def few(self, indices: Tensor) -> Batch:
        """The samples ``indices`` (B,) int64, nothing random, on the CPU: for pictures."""
        return batch_of_images(torch.stack([self.load(i) for i in indices.tolist()]), self.labels[indices], indices)

    @abstractmethod
    def read(self, index: int, draw: Tensor | None, seed: int) -> Tensor:
        """One image (C, H, W), transformed by the uniform numbers ``draw`` (lanes,). Raises BadImage."""

    @abstractmethod
    def batches(
        self, plan: Iterator[Request], seed: int, device: torch.device, workers: int, timeout: float
    ) -> Iterator[Batch]:
        """One Batch on ``device`` per request. ``samples`` are the request's positions."""


class FileSource(Source):
    """A source whose images are read one by one by worker processes."""

    def batches(
        self, plan: Iterator[Request], seed: int, device: torch.device, workers: int, timeout: float
    ) -> Iterator[Batch]:
        from unite_fast.data.loader import load_batches

        return load_batches(self, plan, seed, device, workers, timeout)


class ResidentSource(Source):
    """A source whose images stay in the device's memory; ``workers`` and ``timeout`` have no meaning for it."""

    @abstractmethod
    def gather(self, indices: Tensor, seed: int, device: torch.device) -> Tensor:
        """Images (B, C, H, W) on ``device`` of the samples ``indices`` (B,), int64, on the CPU."""

    def read(self, index: int, draw: Tensor | None, seed: int) -> Tensor:
        image = self.gather(torch.tensor([index]), seed, torch.device("cpu"))[0]
        return image.flip(-1) if is_mirrored(self.flip, draw) else image

    def batches(
        self, plan: Iterator[Request], seed: int, device: torch.device, workers: int, timeout: float
    ) -> Iterator[Batch]:
        for indices, positions, augment in plan:
            images = self.gather(indices, seed, device)
            if augment and self.flip:
                images = mirror(images, self.mirrored(seed, positions))
            yield batch_of_images(images, to_device(self.labels[indices], device), to_device(positions, device))


class HeldSource(ResidentSource):
    """Images (n, C, H, W) that are there from the start."""

    def __init__(self, images: Tensor, labels: Tensor, class_names: list[str], flip: bool) -> None:
        super().__init__(labels, class_names, flip)
        self._images = {torch.device("cpu"): images}  # one copy per device in use

    def gather(self, indices: Tensor, seed: int, device: torch.device) -> Tensor:
        if device not in self._images:
            self._images[device] = self._images[torch.device("cpu")].to(device)
        return self._images[device][to_device(indices, device)]


def mirror(images: Tensor, mirrored: Tensor) -> Tensor:
    """Images (B, C, H, W), on their device, of which those ``mirrored`` (bool (B,), on the CPU) are flipped in W.

    May write into ``images``.
    """
    which = to_device(mirrored.nonzero()[:, 0], images.device)  # on the CPU: a GPU would have to be waited for
    return images.index_copy_(0, which, images[which].flip(-1))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on ``device``; to a GPU through pinned memory, without waiting."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
