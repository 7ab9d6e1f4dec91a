"""Figures over steps or time as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

from vislora.reports.sheet import INK, PAPER

COLOURS = ((31, 111, 235), (207, 34, 46), (26, 127, 55))
WIDTH, HEIGHT, EDGE = 720, 360, 56
Point = tuple[float, float]


def draw_curves(lines: Mapping[str, Sequence[Point]], across: str) -> Image.Image | None:
    """Draw each of `lines`, name -> points (x, y) in the order of x, over a common logarithmic scale.

    `across`: what x is. Points whose y is not above 0 and finite are left out. Returns None where no line has two.
    """
    shown = {name: [point for point in points if 0.0 < point[1] < math.inf] for name, points in lines.items()}
    if all(len(points) < 2 for points in shown.values()):
        return None
    xs, ys = zip(*(point for points in shown.values() for point in points), strict=True)
    image = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    low, high = math.log(min(ys)), math.log(max(ys))

    def place(point: Point) -> Point:
        right = (point[0] - min(xs)) / max(max(xs) - min(xs), 1e-9)
        up = (math.log(point[1]) - low) / max(high - low, 1e-9)
        return EDGE + right * (WIDTH - 2 * EDGE), HEIGHT - EDGE - up * (HEIGHT - 2 * EDGE)

    for value in (min(ys), math.exp((low + high) / 2), max(ys)):
        y = place((xs[0], value))[1]
        draw.line((EDGE, y, WIDTH - EDGE, y), (225, 225, 225))
        draw.text((4, y - 8), f"{value:.3g}", INK, font)
    draw.text((EDGE, HEIGHT - EDGE + 8), f"{min(xs):g}", INK, font)
    draw.text((WIDTH - EDGE, HEIGHT - EDGE + 8), f"{max(xs):g} {across}", INK, font, anchor="ra")
    for number, (name, points) in enumerate(shown.items()):
        colour = COLOURS[number % len(COLOURS)]
        draw.line([place(point) for point in points], colour, 2)
        draw.text((EDGE + 200 * number, 12), name, colour, font)
    return image
