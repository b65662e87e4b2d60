"""Sources of encoded images (files, members of tars, records of shards): bytes in, one transformed image out.

A new kind of container says where the bytes of a sample are (``encoded``) and what to call it (``name``). Decoding,
the crops, and what becomes of damaged bytes are here, once. Every image becomes what Pillow's ``convert("RGB")``
makes of it, the same as in the reference pipeline, save that what is transparent is laid on ``data.alpha``; EXIF
orientation is not applied. Gray beyond 255, of 16 bits, is refused: Pillow would clip it.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from unite_fast.base.errors import UserError
from unite_fast.config import DataConfig, ModelConfig
from unite_fast.data import fast
from unite_fast.data.ahead import spread
from unite_fast.data.alpha import opaque
from unite_fast.data.source import BadImage, FileSource
from unite_fast.data.transforms import MAX_PIXELS, RANDOM_CROPS, is_mirrored, transform

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
FORMATS = ("JPEG", "PNG", "WEBP")  # decided by content: a PNG named .jpg is read, anything else is refused
MAX_ENCODED_BYTES = 128 * 2**20
LOOKED_AT = 5000  # images of a source, evenly spread, whose beginnings are read at the start of a run
LOOKING = 16  # threads that do so: most of it is waiting for storage
HEAD_BYTES = 1 << 16  # of an image, in which its header lies


def check_bytes(count: int) -> None:
    """Raises BadImage unless an encoded image may have this many bytes."""
    if count == 0:
        raise BadImage("the file is empty")
    if count > MAX_ENCODED_BYTES:
        raise BadImage(f"{count} bytes, more than the {MAX_ENCODED_BYTES} allowed")


def open_image(data: bytes) -> Image.Image:
    """An image of which only the header is read. Raises BadImage for more than MAX_PIXELS, and what Pillow raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of sizes (refused below), of palettes and of metadata
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise BadImage(f"{image.width} x {image.height} pixels, more than the {MAX_PIXELS} allowed")
    return image


def decode(data: bytes, mode: str = "RGB", alpha: str = "white") -> Image.Image:
    """The first frame of an encoded image as ``mode`` (RGB, or L: gray made from RGB). alpha: as in ``data.alpha``.

    Raises BadImage for more than MAX_PIXELS (before any pixel is decoded), and whatever Pillow raises.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with open_image(data) as image:
            if image.mode.startswith("I") and np.asarray(image).max() > 255:
                raise BadImage("gray of 16 bits, which 8 would clip; save it with 8")
            rgb = opaque(image, alpha)
    return rgb if mode == "RGB" else rgb.convert(mode)


def explain(error: Exception) -> BadImage:
    """The reason, in one line, why bytes could not be decoded. Damaged ones raise nearly anything in Pillow."""
    if isinstance(error, BadImage):
        return error
    if isinstance(error, UnidentifiedImageError):
        return BadImage("not a JPEG, PNG or WebP image")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return BadImage(" ".join(reason.split()) or type(error).__name__)


class Names:
    """A list of strings as two arrays: a million Python objects would be copied into every worker, page by page."""

    def __init__(self, names: list[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def sha256(self, skipped: int = 0) -> str:
        """Of all names, each without its first ``skipped`` bytes."""
        kept = np.ones(len(self._bytes), dtype=bool)
        for offset in range(skipped):
            kept[self._ends[:-1] + offset] = False
        lengths = np.diff(self._ends) - skipped
        return hashlib.sha256(lengths.tobytes() + self._bytes[kept].tobytes()).hexdigest()

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self._bytes[self._ends[index] : self._ends[index + 1]].tobytes())


class EncodedSource(FileSource):
    """uint8 images (C, size, size) made of encoded ones."""

    def __init__(self, labels: Tensor, names: list[str], data: DataConfig, model: ModelConfig) -> None:
        super().__init__(labels, names, data.flip)
        if data.crop == "fast":
            fast.require()
        self.on_error = data.on_error
        self.size, self.crop = model.image_size, data.crop
        self.per_core = 892 if data.crop == "fast" else 358  # random crops cost about what the exact one does
        self.mode, self.alpha = ("RGB" if model.channels == 3 else "L"), data.alpha
        self.lanes = 1 + (RANDOM_CROPS[data.crop][0] if data.crop in RANDOM_CROPS else 0)

    @abstractmethod
    def encoded(self, index: int) -> bytes:
        """The bytes of sample ``index``. Raises BadImage or OSError."""

    def head(self, index: int) -> bytes:
        """The first bytes of sample ``index``, or all of them."""
        return self.encoded(index)

    def file(self, index: int) -> str | Path:
        """The file that holds sample ``index``."""
        raise NotImplementedError

    def bytes_sha256(self) -> str:
        def look(index: int) -> bytes:
            try:
                return hashlib.sha256(self.head(index)[:HEAD_BYTES]).digest() + self.length(index).to_bytes(8, "little")
            except (BadImage, OSError):  # whoever reads the image says why it cannot be read
                return b""

        looked = list(range(0, len(self), max(1, -(-len(self) // LOOKED_AT))))
        return hashlib.sha256(b"".join(spread(look, looked, LOOKING))).hexdigest()

    def looked_at(self) -> Sequence[int]:
        """The samples of which ``remarks`` speaks for all."""
        return range(0, len(self), max(1, -(-len(self) // LOOKED_AT)))

    def remarks(self) -> list[str]:
        looked = self.looked_at()
        found = [index for index in looked if self._has_alpha(index)]
        if self.alpha == "refuse" and self.on_error == "fail":
            for index in found:
                self.load(index)
        if not found:
            return []
        whole = len(looked) == len(self)
        many = f"{len(found):,}" if whole else f"about {round(len(found) * len(self) / len(looked)):,}"
        what = "refused where it is transparent" if self.alpha == "refuse" else f"laid on {self.alpha}"
        return [f"{many} of {len(self):,} images have an alpha channel: {what} (data.alpha)"]

    def _has_alpha(self, index: int) -> bool:
        if self.name(index).lower().endswith((".jpg", ".jpeg")):
            return False
        try:
            return open_image(self.head(index)).has_transparency_data
        except Exception:  # whoever reads the image says why it cannot be read
            return False

    def length(self, index: int) -> int:
        """The bytes of sample ``index`` where that is known without reading it, else 0."""
        return 0

    def pipeline_id(self, device: str = "cpu") -> str:
        library = fast.versions() if self.crop == "fast" else f"pillow-{PIL.__version__}"
        return f"{library}/{self.crop}-{self.size}/alpha-{self.alpha}"

    def read(self, index: int, draw: Tensor | None, seed: int) -> Tensor:
        try:
            data = self.encoded(index)
            if self.crop == "fast":
                return self._fast(data, is_mirrored(self.flip, draw))
            return transform(decode(data, self.mode, self.alpha), self.size, self.crop, self.flip, draw)
        except (MemoryError, UserError):
            raise
        except Exception as error:
            raise explain(error) from error

    def _fast(self, data: bytes, mirrored: bool) -> Tensor:
        image: Image.Image | np.ndarray | None = fast.decode_jpeg(data) if self.mode == "RGB" else None
        pixels = fast.fast_crop(decode(data, self.mode, self.alpha) if image is None else image, self.size)
        return (pixels.flip(-1) if mirrored else pixels).contiguous()


def labels_of(labels: list[int]) -> Tensor:
    """int64 (n,) on the CPU."""
    return torch.tensor(labels, dtype=torch.int64)
