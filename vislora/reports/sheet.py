"""Contact sheets: images in a labelled grid."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

PAPER, INK = (255, 255, 255), (40, 40, 40)


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]], row_labels: Sequence[str], column_labels: Sequence[str], cell: int = 160
) -> Image.Image:
    """Lay `rows` of images out under `column_labels`, each row with its label at the left.

    `cell`: the longer side of a picture in pixels; small images are enlarged by smooth resampling. Short rows are
    filled with paper.
    """
    gap, size = max(4, cell // 24), max(11, cell // 11)
    font = ImageFont.load_default(size)
    side = int(cell * 1.25)
    heads = [wrapped(label, cell, size) for label in column_labels]
    lines = max((label.count("\n") + 1 for label in heads), default=0)
    head = round(lines * size * 1.4) + 2 * gap
    width = side + len(column_labels) * (cell + gap) + gap
    sheet = Image.new("RGB", (width, head + len(rows) * (cell + gap) + gap), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(heads):
        draw.text((side + column * (cell + gap), gap), label, INK, font)
    for line, (images, label) in enumerate(zip(rows, row_labels, strict=True)):
        top = head + line * (cell + gap)
        draw.text((gap, top + gap), wrapped(label, side - gap, size), INK, font)
        for column, image in enumerate(images):
            shown = fitted(image, cell)
            left = side + column * (cell + gap) + (cell - shown.width) // 2
            sheet.paste(shown, (left, top + (cell - shown.height) // 2))
    return sheet


def fitted(image: Image.Image, cell: int) -> Image.Image:
    """Return the image as RGB with a longer side of `cell` pixels."""
    scale = cell / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def wrapped(text: str, width: int, size: int, lines: int = 4) -> str:
    """Return the text in so many lines of about `width` pixels, in letters of `size`; dots where some is left out."""
    letters = max(6, int(width / (size * 0.55)))
    return "\n".join(textwrap.wrap(text, letters, max_lines=lines, placeholder=" ..."))
