"""Grids of images as PNG files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from unite_fast.base import files


def to_uint8(images: Tensor) -> Tensor:
    """Images (B, Q, S, S) in [0, 1] -> uint8, values truncated as in the published evaluation (x * 255)."""
    return (images.float().clamp(0, 1) * 255).to(torch.uint8)


def save_png(path: Path, image: Tensor, text: Mapping[str, str] | None = None) -> None:
    """One image (Q, S, S), uint8 or in [0, 1], as a PNG with ``text`` in it; written whole or not at all."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    said = PngInfo()
    for key, value in (text or {}).items():
        said.add_text(key, value)
    pixels = image if image.dtype == torch.uint8 else to_uint8(image[None])[0]
    array = pixels.permute(1, 2, 0).cpu().numpy()
    with files.replacing(path) as file:
        Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(file, format="PNG", pnginfo=said)


def save_grid(
    path: Path, rows: list[Tensor], gap: int = 2, smallest: int = 32, text: Mapping[str, str] | None = None
) -> None:
    """Rows of images (B, Q, S, S) in [0, 1] as one PNG on white; small images are enlarged by whole pixels."""
    size, count = rows[0].shape[-1], max(len(row) for row in rows)
    zoom = -(-smallest // size)
    cell = size * zoom + gap
    canvas = torch.ones(rows[0].shape[1], len(rows) * cell + gap, count * cell + gap)
    for r, row in enumerate(rows):
        enlarged = F.interpolate(row.detach().float().cpu().clamp(0, 1), scale_factor=zoom, mode="nearest")
        for c, image in enumerate(enlarged):
            top, left = r * cell + gap, c * cell + gap
            canvas[:, top : top + size * zoom, left : left + size * zoom] = image
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(path, canvas, text)
