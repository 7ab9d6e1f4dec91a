"""Small real images, and broken ones, for the tests of the data layer."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

from PIL import Image

from vislora.data.scan import Example


def make_image(path: Path, size: tuple[int, int] = (32, 24), colour: tuple[int, ...] = (200, 30, 40), **how) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **how)
    return path


def make_example(name: str, width: int = 64, height: int = 64, caption: str = "a thing") -> Example:
    return Example(Path(name), caption, width, height, sha256=(name * 64)[:64])


def quadrants(width: int = 32, height: int = 24) -> Image.Image:
    """Red, green / blue, white: every orientation looks different."""
    image = Image.new("RGB", (width, height))
    half_width, half_height = width // 2, height // 2
    colours = {(0, 0): "red", (1, 0): "lime", (0, 1): "blue", (1, 1): "white"}
    for (x, y), colour in colours.items():
        image.paste(colour, (x * half_width, y * half_height, (x + 1) * half_width, (y + 1) * half_height))
    return image


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b"")
    )
