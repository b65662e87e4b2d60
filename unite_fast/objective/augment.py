"""DiffAugment (Zhao et al. 2020, arXiv 2006.10738): differentiable changes of the images that a discriminator sees.

    colour        brightness +-1/4 of the range, saturation x (0 to 2), contrast x (1/2 to 3/2)
    translation   by up to 1/8 of the side in each direction, zeros behind it
    cutout        zeros in a square of half the side

An image's changes are a function of its numbers (``draw``), so a real image and its reconstruction are changed alike.

Shape letters: B batch, Q channels, S image size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from unite_kernels import philox

STREAM = (
    3 << 18
)  # of the numbers, then of the direction of the penalty: no other use has these streams (docs/DESIGN.md)
NUMBERS = 8  # of an image: whether it is changed, three of its colour, two of the shift, two of the square


def draw(seed: int, samples: Tensor) -> Tensor:
    """Uniform numbers (B, 8) in [0, 1) of the global sample positions (B,) int64."""
    return philox.uniform(seed, STREAM, samples, (NUMBERS,))


def direction(seed: int, samples: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Normal numbers (B, *shape)."""
    return philox.normal(seed, STREAM + 1, samples, shape)


def _column(numbers: Tensor, index: int) -> Tensor:
    return numbers[:, index, None, None, None]


def colour(x: Tensor, numbers: Tensor) -> Tensor:
    x = x + (_column(numbers, 1) - 0.5) / 2
    mean = x.mean(1, keepdim=True)
    x = mean + (x - mean) * (2 * _column(numbers, 2))
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * (0.5 + _column(numbers, 3))


def translation(x: Tensor, numbers: Tensor) -> Tensor:
    for dimension, index in ((2, 4), (3, 5)):
        size = x.shape[dimension]
        most = (size + 4) // 8
        shift = (numbers[:, index] * (2 * most + 1)).long() - most
        place = torch.arange(size, device=x.device) - shift[:, None]  # (B, S)
        there = (place >= 0) & (place < size)
        shape = [len(x), 1, 1, 1]
        shape[dimension] = size
        x = x.gather(dimension, place.clamp(0, size - 1).view(shape).expand_as(x)) * there.view(shape)
    return x


def cutout(x: Tensor, numbers: Tensor) -> Tensor:
    keep: Tensor | bool = False
    for dimension, index in ((2, 6), (3, 7)):
        size = x.shape[dimension]
        start = (numbers[:, index] * (size + 1)).long() - size // 4  # of a square that may reach over the edge
        place = torch.arange(size, device=x.device) - start[:, None]
        shape = [len(x), 1, 1, 1]
        shape[dimension] = size
        keep = keep | ((place < 0) | (place >= size // 2)).view(shape)
    return x * keep


CHANGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "colour": colour, "translation": translation, "cutout": cutout,
}  # fmt: skip


def augment(images: Tensor, numbers: Tensor, kinds: tuple[str, ...], probability: float = 1.0) -> Tensor:
    """Images (B, Q, S, S), each changed with ``probability`` by these ``kinds`` in the order of CHANGES."""
    changed = images
    for kind, change in CHANGES.items():
        if kind in kinds:
            changed = change(changed, numbers)
    return changed if probability == 1 else torch.where(_column(numbers, 0) < probability, changed, images)
