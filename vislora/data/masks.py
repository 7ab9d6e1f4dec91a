"""Masks: which part of each image is learned, white all of it and black nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from vislora.data.cache import Cache
from vislora.data.encode import View
from vislora.data.pairs import find_beside
from vislora.data.scan import Example
from vislora.errors import DataError, listed

SHRINK = 4
"""A cell of a stored mask is so many pixels wide: no family's latents are finer."""
BLACK = (0, 0, 0)


def find_masks(
    examples: Sequence[Example],
    folder: str | Path,
    masks: str | Path,
    *,
    recursive: bool = True,
    left_out: Iterable[Path] = (),
) -> list[Example | None]:
    """Return the mask of each example, in the same order; None for one that has none and is learned whole.

    Masks are found as sources are (`pairs.find_beside`). Raises `DataError` with all that is wrong with them, also for
    one that has not the shape of its image.
    """
    found = find_beside(examples, folder, masks, "mask", needed=False, recursive=recursive, left_out=left_out)
    odd = [
        f"{mask.path}: {mask.width} x {mask.height}, its image {example.width} x {example.height}"
        for example, mask in zip(examples, found, strict=True)
        if mask and abs(mask.width * example.height / (mask.height * example.width) - 1.0) > 0.02
    ]
    if odd:
        raise DataError(listed("masks that have not the shape of their images:", odd))
    return found


def mask_views(views: Sequence[Sequence[View]], masks: Sequence[Example | None]) -> list[list[View | None]]:
    """Return the views of the masks, cut as those of the examples are; what is transparent counts as black."""
    return [
        [mask_view(view, mask) if mask else None for view in its_views]
        for its_views, mask in zip(views, masks, strict=True)
    ]


def mask_view(view: View, mask: Example) -> View:
    """Return the view of `mask` that covers the same part as `view` does of its image."""
    return replace(view, example=mask, background=BLACK, fingerprint=f"mask / {SHRINK}")


def shrunk(pixels: Tensor) -> Tensor:
    """Return how much of each cell is learned, (batch, 1, height / 4, width / 4) in 0 to 1.

    pixels: (batch, 3, height, width) in [-1, 1].
    """
    return F.avg_pool2d(pixels.mean(1, keepdim=True) / 2.0 + 0.5, SHRINK).clamp(0.0, 1.0)


def require_some(cache: Cache, views: Iterable[View]) -> None:
    """Raise `DataError` for masks that leave nothing to learn of what is seen of their images."""
    stored = ((view, cache.get(view.key)) for view in views)
    empty = {str(view.example.path) for view, mask in stored if mask and not mask["latents"].any()}
    if empty:
        raise DataError(listed("masks that are black wherever their images are seen:", sorted(empty)))
