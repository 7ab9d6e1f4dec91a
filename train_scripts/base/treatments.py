"""Styles that nobody drew icon by icon: what a pen, a sign maker or an old game would make of a drawing.

Each function takes a drawing as RGBA, `SCALE` times as wide and high as the picture that it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

SCALE = 4
PAPER, NIGHT, INK = (244, 239, 226), (13, 12, 34), (40, 32, 48)
Floats = NDArray[np.float32]


def plain(drawing: Image.Image) -> Image.Image:
    """Return the drawing on white."""
    return _on(drawing, (255, 255, 255)).resize(_size(drawing), Image.Resampling.BOX)


def pixel(drawing: Image.Image, cell: int = 4, colours: int = 10) -> Image.Image:
    """Return the drawing in large pixels of few colours, with a dark outline, on white."""
    across = drawing.width // SCALE // cell
    inner = drawing.resize((across - 2, across - 2), Image.Resampling.BOX)
    small = Image.new("RGBA", (across, across))
    small.paste(inner, (1, 1))
    shape = np.asarray(small)[..., 3] > 110
    few = small.convert("RGB").quantize(colours, Image.Quantize.MAXCOVERAGE).convert("RGB")
    out = np.where(shape[..., None], np.asarray(few), 255).astype(np.uint8)
    around = np.zeros_like(shape)
    for axis in (0, 1):
        for step in (-1, 1):
            around |= np.roll(shape, step, axis)
    out[around & ~shape] = INK
    return Image.fromarray(out).resize(_size(drawing), Image.Resampling.NEAREST)


def pencil(drawing: Image.Image) -> Image.Image:
    """Return graphite contours, softly shaded where the drawing is dark, on paper."""
    on_white = _on(drawing, (255, 255, 255))
    lines = np.clip(_contours(on_white) * 5.0, 0.0, 1.0)
    grey = np.asarray(on_white.convert("L"), np.float32) / 255.0
    dark = np.clip(0.85 * lines + 0.45 * (1.0 - grey), 0.0, 0.9)[..., None]
    page = np.array(PAPER, np.float32) * (1.0 - dark) + 40.0 * dark
    return _image(page).resize(_size(drawing), Image.Resampling.BOX)


def neon(drawing: Image.Image) -> Image.Image:
    """Return glowing contours in the drawing's own colours at night."""
    on_black = _on(drawing, (0, 0, 0)).filter(ImageFilter.MaxFilter(9))
    lines = np.clip(_contours(_on(drawing, NIGHT)) * 3.0, 0.0, 1.0)
    colour = np.asarray(on_black, np.float32)
    vivid = 255.0 * (colour / np.maximum(colour.max(2, keepdims=True), 60.0)) ** 1.6
    tube = vivid * lines[..., None]
    glow = np.asarray(_image(tube).filter(ImageFilter.GaussianBlur(10)), np.float32)
    return _image(np.array(NIGHT, np.float32) + tube + 1.5 * glow).resize(_size(drawing), Image.Resampling.BOX)


TREATMENTS: Mapping[str, Callable[[Image.Image], Image.Image]] = MappingProxyType(
    {"plain": plain, "pixel": pixel, "pencil": pencil, "neon": neon}
)


def _size(drawing: Image.Image) -> tuple[int, int]:
    return drawing.width // SCALE, drawing.height // SCALE


def _on(drawing: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    ground = Image.new("RGBA", drawing.size, (*colour, 255))
    ground.alpha_composite(drawing)
    return ground.convert("RGB")


def _image(values: Floats) -> Image.Image:
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def _contours(image: Image.Image) -> Floats:
    """Return how strongly colours change, (height, width), in lines about two pixels of a picture wide."""
    soft = np.asarray(image.filter(ImageFilter.GaussianBlur(1.5)), np.float32) / 255.0
    down, across = np.gradient(soft, axis=(0, 1))
    found: Floats = np.sqrt(down**2 + across**2).max(2)
    wide = _image(found * 255.0).filter(ImageFilter.MaxFilter(5))
    return np.asarray(wide, np.float32) / 255.0
