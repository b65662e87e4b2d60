"""Grids of images as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unite_fast.base import files

CELL, TEXT = 96, 13  # pixels: a cell of a labelled grid at least; the height of its letters


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


def grid(rows: list[Tensor], gap: int = 2, smallest: int = 32) -> tuple[Tensor, int]:
    """Rows of images (B, Q, S, S) in [0, 1] on white, (Q, H, W), small ones enlarged by whole pixels; a cell's side."""
    size, count = rows[0].shape[-1], max(len(row) for row in rows)
    zoom = -(-smallest // size)
    cell = size * zoom + gap
    canvas = torch.ones(rows[0].shape[1], len(rows) * cell + gap, count * cell + gap)
    for r, row in enumerate(rows):
        enlarged = F.interpolate(row.detach().float().cpu().clamp(0, 1), scale_factor=zoom, mode="nearest")
        for c, image in enumerate(enlarged):
            top, left = r * cell + gap, c * cell + gap
            canvas[:, top : top + size * zoom, left : left + size * zoom] = image
    return canvas, cell


def save_grid(
    path: Path, rows: list[Tensor], gap: int = 2, smallest: int = 32, text: Mapping[str, str] | None = None
) -> None:
    """A ``grid`` as one PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(path, grid(rows, gap, smallest)[0], text)


@dataclass(frozen=True)
class Words:
    """What stands around a grid: a line above it all, one above each column, one beside each row."""

    title: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[str] = ()


def save_labelled(path: Path, rows: list[Tensor], words: Words, text: Mapping[str, str] | None = None) -> None:
    """A ``grid`` of cells of at least ``CELL`` pixels, in black on white, with words around it, as one PNG."""
    from PIL import Image, ImageDraw, ImageFont

    canvas, cell = grid(rows, smallest=CELL)
    pixels = to_uint8(canvas.expand(3, -1, -1)[None] if len(canvas) == 1 else canvas[None])[0]
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    font = ImageFont.load_default(TEXT)
    measure = ImageDraw.Draw(picture)
    lines = [row.split("\n") for row in words.rows]
    left = max((int(measure.textlength(line, font)) + 12 for row in lines for line in row), default=0)
    title = TEXT + 10 if words.title else 0
    top = title + (TEXT + 8 if any(words.columns) else 0)
    whole = Image.new("RGB", (left + picture.width, top + picture.height), "white")
    whole.paste(picture, (left, top))
    pen = ImageDraw.Draw(whole)
    pen.text((4, 4), words.title, "black", font)
    for c, name in enumerate(words.columns):
        pen.text(
            (left + c * cell + cell / 2, title + 2), _shortened(name, cell - 6, measure, font), "black", font, "ma"
        )
    for r, row in enumerate(lines):
        middle = top + r * cell + cell / 2 - (TEXT + 3) * len(row) / 2
        for k, line in enumerate(row):
            pen.text((left - 8, middle + k * (TEXT + 3)), line, "black", font, "ra")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(path, torch.from_numpy(np.asarray(whole).copy()).permute(2, 0, 1), text)


def _shortened(name: str, width: int, measure: Any, font: Any) -> str:
    """As much of a name as fits."""
    if measure.textlength(name, font) <= width:
        return name
    while name and measure.textlength(name + "...", font) > width:
        name = name[:-1]
    return name + "..."


def columns(classes: int, near: int = 8, most: int = 12) -> int:
    """Of a grid of ``classes`` classes in turn: whole rounds of them, about ``near`` of them and at most ``most``."""
    if not 1 <= classes <= most:
        return near
    return classes * max(1, round(near / classes))
