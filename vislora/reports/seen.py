"""A picture of training images as training sees them: what the crop cuts off and what a mask leaves out is pale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageDraw, ImageFont

from vislora.reports.sheet import INK, PAPER, fitted, wrapped

FRAME = (230, 0, 80)
PALE = 0.75
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Seen:
    """A whole image and what is seen of it. boxes: left, top, right, bottom, each a share of the image's side.

    lines: what stands below. mask: of any size; what is black in it is not learned.
    """

    image: Image.Image
    boxes: Sequence[Box]
    lines: Sequence[str]
    mask: Image.Image | None = None


def seen_sheet(pictures: Sequence[Seen], columns: int = 6, cell: int = 192) -> Image.Image:
    """Lay the pictures out in so many `columns`, each with its lines below; `cell`: their longer side in pixels."""
    gap, size = cell // 16, max(11, cell // 15)
    font = ImageFont.load_default(size)
    texts = ["\n".join(wrapped(line, cell, size, lines=2) for line in picture.lines) for picture in pictures]
    below = round(max((text.count("\n") + 1 for text in texts), default=0) * size * 1.35)
    wide, high = cell + gap, cell + below + 2 * gap
    shape = min(columns, max(1, len(pictures))) * wide + gap, -(-len(pictures) // columns) * high + gap
    sheet = Image.new("RGB", shape, PAPER)
    draw = ImageDraw.Draw(sheet)
    for place, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        left, top = gap + place % columns * wide, gap + place // columns * high
        shown = _marked(picture, cell)
        sheet.paste(shown, (left + (cell - shown.width) // 2, top + cell - shown.height))
        draw.text((left, top + cell + gap // 2), text, INK, font)
    return sheet


def _marked(picture: Seen, cell: int) -> Image.Image:
    image = fitted(picture.image, cell)
    boxes = [_corners(box, image.size) for box in picture.boxes]
    seen = Image.new("L", image.size, 0)
    for box in boxes:
        ImageDraw.Draw(seen).rectangle(box, fill=255)
    if picture.mask is not None:
        seen = ImageChops.multiply(seen, picture.mask.convert("L").resize(image.size))
    shown = Image.composite(image, Image.blend(image, Image.new("RGB", image.size, PAPER), PALE), seen)
    for box in boxes:
        if box != (0, 0, image.width - 1, image.height - 1):
            ImageDraw.Draw(shown).rectangle(box, outline=FRAME)
    return shown


def _corners(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the first and the last pixel of a box, in x and in y."""
    left, top, right, bottom = (round(share * size[axis % 2]) for axis, share in enumerate(box))
    return left, top, max(left, right - 1), max(top, bottom - 1)
