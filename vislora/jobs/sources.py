"""The image that a base edits or starts from: read, cut to the size of the picture, told apart by its contents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vislora.data.images import load_image, to_pixels
from vislora.errors import ConfigError
from vislora.files import sha256


@dataclass(frozen=True)
class Source:
    """An image to edit or to start from. `sha256`: of the file's bytes, when it was read."""

    path: str
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Source:
        """Return the source at `path`. Raises `ConfigError` when there is none."""
        if not path.is_file():
            raise ConfigError(f"source: {path} is no file; give an image")
        return cls(str(path), sha256(path))


def read_source(path: str | Path, width: int, height: int) -> Image.Image:
    """Return the image as training cuts it: its middle, upright, `width` x `height` pixels. Raises `DataError`."""
    pixels = to_pixels(load_image(path), (width, height)).permute(1, 2, 0)
    return Image.fromarray(((pixels + 1) * 127.5).round().numpy().astype(np.uint8))
