"""Real photographs as files, for the tests of data: crops of scikit-learn's two sample photographs."""

from __future__ import annotations

import io
import itertools
import tarfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from PIL import Image

from unite_fast.data import Batch, stream

SIZES = [(96, 72), (72, 96), (65, 90), (64, 64), (150, 149), (300, 213), (40, 200), (128, 129), (427, 300)]


@cache
def photographs() -> tuple[Image.Image, ...]:
    from sklearn.datasets import load_sample_images

    return tuple(Image.fromarray(array) for array in load_sample_images().images)


def crop(number: int) -> Image.Image:
    """A crop that differs from those of other numbers."""
    width, height = SIZES[number % len(SIZES)]
    left, top = 37 * number % (641 - width), 23 * number % (428 - height)
    return photographs()[number % 2].crop((left, top, left + width, top + height))


def jpeg(image: Image.Image, quality: int = 92, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, **options)
    return buffer.getvalue()


def write_folder(root: Path, count: int, classes: int = 4) -> Path:
    """An image folder of ``count`` JPEGs."""
    for number in range(count):
        folder = root / f"class_{number % classes}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:04d}.jpg").write_bytes(jpeg(crop(number)))
    return root


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_tars(root: Path, folder: Path, tars: int = 3) -> Path:
    """The images of ``folder`` in the same order, as tars in WebDataset's layout."""
    root.mkdir(parents=True, exist_ok=True)
    names = sorted(path.name for path in folder.iterdir())
    files = [(label, path) for label, name in enumerate(names) for path in sorted((folder / name).iterdir())]
    for k in range(tars):
        with tarfile.open(root / f"{k:03d}.tar", "w") as archive:
            for label, path in files[k * len(files) // tars : (k + 1) * len(files) // tars]:
                add(archive, f"{path.stem}.jpg", path.read_bytes())
                add(archive, f"{path.stem}.cls", str(label).encode())
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in names))
    return root


def take(source, steps: int, **options):
    return list(itertools.islice(stream(source, 5, **options), steps))


def equal(a: list[Batch], b: list[Batch]) -> bool:
    """Whether two lists hold the same batches, bit for bit."""
    pairs = [(p.tensors(), q.tensors()) for p, q in zip(a, b, strict=True)]
    return all(p.keys() == q.keys() and all(torch.equal(p[name], q[name]) for name in p) for p, q in pairs)


def joined(parts: Sequence[Batch]) -> Batch:
    """One batch of the samples of several, in order."""
    named = [part.tensors() for part in parts]
    return Batch.from_tensors({name: torch.cat([tensors[name] for tensors in named]) for name in named[0]})


def check_streams(source, reference, steps: int = 6, batch: int = 36, **options) -> None:
    """``source`` gives the batches of ``reference``, for any world size and start, ahead or not, over two epochs."""
    whole = take(reference, steps, global_batch=batch)
    assert steps * batch > len(reference) > batch
    assert equal(whole, take(source, steps, global_batch=batch, **options))
    for start in range(1, steps):
        assert equal(whole[start : start + 1], take(source, 1, start=start * batch, global_batch=batch, **options))
    for world_size in (2, 3):
        ranks = [
            take(source, steps, global_batch=batch, rank=r, world_size=world_size, **options) for r in range(world_size)
        ]
        together = [joined(step) for step in zip(*ranks, strict=True)]
        assert equal(whole, together)
    samples = torch.cat([b.samples for b in whole])
    assert torch.equal(samples, torch.arange(steps * batch))
