"""Transforms: the ADM crop against its definition and against sizes worked out by hand, the random crops' limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from unite_fast.data.transforms import adm_crop, random_resized, resize_random, to_tensor


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(array) for array in load_sample_images().images]


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.mode == b.mode and a.size == b.size and a.tobytes() == b.tobytes()


def resample_axis(pixels: np.ndarray, out: int, kernel, support: float) -> np.ndarray:
    """Antialiased resampling of axis 0 by its definition, in float64, rounded to whole levels."""
    n = len(pixels)
    scale = n / out
    stretch = max(scale, 1.0)
    rows = []
    for i in range(out):
        center = (i + 0.5) * scale
        xs = [x for x in range(n) if abs(x + 0.5 - center) < support * stretch]
        weights = np.array([kernel((x + 0.5 - center) / stretch) for x in xs])
        rows.append(np.tensordot(weights / weights.sum(), pixels[xs].astype(np.float64), axes=1))
    return np.clip(np.floor(np.array(rows) + 0.5), 0, 255)


def bicubic(x: float) -> float:
    x = abs(x)
    return 1.5 * x**3 - 2.5 * x**2 + 1 if x < 1 else -0.5 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def naive_adm(pixels: np.ndarray, size: int) -> np.ndarray:
    while min(pixels.shape[:2]) >= 2 * size:
        height, width = pixels.shape[:2]
        assert (height % 2, width % 2) == (0, 0), "the naive version halves even sizes only"
        pixels = np.floor(pixels.reshape(height, width // 2, 2, 3).mean(2) + 0.5)  # Pillow rounds after each axis
        pixels = np.floor(pixels.reshape(height // 2, 2, width // 2, 3).mean(1) + 0.5)
    height, width = pixels.shape[:2]
    scale = size / min(height, width)
    pixels = resample_axis(pixels.transpose(1, 0, 2), round(width * scale), bicubic, 2.0).transpose(1, 0, 2)
    pixels = resample_axis(pixels, round(height * scale), bicubic, 2.0)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize("box", [(0, 0, 120, 90), (5, 5, 245, 133), (9, 3, 29, 50), (0, 0, 600, 400), (0, 0, 32, 32)])
def test_adm_crop_against_its_definition(photos, box):
    image = photos[0].crop(box)
    ours = np.asarray(adm_crop(image, 32)).astype(int)
    difference = np.abs(ours - naive_adm(np.asarray(image), 32))
    assert ours.shape == (32, 32, 3)
    assert difference.max() <= 1
    assert difference.mean() < 0.01


def test_adm_crop_hand_worked_sizes(photos):
    bicubic_, box = Image.Resampling.BICUBIC, Image.Resampling.BOX
    wide = photos[1]  # 640 x 427: under 512, so no halving; 640 * 256 / 427 = 383.7
    expected = wide.resize((384, 256), bicubic_).crop((64, 0, 320, 256))
    assert same(adm_crop(wide, 256), expected)
    big = wide.resize((1001, 751))  # halved once to 500 x 375; 500 * 256 / 375 = 341.3; (341 - 256) // 2 = 42
    expected = big.resize((500, 375), box).resize((341, 256), bicubic_).crop((42, 0, 298, 256))
    assert same(adm_crop(big, 256), expected)
    tall = wide.resize((512, 1024))  # exactly 2 x 256: halved to 256 x 512, top (512 - 256) // 2 = 128
    assert same(adm_crop(tall, 256), tall.resize((256, 512), box).crop((0, 128, 256, 384)))
    half = wide.resize((64, 37))  # 64 * 24 / 37 = 41.5 -> 42; and 5 * 3 / 2 = 7.5 -> 8, 3 * 3 / 2 = 4.5 -> 4 (even)
    assert adm_crop(half, 24).size == (24, 24)
    small = wide.resize((2, 3))
    assert same(adm_crop(small, 3), small.resize((3, 4), bicubic_).crop((0, 0, 3, 3)))


@pytest.mark.parametrize("draw", [[0.0, 0.0], [0.5, 0.5], [0.9999999, 0.9999999]])
def test_resize_random_stays_inside(photos, draw):
    resized = photos[0].resize((576, 384), Image.Resampling.BICUBIC)  # 640 x 427 -> 575.5 x 384
    left, top = int(draw[0] * 321), int(draw[1] * 129)
    assert same(resize_random(photos[0], 256, draw), resized.crop((left, top, left + 256, top + 256)))
    assert resize_random(photos[0].resize((7, 5)), 3, draw).size == (3, 3)


def test_random_resized_limits(photos):
    class Spy:
        def __init__(self, width, height):
            self.width, self.height, self.size = width, height, (width, height)

        def crop(self, box):
            self.box = box
            return self

        def resize(self, size, _):
            return self

    generator = np.random.default_rng(0)
    areas, ratios = [], []
    for _ in range(300):
        spy = random_resized(Spy(512, 448), 256, generator.random(40).tolist())  # type: ignore[arg-type]
        left, top, right, bottom = spy.box  # type: ignore[attr-defined]
        assert 0 <= left < right <= 512
        assert 0 <= top < bottom <= 448
        areas.append((right - left) * (bottom - top) / (512 * 448))
        ratios.append((right - left) / (bottom - top))
    assert min(areas) > 0.795
    assert max(areas) <= 1
    assert np.ptp(areas) > 0.1
    assert min(ratios) > 0.74
    assert max(ratios) < 1.34
    spy = random_resized(Spy(1000, 10), 256, [0.5] * 40)  # type: ignore[arg-type]
    assert spy.box == (493, 0, 506, 10)  # type: ignore[attr-defined]  # no try fits: 13 x 10 in the center
    assert random_resized(photos[0], 256, [0.3] * 40).size == (256, 256)


def test_to_tensor_mirrors(photos):
    image = photos[0].crop((0, 0, 5, 4))
    plain, mirrored = to_tensor(image), to_tensor(image, mirrored=True)
    assert plain.shape == (3, 4, 5)
    assert plain.is_contiguous()
    assert mirrored.is_contiguous()
    assert torch.equal(plain.flip(-1), mirrored)
    assert plain[:, 1, 2].tolist() == list(image.getpixel((2, 1)))  # type: ignore[arg-type]
