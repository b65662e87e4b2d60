"""Image transforms on Pillow images: the ADM center crop and its two random alternatives.

Every crop takes a Pillow image of mode RGB or L and returns one of size x size. Random crops take uniform numbers
in [0, 1) instead of a generator, so that a sample's crop is a function of its position in the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MAX_PIXELS = 89_478_485  # of a decoded or resized image: a quarter of 1 GiB at 3 bytes, Pillow's own warning limit
SCALE, LOG_RATIO = (0.8, 1.0), (math.log(3 / 4), math.log(4 / 3))  # random_resized: share of the area, width/height
TRIES = 10


def resized_shape(width: int, height: int, size: int) -> tuple[int, int]:
    """(width, height) after a resize that makes the shorter side ``size`` and rounds the longer one.

    Raises ValueError for an image so elongated that the result would exceed MAX_PIXELS.
    """
    scale = size / min(width, height)
    new_width, new_height = round(width * scale), round(height * scale)
    if new_width * new_height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} is too elongated to resize its shorter side to {size}")
    return new_width, new_height


def resize_shorter(image: Image.Image, size: int) -> Image.Image:
    """Bicubic (antialiased) resize to ``resized_shape``. Raises ValueError as that does."""
    return image.resize(resized_shape(*image.size, size), Image.Resampling.BICUBIC)


def adm_crop(image: Image.Image, size: int) -> Image.Image:
    """The center crop of ADM (Dhariwal and Nichol 2021), pixel for pixel.

    The image is halved by box averaging while its shorter side is at least 2 size, then its shorter side is resized
    to ``size``, then the center is cut out, with offsets rounded down.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    image = resize_shorter(image, size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def offset(u: float, room: int) -> int:
    """A whole number from 0 to ``room``, inclusive."""
    return min(int(u * (room + 1)), room)


def resize_random(image: Image.Image, size: int, draw: list[float]) -> Image.Image:
    """Resizes the shorter side to 1.5 size (384 for 256), then cuts size x size at a random place (2 numbers)."""
    image = resize_shorter(image, size * 3 // 2)
    left, top = offset(draw[0], image.width - size), offset(draw[1], image.height - size)
    return image.crop((left, top, left + size, top + size))


def random_rectangle(width: int, height: int, draw: list[float]) -> tuple[int, int, int, int]:
    """(left, top, w, h) of a random rectangle of 0.8 to 1 of the area and w/h from 3/4 to 4/3.

    Uses 4 numbers per try (area, log of the ratio, left, top). When no try fits, the largest centered rectangle
    whose ratio is within the limits.
    """
    for k in range(TRIES):
        u_area, u_ratio, u_left, u_top = draw[4 * k : 4 * k + 4]
        area = width * height * (SCALE[0] + u_area * (SCALE[1] - SCALE[0]))
        ratio = math.exp(LOG_RATIO[0] + u_ratio * (LOG_RATIO[1] - LOG_RATIO[0]))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return offset(u_left, width - w), offset(u_top, height - h), w, h
    w = min(width, max(1, round(height * math.exp(LOG_RATIO[1]))))
    h = min(height, max(1, round(width / math.exp(LOG_RATIO[0]))))
    return (width - w) // 2, (height - h) // 2, w, h


def random_resized(image: Image.Image, size: int, draw: list[float]) -> Image.Image:
    """A random rectangle (see random_rectangle), resized to size x size (bicubic)."""
    left, top, w, h = random_rectangle(*image.size, draw)
    return image.crop((left, top, left + w, top + h)).resize((size, size), Image.Resampling.BICUBIC)


RANDOM_CROPS: dict[str, tuple[int, Callable[[Image.Image, int, list[float]], Image.Image]]] = {
    "resize_random": (2, resize_random),  # numbers drawn per sample, function
    "random_resized": (4 * TRIES, random_resized),
}


def to_tensor(image: Image.Image, mirrored: bool = False) -> Tensor:
    """uint8 (C, H, W), contiguous, from an RGB or L image; mirrored: left and right exchanged."""
    pixels = np.asarray(image)
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return torch.from_numpy((pixels[..., ::-1] if mirrored else pixels).copy())


def is_mirrored(flip: bool, draw: Tensor | None) -> bool:
    """Whether a sample with the numbers ``draw`` (lanes,) is mirrored; without numbers it is not."""
    return flip and draw is not None and bool(draw[0] < 0.5)


def transform(image: Image.Image, size: int, crop: str, flip: bool, draw: Tensor | None) -> Tensor:
    """uint8 (C, size, size). ``draw`` (lanes,) holds the flip's number, then the crop's; None: the plain ADM crop."""
    if draw is None or crop == "adm":
        image = adm_crop(image, size)
    else:
        image = RANDOM_CROPS[crop][1](image, size, draw[1:].tolist())
    return to_tensor(image, is_mirrored(flip, draw))
