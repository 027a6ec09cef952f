"""One image file as pixels, as training and evaluation see it. Knows nothing of data sets, and imports no torch."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def decode(source: str | Path | bytes, channels: int) -> Image.Image:
    """The image in a file, or in its bytes, upright, in mode L (1 channel) or RGB (3); transparency becomes white.
    Raises whatever Pillow raises on a broken file."""
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
        image: Image.Image = opened
        ImageOps.exif_transpose(image, in_place=True)
        wide = image.mode == "I" and opened.format != "PPM"  # which Pillow opens so if it has 16 bits
        if image.mode == "F" or (wide and np.asarray(image).max() <= 255):  # above that it is 16 bits in 32
            raise ValueError("pixels of 32 bits have no agreed range: save it with 8 or 16 bits")
        if image.mode.startswith("I"):  # 16 bits
            image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("L" if channels == 1 else "RGB")


def centre_box(width: int, height: int, part: float) -> Box:
    """The centred square whose side is `part` of the shorter side."""
    side = min(width, height) * part
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def resized(image: Image.Image, size: int, box: Box) -> Pixels:
    """uint8 [size, size, C] of the part `box` of an image, resized (bicubic, with anti-aliasing)."""
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
    return pixels.reshape(size, size, len(image.getbands()))
