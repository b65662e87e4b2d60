"""Grids: whole pixels, words around them, columns that fit the classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from unite_fast.modality import pictures


@pytest.mark.parametrize(("classes", "width"), [(0, 8), (1, 8), (2, 8), (3, 9), (5, 10), (9, 9), (10, 10), (1000, 8)])
def test_columns(classes, width):
    assert pictures.columns(classes) == width


def test_words_stand_around_whole_pixels(tmp_path):
    rows = [torch.rand(3, 1, 8, 8), torch.rand(3, 1, 8, 8)]
    words = pictures.Words("step 100", ["cat", "dog", "a name that is much too long"], ["real", "reconstructed\n31 dB"])
    pictures.save_labelled(tmp_path / "a" / "grid.png", rows, words, {"protocol": "x"})
    with Image.open(tmp_path / "a" / "grid.png") as image:
        assert image.info["protocol"] == "x"
        pixels = np.asarray(image)
    plain = pictures.grid(rows, smallest=pictures.CELL)[0]
    height, width = plain.shape[1:]
    assert width == 3 * (96 + 2) + 2
    inside = pixels[-height:, -width:, 0]
    assert np.array_equal(inside, pictures.to_uint8(plain[None])[0, 0].numpy())
    assert pixels[:-height, -width:].min() < 100  # letters above
    assert pixels[-height:, :-width].min() < 100  # and on the left
    assert (pixels[:-height, : -width // 3].min(axis=(1, 2)) == 255).any()  # the title and the names are two lines
