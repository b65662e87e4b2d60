"""Random images that live on the device: training speed without any cost of data.

As many samples as ImageNet. Sample i shows picture i % POOL of a pool that is filled once per (seed, device);
pixels are independent uniform bytes, so nothing can be learned from them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unite_fast.base.errors import UserError
from unite_fast.config import DataConfig, ModelConfig
from unite_fast.data.source import PIXEL_STREAM, ResidentSource, to_device
from unite_kernels.philox import uniform

TRAIN_IMAGES, HELD_OUT_IMAGES = 1_281_167, 50_000
POOL = 32


class Synthetic(ResidentSource):
    """uint8 images; labels are i % num_classes."""

    def __init__(self, count: int, first: int, shape: tuple[int, int, int], num_classes: int, flip: bool) -> None:
        super().__init__(torch.arange(count) % max(1, num_classes), [f"class {i}" for i in range(num_classes)], flip)
        self.first = first  # number of the pool's first picture: the two splits differ
        self.shape = shape
        self._pools: dict[tuple[int, torch.device], Tensor] = {}

    def _pool(self, seed: int, device: torch.device) -> Tensor:
        if (seed, device) not in self._pools:
            pictures = torch.arange(self.first, self.first + POOL, device=device)
            rows = [uniform(seed, PIXEL_STREAM, p, self.shape) for p in pictures.split(4)]  # in parts: less memory
            self._pools[seed, device] = (torch.cat(rows) * 256).to(torch.uint8)
        return self._pools[seed, device]

    def gather(self, indices: Tensor, seed: int, device: torch.device) -> Tensor:
        return self._pool(seed, device)[to_device(indices % POOL, device)]


def open_synthetic(data: DataConfig, model: ModelConfig, split: str) -> Synthetic:
    """uint8 images of any size and channel count. Raises UserError for a crop other than adm."""
    if data.crop != "adm":
        raise UserError(f"data.crop={data.crop} is for image folders; set data.crop=adm for synthetic images")
    count, first = (TRAIN_IMAGES, 0) if split == "train" else (HELD_OUT_IMAGES, POOL)
    shape = (model.channels, model.image_size, model.image_size)
    return Synthetic(count, first, shape, model.num_classes, data.flip)
