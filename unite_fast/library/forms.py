"""Images in the forms that a program has them: files, PIL images, arrays, tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unite_fast.base.errors import UserError
from unite_fast.data.alpha import opaque
from unite_fast.data.folder import read_image
from unite_fast.data.transforms import adm_crop, to_tensor
from unite_fast.modality import pictures

Form = Literal["pil", "array", "tensor"]


def to_tensor_of(image: Any, shape: tuple[int, int, int], alpha: str) -> Tensor:
    """One image in any form as float32 (Q, S, S) in [0, 1] on the CPU, as a model of ``shape`` sees it.

    alpha: as in ``data.alpha``. Raises UserError.
    """
    if isinstance(image, str | Path):
        image = read_image(image, alpha=alpha)
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(image if image.ndim == 2 else image.transpose(2, 0, 1))
    if isinstance(image, Image.Image):
        rgb = opaque(image, alpha)
        gray = shape[0] == 1
        image = to_tensor(adm_crop(rgb.convert("L") if gray else rgb, shape[-1]))
    image = image[None] if image.ndim == 2 else image
    if image.dtype == torch.uint8:
        return image.float() / 255
    if not image.is_floating_point() or (image.numel() and not 0 <= image.min() <= image.max() <= 1):
        raise UserError(f"images of {image.dtype} must be uint8, or float in [0, 1]".replace("torch.", ""))
    return image.float().cpu()


def from_tensor(images: Tensor, output: Form) -> Any:
    """Images (B, Q, S, S) in [0, 1] as a list of PIL images, an array uint8 (B, S, S, Q), or as they are."""
    if output == "tensor":
        return images
    pixels = pictures.to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()
    if output == "array":
        return pixels
    return [Image.fromarray(one[..., 0] if one.shape[-1] == 1 else one) for one in pixels]
