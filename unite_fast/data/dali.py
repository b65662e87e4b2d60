"""NVIDIA DALI: JPEGs decoded and cropped on the GPU (``mixed``), or on the CPU, from folders, tars and jpeg shards.

One pipeline, with the device as a parameter. What is read, in which order, and where it is cut and mirrored is
decided here, by the same functions as for the Pillow crop, and handed in as inputs; DALI decodes and resizes. So
order, resume and world size are those of every other source. Only 8-bit gray and RGB JPEGs with sound headers go
through DALI; anything else (PNG, WebP, CMYK, damaged headers) goes through Pillow.

Difference from the Pillow crop, in gray levels of 8-bit images, on the CPU (JPEG decoding is exact there):
    shorter side below twice the size     at most 14, 0.15 on average (crops of photographs to 256 x 256)
    halved first, even sides              at most 3, 0.5 to 1.5 on average (Pillow rounds up where DALI does not)
    halved first, odd sides               up to 78 at single pixels: DALI has no box filter for a factor just above 2
On a GPU decoding is nvJPEG's and differs by more. Where exactness matters, pack the images (pack.py) instead.

DALI gives up a whole batch, and the pipeline with it, for one unreadable image. Then the pipeline is built anew, and
Pillow says which images of the batch are to blame, so that data.on_error acts on the right ones.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
from torch import Tensor

from unite_fast.base.errors import UserError
from unite_fast.config import DataConfig, ModelConfig
from unite_fast.data.ahead import ahead, spread
from unite_fast.data.batch import Batch, batch_of_images
from unite_fast.data.containers import open_container
from unite_fast.data.encoded import EncodedSource, explain, open_image
from unite_fast.data.folder import place
from unite_fast.data.loader import apply_policy, skip_limit
from unite_fast.data.source import BadImage, Request, Source, check_classes, mirror, to_device
from unite_fast.data.transforms import MAX_PIXELS, is_mirrored, offset, random_rectangle, resized_shape

CHUNK = 64  # images per run of the pipeline
CHUNKS_AHEAD = 3


class Cut(NamedTuple):
    """How an image becomes size x size. All pairs are (height, width) or (top, left), in pixels."""

    halved: list[tuple[int, int]]  # sizes after each halving
    corner: tuple[int, int]  # of the rectangle that is kept before the resize
    kept: tuple[int, int]  # its size
    resized: tuple[int, int]
    anchor: tuple[int, int]  # of the final crop


def cut(width: int, height: int, size: int, crop: str, draw: Tensor | None) -> Cut:
    """The geometry of transforms.transform, as numbers. Raises ValueError for elongated images."""
    if draw is not None and crop == "random_resized":
        left, top, w, h = random_rectangle(width, height, draw[1:].tolist())
        return Cut([], (top, left), (h, w), (size, size), (0, 0))
    halved = []
    if draw is not None and crop == "resize_random":
        new_width, new_height = resized_shape(width, height, size * 3 // 2)
        left, top = offset(float(draw[1]), new_width - size), offset(float(draw[2]), new_height - size)
    else:
        while min(width, height) >= 2 * size:
            width, height = width // 2, height // 2
            halved.append((height, width))
        new_width, new_height = resized_shape(width, height, size)
        left, top = (new_width - size) // 2, (new_height - size) // 2
    return Cut(halved, (0, 0), (height, width), (new_height, new_width), (top, left))


def declared_shape(data: bytes) -> tuple[int, int, int] | None:
    """(width, height, channels) of a JPEG whose segments up to the first scan chain without a gap, else None.

    DALI's own reader of headers and its decoder may disagree about a damaged file's size, and then write out of
    bounds: batches of mutated files crashed DALI 2.4 until those whose headers do not chain were kept from it.
    """
    at, found = 2, []
    while at + 4 <= len(data):
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at] != 0xFF or marker < 0xC0 or 0xD0 <= marker <= 0xD9 or length < 2:
            return None
        if marker == 0xDA:
            break
        if marker in (0xC0, 0xC1, 0xC2):  # baseline, extended, progressive
            frame = data[at + 4 : at + 2 + length]
            if len(frame) < 6 or len(frame) != 6 + 3 * frame[5]:
                return None
            found.append((int.from_bytes(frame[3:5], "big"), int.from_bytes(frame[1:3], "big"), frame[5]))
        elif marker in range(0xC3, 0xD0) and marker not in (0xC4, 0xCC):
            return None
        at += 2 + length
    return found[0] if len(found) == 1 and at + 4 <= len(data) else None


def most_halvings(size: int) -> int:
    """How often an image of MAX_PIXELS can be halved at most."""
    side, count = int(MAX_PIXELS**0.5) + 1, 0
    while side >= 2 * size:
        side, count = side // 2, count + 1
    return count


def build_pipeline(size: int, crop: str, device: torch.device, threads: int) -> Any:
    """The pipeline. Inputs: encoded bytes, and the fields of Cut; output: uint8 (3, size, size) on the device.

    The inputs are encoded, resized and anchor, and corner and kept for random_resized, else halvings and halved.
    """
    import nvidia.dali as dali

    fn: Any = dali.fn  # their annotations cover a part of what the functions take
    types: Any = dali.types
    gpu = device.type == "cuda"
    device_id: Any = (device.index or 0) if gpu else None  # None: a pipeline that needs no driver

    @dali.pipeline_def(
        batch_size=CHUNK,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=1,
        enable_conditionals=True,
    )
    def images():
        def numbers(name: str, ndim: int, dtype: Any = types.INT32) -> Any:
            return fn.external_source(name=name, dtype=dtype, ndim=ndim)

        image = fn.decoders.image(
            numbers("encoded", 1, types.UINT8),
            device="mixed" if gpu else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,  # Pillow does not turn images either
        )
        halvings, halved = numbers("halvings", 0), numbers("halved", 2, types.FLOAT)
        corner, kept = numbers("corner", 1), numbers("kept", 1)
        resized, anchor = numbers("resized", 1, types.FLOAT), numbers("anchor", 1)
        if crop != "random_resized":
            for k in range(most_halvings(size)):
                if halvings > k:
                    image = fn.resize(image, size=halved[k], interp_type=types.INTERP_LINEAR, antialias=False)
        else:
            image = fn.slice(image, corner, kept, axes=(0, 1))
        image = fn.resize(image, size=resized, interp_type=types.INTERP_CUBIC, antialias=True)
        image = fn.slice(image, anchor, (size, size), axes=(0, 1))
        return fn.transpose(image, perm=[2, 0, 1])

    pipeline = images()
    pipeline.build()
    return pipeline


class Runner:
    """A pipeline on one device, with its inputs. Used by one thread at a time."""

    def __init__(self, size: int, crop: str, device: torch.device, threads: int) -> None:
        self.size, self.crop, self.device, self.threads = size, crop, device, threads
        self._pipeline: Any = None
        self._levels = max(1, most_halvings(size))
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, encoded: list[bytes], cuts: list[Cut]) -> Tensor:
        """Images uint8 (n, 3, size, size) on the device, n at most CHUNK.

        Raises RuntimeError when DALI cannot decode one of them.
        """
        if self._pipeline is None:
            self._pipeline = build_pipeline(self.size, self.crop, self.device, self.threads)
        feed = self._pipeline.feed_input
        feed("encoded", [np.frombuffer(data, dtype=np.uint8) for data in encoded])
        feed("anchor", [np.array(c.anchor, dtype=np.int32) for c in cuts])
        feed("resized", [np.array(c.resized, dtype=np.float32) for c in cuts])
        if self.crop == "random_resized":
            feed("corner", [np.array(c.corner, dtype=np.int32) for c in cuts])
            feed("kept", [np.array(c.kept, dtype=np.int32) for c in cuts])
        else:
            feed("halvings", [np.array(len(c.halved), dtype=np.int32) for c in cuts])
            sizes = np.ones((len(cuts), self._levels, 2), dtype=np.float32)
            for row, c in zip(sizes, cuts, strict=True):
                row[: len(c.halved)] = np.array(c.halved).reshape(-1, 2)
            feed("halved", list(sizes))
        try:
            (output,) = self._pipeline.run()
        except RuntimeError:
            self._pipeline = None  # DALI says that it is no longer valid
            raise
        with self.stream():
            images = torch.from_dlpack(output.as_tensor()).clone()
            self.wait()  # DALI reuses its memory
        return images

    def stream(self) -> contextlib.AbstractContextManager[Any]:
        """Where the GPU work of this source is queued: beside the training step, not behind it."""
        return torch.cuda.stream(self._side) if self._side else contextlib.nullcontext()

    def wait(self) -> None:
        """Returns when the work of this source is done."""
        if self._side:
            self._side.synchronize()


class Ready(NamedTuple):
    """A sample on its way: bytes and geometry for DALI, or an image made by Pillow, or why there is neither."""

    index: int
    encoded: bytes = b""
    cut: Cut | None = None
    image: Tensor | None = None
    error: str = ""


class Dali(Source):
    """uint8 images of an encoded source, made by DALI."""

    per_core = 357  # of its CPU pipeline

    def __init__(self, inner: EncodedSource) -> None:
        super().__init__(inner.labels, inner.class_names, inner.flip)
        self.inner, self.lanes, self.on_error = inner, inner.lanes, inner.on_error
        self._reading: dict[int, int] = {}  # thread -> sample
        self._single: Runner | None = None

    def names_sha256(self) -> str:
        return self.inner.names_sha256()

    def bytes_sha256(self) -> str:
        return self.inner.bytes_sha256()

    def name(self, index: int) -> str:
        return self.inner.name(index)

    def pipeline_id(self, device: str = "cpu") -> str:
        import nvidia.dali as dali

        kind = "mixed" if device.startswith("cuda") else "cpu"
        made = f"{self.inner.crop}-{self.inner.size}/alpha-{self.inner.alpha}"
        return f"dali-{dali.__version__}-{kind}+pillow-{PIL.__version__}/{made}"

    def remarks(self) -> list[str]:
        return self.inner.remarks()

    def _prepare(self, index: int, draw: Tensor | None) -> Ready:
        self._reading[threading.get_ident()] = index
        try:
            data = self.inner.encoded(index)
            with open_image(data) as header:
                width, height = header.size
                channels = {"RGB": 3, "L": 1}.get(header.mode) if header.format == "JPEG" else None
            if channels and declared_shape(data) == (width, height, channels):
                return Ready(index, data, cut(width, height, self.inner.size, self.inner.crop, draw))
            unflipped = None if draw is None else torch.cat([torch.ones(1), draw[1:]])
            return Ready(index, image=self.inner.read(index, unflipped, 0))
        except MemoryError:
            raise
        except Exception as error:
            return Ready(index, error=str(explain(error)))
        finally:
            del self._reading[threading.get_ident()]

    def _decode(self, samples: list[Ready], run: Runner) -> list[Tensor | str]:
        """An image (3, size, size), or the reason why there is none, of every sample. Images are not mirrored."""
        results: list[Tensor | str] = [s.error if s.image is None else s.image for s in samples]

        def attempt(places: list[int]) -> bool:
            chosen = [samples[i] for i in places]
            try:
                images = run([s.encoded for s in chosen], [s.cut for s in chosen if s.cut is not None])
            except RuntimeError:
                return False
            for k, i in enumerate(places):
                results[i] = images[k]
            return True

        waiting = [i for i, sample in enumerate(samples) if sample.cut is not None]
        if not waiting or attempt(waiting):
            return results
        for i in waiting:  # Pillow knows most of the bad ones, and why
            try:
                self.inner.read(samples[i].index, None, 0)
            except BadImage as error:
                results[i] = str(error)
        readable = [i for i in waiting if not results[i]]
        if readable and not attempt(readable):
            for i in readable:
                if not attempt([i]):
                    results[i] = "DALI cannot decode it, although Pillow can"
        return results

    def _finish(self, samples: list[Ready], draws: Tensor | None, run: Runner) -> tuple[Tensor, Tensor]:
        """Images (n, 3, size, size) on the device and the indices really used; applies data.on_error."""
        images, used = self._decode(samples, run), [sample.index for sample in samples]
        for i in range(len(samples)):
            attempts = 0
            while isinstance(reason := images[i], str):
                apply_policy(self, [(used[i], reason)])
                attempts += 1
                if attempts > skip_limit(len(self)):
                    raise UserError(f"{self.name(used[i])}: {reason}, as the {attempts - 1} images before it")
                used[i] = (used[i] + 1) % len(self)
                images[i] = self._decode([self._prepare(used[i], None if draws is None else draws[i])], run)[0]
        tensors = [to_device(image, run.device) for image in images if isinstance(image, Tensor)]
        return torch.stack(tensors), torch.tensor(used)

    def read(self, index: int, draw: Tensor | None, seed: int) -> Tensor:
        if self._single is None:
            self._single = Runner(self.inner.size, self.inner.crop, torch.device("cpu"), 1)
        image = self._decode([self._prepare(index, draw)], self._single)[0]
        if isinstance(image, str):
            raise BadImage(image)
        return image.flip(-1) if is_mirrored(self.flip, draw) else image

    def _waiting_for(self) -> str:
        names = [self.name(index) for index in list(self._reading.values())]
        return names[0] if names else "images (DALI is busy)"

    def batches(
        self, plan: Iterator[Request], seed: int, device: torch.device, workers: int, timeout: float
    ) -> Iterator[Batch]:
        """As Source.batches; ``workers`` are threads that read files, and as many of DALI; 0: nothing runs ahead."""
        threads = max(1, workers)
        run = Runner(self.inner.size, self.inner.crop, device, threads)

        def parts() -> Iterator[tuple[Request, int, Tensor, Tensor | None]]:
            for request in plan:
                draws = self.uniforms(seed, request.positions) if request.augment else None
                for low in range(0, len(request.indices), CHUNK):
                    part = slice(low, low + CHUNK)
                    yield request, low, request.indices[part], None if draws is None else draws[part]

        def prepare(part: tuple[Request, int, Tensor, Tensor | None]):
            request, low, indices, draws = part
            calls = [(i, None if draws is None else draws[k]) for k, i in enumerate(indices.tolist())]
            return request, low, spread(lambda call: self._prepare(*call), calls, threads), draws

        def finish(prepared):
            request, low, samples, draws = prepared
            with run.stream():
                images, used = self._finish(samples, draws, run)
                if draws is not None and self.flip:
                    images = mirror(images, draws[:, 0] < 0.5)
                run.wait()
            return request, low, images, used

        def staged(function: Callable, items: Iterator) -> Iterator:
            return ahead(function, items, CHUNKS_AHEAD, timeout, self._waiting_for) if workers else map(function, items)

        finished = staged(finish, staged(prepare, parts()))
        images = used = torch.empty(0)
        for request, low, part, indices in finished:
            n = len(request.indices)
            if low == 0:
                images, used = part.new_empty(n, *part.shape[1:]), torch.empty(n, dtype=torch.int64)
            images[low : low + len(part)] = part
            if part.is_cuda:
                part.record_stream(torch.cuda.current_stream(device))
            used[low : low + len(part)] = indices
            if low + len(part) == n:
                yield batch_of_images(
                    images, to_device(self.labels[used], device), to_device(request.positions, device)
                )


def open_dali(data: DataConfig, model: ModelConfig, split: str) -> Dali:
    """DALI over the images at data.path (train) or data.heldout_path (heldout). Raises UserError."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:
        raise UserError("data.source=dali needs NVIDIA DALI; pip install nvidia-dali-cuda130") from None
    field, root = place(data, split, "an image folder, a folder of tars, or packed jpeg shards")
    if model.channels != 3:
        raise UserError(f"data.source=dali gives RGB images, but model.channels is {model.channels}")
    if data.crop == "fast":
        raise UserError("data.crop=fast is for data.source folder and tar; set data.crop=adm for dali")
    inner = open_container(root, field, data, model)
    check_classes(inner.num_classes, model.num_classes, f"{field} {root}")
    return Dali(inner)
