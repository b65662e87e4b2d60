"""Transparency (``data.alpha``): what takes the place of pixels that an image says are not to be seen.

Under a transparent pixel a file keeps whatever color its program left there. Dropping the alpha channel, as Pillow's
``convert("RGB")`` does, would train on that; here such pixels are laid on white or on black, or refused.
"""

from __future__ import annotations

from PIL import Image

from unite_fast.data.source import BadImage

GROUNDS = {"white": (255, 255, 255, 255), "black": (0, 0, 0, 255)}


def opaque(image: Image.Image, alpha: str) -> Image.Image:
    """An image of any mode as RGB. alpha: white, black, or refuse. Raises BadImage for a transparent one to refuse."""
    if not image.has_transparency_data or image.mode.startswith("I"):
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    least, _ = rgba.getchannel("A").getextrema()
    if least == 255:
        return rgba.convert("RGB")
    if alpha == "refuse":
        raise BadImage("parts of it are transparent; lay it on a ground with data.alpha=white or black")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, GROUNDS[alpha]), rgba).convert("RGB")
