"""``data.crop: fast``: JPEGs decoded by simplejpeg, resized as uint8 by torch; the crop itself is that of ADM.

simplejpeg's pixels equal Pillow's. The resize is the same antialiased bicubic with other rounding: at most 2 gray
levels from the Pillow crop where no side is halved before, 3 otherwise, 0.005 on average. About twice as fast.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from unite_fast.base.errors import UserError
from unite_fast.data.source import BadImage
from unite_fast.data.transforms import MAX_PIXELS, resized_shape


def require() -> None:
    """Raises UserError when simplejpeg is not installed."""
    try:
        import simplejpeg  # noqa: F401
    except ImportError:
        raise UserError("data.crop=fast needs simplejpeg; pip install simplejpeg, or set data.crop=adm") from None


def versions() -> str:
    """What decides the pixels, for ``pipeline_id``."""
    import simplejpeg

    return f"simplejpeg-{simplejpeg.__version__}+torch-{torch.__version__}"


def decode_jpeg(data: bytes) -> np.ndarray | None:
    """RGB pixels uint8 (H, W, 3); None for what is left to Pillow: other formats, CMYK, and damaged files.

    Raises BadImage for more than MAX_PIXELS.
    """
    import simplejpeg

    if data[:2] != b"\xff\xd8":
        return None
    try:
        shape_and_colors = simplejpeg.decode_jpeg_header(data)
        height, width, colors = int(shape_and_colors[0]), int(shape_and_colors[1]), shape_and_colors[2]
        if width * height > MAX_PIXELS:
            raise BadImage(f"{width} x {height} pixels, more than the {MAX_PIXELS} allowed")
        return simplejpeg.decode_jpeg(data) if colors in ("YCbCr", "RGB", "Gray") else None
    except ValueError:
        return None


def fast_crop(image: Image.Image | np.ndarray, size: int) -> Tensor:
    """The center crop of ``transforms.adm_crop`` as uint8 (C, size, size), not contiguous.

    ``image`` is a Pillow image of mode RGB or L, or pixels uint8 (H, W, 3). Raises ValueError as adm_crop does.
    """
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    if min(height, width) >= 2 * size:
        image = image if isinstance(image, Image.Image) else Image.fromarray(image)
        while min(image.size) >= 2 * size:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        pixels = np.asarray(image)
        height, width = pixels.shape[:2]
    new_width, new_height = resized_shape(width, height, size)
    if not pixels.flags.writeable:
        pixels = pixels.copy()
    channels_last = torch.from_numpy(pixels.reshape(height, width, -1)).permute(2, 0, 1)[None]
    if (new_height, new_width) != (height, width):
        channels_last = F.interpolate(channels_last, (new_height, new_width), mode="bicubic", antialias=True)
    left, top = (new_width - size) // 2, (new_height - size) // 2
    return channels_last[0, :, top : top + size, left : left + size]
