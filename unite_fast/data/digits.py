"""scikit-learn's handwritten digits: 1,797 real 8x8 images that come with the library, nothing to download.

30 images of each class, chosen by a fixed seed, are held out; 1,497 are for training. Writers occur on both sides.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from unite_fast.base.errors import UserError
from unite_fast.config import DataConfig, ModelConfig
from unite_fast.data.order import permutation
from unite_fast.data.source import HeldSource, check_channels, check_classes

HELD_OUT_PER_CLASS = 30
SPLIT_SEED = 0  # of the split, not of the run: the held-out images never change


class Digits(HeldSource):
    """float32 images in [0, 1]: gray levels 0 to 16 of the library, divided by 16."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        super().__init__(images, labels, [str(i) for i in range(10)], flip=False)


def held_out(labels: Tensor) -> Tensor:
    """True for the held-out samples, bool (n,), given all labels (n,)."""
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        members = (labels == label).nonzero()[:, 0]
        mask[members[permutation(len(members), SPLIT_SEED, label)[:HELD_OUT_PER_CLASS]]] = True
    return mask


def require(reading: DataConfig, what: str) -> None:
    """Raises UserError unless a run's samples are the digits, which ``what`` is for."""
    if reading.source != "digits":
        raise UserError(f"{what} is for data.source=digits, this is {reading.source}")


def open_digits(data: DataConfig, model: ModelConfig, split: str) -> Digits:
    """The digits at model.image_size (antialiased bicubic, clamped to [0, 1]), gray or repeated to RGB."""
    if data.flip:
        raise UserError("data.flip: mirrored digits are not digits; set data.flip=false")
    if data.crop != "adm":
        raise UserError(f"data.crop={data.crop} is for image folders; set data.crop=adm for the digits")
    check_channels(model.channels, "data.source digits")
    check_classes(10, model.num_classes, "data.source digits")
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("data.source digits needs scikit-learn; pip install scikit-learn") from None
    pixels, targets = load_digits(return_X_y=True)
    images = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    labels = torch.as_tensor(targets, dtype=torch.int64)
    chosen = held_out(labels) if split == "heldout" else ~held_out(labels)
    images, labels = images[chosen], labels[chosen]
    if model.image_size != images.shape[-1]:
        size = (model.image_size, model.image_size)
        images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    return Digits(images.repeat(1, model.channels, 1, 1), labels)
