"""Settings of the training images and captions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from vislora.config.base import Section

_NAMED = {"white": "#ffffff", "black": "#000000", "gray": "#808080"}


def _colour(value: str) -> str:
    if value.lower() not in _NAMED and not re.fullmatch(r"#[0-9a-fA-F]{6}", value):
        raise ValueError("must be white, black, gray or #rrggbb")
    return value.lower()


class SubsetConfig(Section):
    """One `[[data.subsets]]`: a pattern over images and what they get. The first that matches decides."""

    pattern: str
    """Glob over an image's path within the folder (`anna/*`), or `re:` and a regular expression."""

    repeats: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """How often each of these images is seen in an epoch. Default: `repeats`."""

    trigger: str | None = None
    """A word put before their captions where they do not have it yet; empty: none. Default: `trigger`."""


class DataConfig(Section):
    """The training images: where they lie, where their captions come from, and how they are cut."""

    folder: Path | None = None
    """The folder of training images; subfolders are included. Required but for a slider of `slider.captions`."""

    sources: Path | None = None
    """Folder of source images, each named as its training image is: pairs for a base that edits images."""

    masks: Path | None = None
    """Folder of masks, each named as its image is: white is learned, black is not, gray in part."""

    recursive: bool = True
    """Read subfolders too."""

    captions: Literal["auto", "txt", "metadata", "filename"] = "auto"
    """Where captions come from: text files beside the images, metadata.jsonl or .csv, both of these, or file names."""

    caption_lines: Literal["joined", "each"] = "joined"
    """What the lines of a caption are: one caption together, or each one of its own, another at each visit."""

    trigger: str | None = None
    """A word put before every caption that does not have it yet."""

    allow_missing_captions: bool = False
    """Train images without a caption on the empty caption (or the trigger alone) instead of stopping."""

    skip_bad: bool = False
    """Leave unreadable images out, and name them, instead of stopping."""

    background: Annotated[str, AfterValidator(_colour)] = "white"
    """What transparent pixels are laid over: white, black, gray or #rrggbb."""

    resolution: Annotated[int, Field(ge=16, le=4096, multiple_of=8)] | None = None
    """Side, in pixels, of the square whose area no picture exceeds; without it, the base model's own."""

    more_resolutions: tuple[Annotated[int, Field(ge=16, le=4096, multiple_of=8)], ...] = ()
    """Further resolutions: each image is seen at all that it is large enough for, and at the smallest in any case."""

    max_aspect: Annotated[float, Field(ge=1.0, le=8.0)] = 3.0
    """The longest picture shape: long side over short side; 1 cuts every image to a square."""

    upscale: bool = True
    """Enlarge images that are smaller than their picture size; otherwise they get a smaller one."""

    crop: Literal["center", "top", "random"] = "center"
    """What to keep of an image that does not fit exactly: its middle, its top, or a few places chosen at random."""

    flip: bool = False
    """Show every image mirrored half of the time; not for text, logos or faces."""

    repeats: Annotated[int, Field(ge=1, le=10_000)] = 1
    """How often each image is seen in an epoch."""

    subsets: tuple[SubsetConfig, ...] = ()
    """Images that are seen more or less often than others, or have a trigger of their own."""

    caption_dropout: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """The share of the time, 0 to 1, that an image is seen with the empty caption."""

    tag_orders: Annotated[int, Field(ge=1, le=100)] = 1
    """In how many orders the comma-separated tags of a caption are seen; 1: as they are written."""

    tag_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """The share of a caption's tags that is left out of each of these orders but the one that is written."""

    keep_tags: Annotated[int, Field(ge=0)] = 1
    """How many tags at the start of a caption keep their place and are never left out, as a trigger should."""

    held_out: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """The share of the images that is never trained on: the loss on them tells which step was the best."""

    cache: Path | None = None
    """Folder for latents and text features; without it, one beside the run."""

    @property
    def background_rgb(self) -> tuple[int, int, int]:
        """The background as (red, green, blue), each 0 to 255."""
        digits = _NAMED.get(self.background, self.background)[1:]
        return int(digits[0:2], 16), int(digits[2:4], 16), int(digits[4:6], 16)
