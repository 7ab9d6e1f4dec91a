"""A report as one self-contained HTML file: pictures are inside it, nothing is fetched, no script runs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader
from PIL import Image

from vislora.files import write_text


@dataclass(frozen=True)
class Part:
    """One part of a page. `table`: rows of cells, the first row the head. `code`: commands. `curve`: see `polyline`."""

    title: str
    text: str = ""
    image: Image.Image | None = None
    table: Sequence[Sequence[str]] = ()
    code: str = ""
    curve: str = ""


def write_page(path: Path, title: str, lead: str, parts: Sequence[Part]) -> None:
    """Write the page whole or not at all. Everything in it is escaped."""
    environment = Environment(loader=PackageLoader("vislora.reports"), autoescape=True, trim_blocks=True)
    environment.filters["data_url"] = data_url
    write_text(path, environment.get_template("page.html").render(title=title, lead=lead, parts=parts))


def data_url(image: Image.Image) -> str:
    """Return the image as a PNG inside a `data:` address."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def polyline(values: Sequence[float], width: int = 800, height: int = 160, window: int = 20) -> str:
    """Return the points of an SVG polyline: the running mean over `window` values, scaled to width x height."""
    means = [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]
    if not means:
        return ""
    low, high = min(means), max(means)
    span, last = (high - low) or 1.0, max(1, len(means) - 1)
    return " ".join(f"{width * i / last:.1f},{height * (high - mean) / span:.1f}" for i, mean in enumerate(means))
