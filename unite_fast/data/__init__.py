"""Batches of images and labels from sources of several kinds.

    source = open_source(config.data, config.model)              # or split="heldout"
    for batch in stream(source, seed, start=images_seen, global_batch=1024): ...

| data.source | what it reads | pixels | for |
|---|---|---|---|
| folder | one sub-folder of images per class | Pillow, exact; data.crop=fast: within 3, 2.4 x faster | anything |
| tar | tars in WebDataset's layout, indexed | as folder | data that is there already |
| packed | shards written by python -m unite_fast.data.pack | uint8 shards: those of folder, bit for bit | training |
| dali | folders, tars or jpeg shards, decoded on the GPU | near those of folder; see dali.py | no room to pack |
| digits | scikit-learn's handwritten digits | | the demo |
| idx | MNIST's format, held in memory | | small sets, as Fashion-MNIST |
| synthetic | random pixels on the device | | benchmarks |
| qm9, mp20, crystals, structures, joint | molecules and crystals (``data.atoms``) | | model.modality=atoms |

A new kind of source is its name among those of ``data.source``, and a file of that name with an opener
``open_NAME(DataConfig, ModelConfig, split) -> Source``, which raises NoPath where it needs a path and none is given.
Order, sharding and resume are in ``stream.py`` and do not depend on the source.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from unite_fast.base.errors import UserError
from unite_fast.config import MADE_FROM, SOURCES, DataConfig, ModelConfig, choices
from unite_fast.data.atoms.source import open_atoms
from unite_fast.data.batch import Batch, batch_of_images
from unite_fast.data.order import Order
from unite_fast.data.rate import Waits
from unite_fast.data.source import BadImage, NoPath, Source, WorkerError
from unite_fast.data.stream import all_images, stream

__all__ = [
    "BadImage",
    "Batch",
    "NoPath",
    "Order",
    "Source",
    "Waits",
    "WorkerError",
    "all_images",
    "batch_of_images",
    "open_heldout",
    "open_source",
    "stream",
]

Opener = Callable[[DataConfig, ModelConfig, str], Source]


def opener(name: str) -> Opener:
    """Of ``data.source=name``: ``open_NAME`` of the file NAME.py. Molecules and crystals share one."""
    if name in SOURCES["structures"]:
        return open_atoms
    return getattr(importlib.import_module(f"unite_fast.data.{name}"), f"open_{name}")


def open_source(data: DataConfig, model: ModelConfig, split: str = "train") -> Source:
    """The source that ``data.source`` names, producing what ``model`` takes.

    Of images that is (model.channels, model.image_size, model.image_size), of atoms up to ``model.num_latents``.

    ``split`` is "train" or "heldout". Everything that can be wrong without decoding an image is raised here, as
    UserError: missing or empty folders, class counts that differ from model.num_classes, unsupported channels.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split must be 'train' or 'heldout', got {split!r}")
    if data.source not in choices(DataConfig, "source"):
        raise UserError(f"data.source {data.source!r} is not known; one of {', '.join(choices(DataConfig, 'source'))}")
    if data.source not in SOURCES[MADE_FROM[model.modality]]:
        raise UserError(f"data.source {data.source} does not give model.modality {model.modality}; change one of them")
    if data.workers < 0:
        raise UserError(f"data.workers must not be negative, got {data.workers}")
    if data.timeout <= 0:
        raise UserError(f"data.timeout must be positive (seconds), got {data.timeout}")
    source = opener(data.source)(data, model, split)
    if model.num_classes == 0:
        source.forget_labels()
    return source


def open_heldout(data: DataConfig, model: ModelConfig) -> tuple[Source, str]:
    """Held-out samples, where ``data`` says which those are, or else those that are trained on; and their split."""
    try:
        return open_source(data, model, "heldout"), "heldout"
    except NoPath:
        return open_source(data, model), "train"
