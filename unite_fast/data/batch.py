"""A batch: what a modality is made of by name, and what each sample is, on one device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

CONTENT = "content."  # in front of a content's name in ``Batch.tensors``


def slots_taken(sizes: Tensor, slots: int) -> Tensor:
    """bool (B, slots): which of each sample's registers, or context tokens, are there. sizes int64 (B,)."""
    return torch.arange(slots, device=sizes.device) < sizes[:, None]


class Batch(NamedTuple):
    """What a source yields. Every tensor has the samples in its first dimension.

    Sources of images fill ``content["images"]``: (B, C, H, W), uint8 or float32 in [0, 1].
    """

    content: dict[str, Tensor]
    labels: Tensor  # (B,) int64
    samples: Tensor  # (B,) int64: positions in the run (stream) or indices in the source (all_images)
    sizes: Tensor | None = None  # (B,) int64: how many of the registers are a sample's; None: all of them

    @property
    def images(self) -> Tensor:
        """(B, C, H, W) of a batch of images."""
        return self.content["images"]

    def tensors(self) -> dict[str, Tensor]:
        """All of them by name, as ``from_tensors`` takes them."""
        named = {f"{CONTENT}{name}": value for name, value in self.content.items()}
        named |= {"labels": self.labels, "samples": self.samples}
        return named if self.sizes is None else named | {"sizes": self.sizes}

    @classmethod
    def from_tensors(cls, named: Mapping[str, Tensor]) -> Batch:
        content = {k.removeprefix(CONTENT): v for k, v in named.items() if k.startswith(CONTENT)}
        return cls(content, named["labels"], named["samples"], named.get("sizes"))

    def to(self, device: torch.device) -> Batch:
        return Batch.from_tensors({name: tensor.to(device) for name, tensor in self.tensors().items()})

    def split(self, size: int) -> Iterator[Batch]:
        """Micro-batches of ``size`` samples, views of this one."""
        named = self.tensors()
        for parts in zip(*(tensor.split(size) for tensor in named.values()), strict=True):
            yield Batch.from_tensors(dict(zip(named, parts, strict=True)))


def batch_of_images(images: Tensor, labels: Tensor, samples: Tensor) -> Batch:
    """images (B, C, H, W), uint8 or float32 in [0, 1]; labels and samples (B,) int64."""
    return Batch({"images": images}, labels, samples)
