"""From an image file to upright, opaque sRGB, and from there to the pixels of a bucket."""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms, UnidentifiedImageError, features
from torch import Tensor

from vislora.data.draws import draw
from vislora.errors import DataError

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]

WHITE: Colour = (255, 255, 255)
MAX_SIDE = 16384
MAX_PIXELS = 100_000_000
MIN_SIDE = 8
RANDOM_CROPS = 4

# Part of every cache key: raise it whenever this file gives other pixels for the same image.
PREPROCESSING = "lanczos-box-1"

_AVIF = "avif" in features.get_supported()
SUFFIXES = frozenset(
    [".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", *([".avif"] if _AVIF else [])]
)
# Only these decoders are tried whatever the suffix says: Pillow's EPS reader, for one, starts a Ghostscript.
_FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", *(["AVIF"] if _AVIF else [])]

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(ValueError):
    """The reason why a file is not a usable image, without the file's name."""


def load_image(path: str | Path, background: Colour = WHITE) -> Image.Image:
    """Decode an image file to RGB: upright, in sRGB, transparency laid over `background`.

    The EXIF orientation is applied. An embedded colour profile is converted to sRGB; one that does not fit its image is
    ignored. 16-bit gray is scaled to 8 bits. Of an animation, the first frame is taken.

    Raises `DataError` naming the file when it is damaged, not an image, too large or too small.
    """
    try:
        return decode(path, background)
    except BadImage as error:
        raise DataError(f"{path}: {error}") from error


def decode(path: str | Path, background: Colour = WHITE) -> Image.Image:
    """Do what `load_image` does, but raise `BadImage` with the bare reason."""
    try:
        with _opened(path) as image:
            image.load()
            return _flattened(_upright(image), background)
    except BadImage:
        raise
    except Exception as error:  # a decoder raises whatever a damaged file leads it to
        raise BadImage(f"cannot be decoded: {error or type(error).__name__}") from error


def is_animated(path: str | Path) -> bool:
    """Say whether a readable image file holds more frames than the one that is used."""
    try:
        with Image.open(path, formats=_FORMATS) as image:
            # The further pictures of an MPO (a phone's .jpg) are previews of the same shot.
            return image.format != "MPO" and bool(getattr(image, "is_animated", False))
    except Exception:  # the first frame was fine; what follows it is of no concern
        return False


def cover_box(image_size: tuple[int, int], size: tuple[int, int], position: tuple[float, float] = (0.5, 0.5)) -> Box:
    """Return (left, top, right, bottom): the largest part of the image with the aspect of `size`, in its own pixels.

    `image_size`, `size`: (width, height). `position`: where the part lies, (0, 0) top left to (1, 1) bottom right.
    """
    width, height = image_size
    scale = max(size[0] / width, size[1] / height)
    part_width, part_height = min(width, size[0] / scale), min(height, size[1] / scale)
    left, top = (width - part_width) * position[0], (height - part_height) * position[1]
    return left, top, min(left + part_width, width), min(top + part_height, height)


def to_pixels(
    image: Image.Image, size: tuple[int, int], position: tuple[float, float] = (0.5, 0.5), flip: bool = False
) -> Tensor:
    """Return the image cropped and resized (Lanczos) to `size` as float32 (3, height, width) in [-1, 1].

    `size`: (width, height). The image covers it and its aspect is kept; what sticks out is cut off on the side that
    `position` leaves over ((0.5, 0.5): equally on both). `flip` mirrors left and right afterwards.
    """
    box = cover_box(image.size, size, position)
    resized = image.convert("RGB").resize(size, Image.Resampling.LANCZOS, box=box)
    if flip:
        resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(resized, dtype=np.float32))
    return (pixels / 127.5 - 1.0).permute(2, 0, 1).contiguous()


def crop_positions(crop: str, sha256: str) -> list[tuple[float, float]]:
    """Return where to crop an image: one place for `center` and `top`, a few for `random`.

    The random places come from the image's own hash, so that they, and the cache, outlive a change of seed.
    """
    if crop == "center":
        return [(0.5, 0.5)]
    if crop == "top":
        return [(0.5, 0.0)]
    if crop == "random":
        return [(draw("x", sha256, i), draw("y", sha256, i)) for i in range(RANDOM_CROPS)]
    raise DataError(f"unknown crop '{crop}'; use center, top or random")


def _opened(path: str | Path) -> Image.Image:
    """Open a file and judge its header; nothing is decoded, so a huge image costs nothing."""
    if not Path(path).is_file():
        raise BadImage("not a file, or a link to nothing")
    if Path(path).stat().st_size == 0:
        raise BadImage("the file is empty (0 bytes)")
    limit = f"the limit is {MAX_SIDE} pixels a side and {MAX_PIXELS // 1_000_000} million in all"
    try:
        image = Image.open(path, formats=_FORMATS)
    except Image.DecompressionBombError:
        raise BadImage(f"too large: more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels; {limit}") from None
    except UnidentifiedImageError:
        raise BadImage("not an image of a known format, whatever its name says") from None
    width, height = image.size
    reason = ""
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        reason = f"too large: {width} x {height} pixels; {limit}"
    elif min(width, height) < MIN_SIDE:
        reason = f"too small: {width} x {height} pixels; each side needs {MIN_SIDE}"
    if reason:
        image.close()
        raise BadImage(reason)
    return image


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation. After `load()`, as Pillow turns TIFF and AVIF itself and then forgets the tag."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF says nothing about the pixels
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _flattened(image: Image.Image, background: Colour) -> Image.Image:
    colour, alpha = _colour_and_alpha(image)
    rgb = _to_srgb(colour, image.info.get("icc_profile"))
    if alpha is None:
        return rgb
    return Image.composite(rgb, Image.new("RGB", rgb.size, background), alpha)


def _colour_and_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Return the colours (L, RGB or CMYK) and the alpha (L) when there is any transparency."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_deep_gray(image)
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode == "LA":
        return image.getchannel("L"), image.getchannel("A")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return rgba.convert("RGB"), rgba.getchannel("A")
    if image.mode == "1":
        return image.convert("L"), None
    return (image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB")), None


def _from_deep_gray(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Scale 16-bit gray (modes I;16, I;16B, I) to 8 bits; Pillow's own `convert` would clip at 255."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise BadImage(f"{image.mode} pixels outside 16-bit gray have no known white; save it with 8 or 16 bits")
    gray = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    clear = image.info.get("transparency")
    if not isinstance(clear, int):
        return gray, None
    return gray, Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if not profile:
        return image.convert("RGB")
    try:
        transform = _srgb_transform(profile, image.mode)
        converted = ImageCms.applyTransform(image, transform) if transform else None
    except (ImageCms.PyCMSError, ImportError, OSError, TypeError, ValueError):
        converted = None  # a broken profile, or one of another colour space
    return image.convert("RGB") if converted is None else converted


@lru_cache(maxsize=16)
def _srgb_transform(profile: bytes, mode: str) -> Any:
    """Return the transform to sRGB, or None where the profile is sRGB already and rounding would only do harm."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if mode == "RGB" and "srgb" in ImageCms.getProfileDescription(source).lower():
        return None
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
