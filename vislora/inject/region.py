"""Where in an image an adapter acts: a box or a mask, at the size of whatever a layer computes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vislora.errors import ConfigError

Box = tuple[float, float, float, float]
SHAPE_TOLERANCE = 0.02
"""How far the shape (width / height) of a mask may be from the image's, relative: latents round sides."""


@dataclass(frozen=True, eq=False)
class Region:
    """A box (left, top, right, bottom) of shares of the sides, or a mask (height, width) of numbers in [0, 1]."""

    box: Box | None = None
    mask: Tensor | None = None
    _sized: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(given: Any) -> Region:
        """Return the region that is meant by four numbers, an array, a tensor or an image. Raises `ConfigError`."""
        if isinstance(given, Sequence) and len(given) == 4 and not any(isinstance(item, Sequence) for item in given):
            return Region(box=_box(given))
        return Region(mask=_mask(given))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Region) or self.box != other.box or (self.mask is None) != (other.mask is None):
            return False
        return self.mask is None or other.mask is None or torch.equal(self.mask, other.mask)

    def __hash__(self) -> int:
        return hash((self.box, None if self.mask is None else tuple(self.mask.shape)))

    def require_shape(self, height: int, width: int) -> None:
        """Raise `ConfigError` when a mask is of another shape than an image whose latents are `height` by `width`."""
        if self.mask is None:
            return
        rows, columns = self.mask.shape
        if abs(math.log(columns * height / (rows * width))) > SHAPE_TOLERANCE:
            raise ConfigError(
                f"a region's mask is {columns} x {rows}, the image has the shape {width} : {height}: "
                "give a mask with the sides of the image"
            )

    def sized(self, height: int, width: int) -> Tensor:
        """Return the shares (height, width), float32, in which every cell of such a grid is inside: exact areas."""
        if (height, width) not in self._sized:
            if self.box is not None:
                left, top, right, bottom = self.box
                made = torch.outer(_overlap(top, bottom, height), _overlap(left, right, width))
            else:
                assert self.mask is not None
                made = F.interpolate(self.mask[None, None], (height, width), mode="area")[0, 0]
            self._sized[height, width] = made
        return self._sized[height, width]

    @property
    def largest(self) -> float:
        """Return the largest share anywhere: what holds for layers that see no places, such as those of the text."""
        return 1.0 if self.mask is None else float(self.mask.max())


def _overlap(start: float, end: float, cells: int) -> Tensor:
    """Return the part of each of `cells` equal cells of [0, 1] that lies between `start` and `end`."""
    edges = torch.arange(cells + 1, dtype=torch.float64) / cells
    return ((edges[1:].clamp(max=end) - edges[:-1].clamp(min=start)).clamp(min=0.0) * cells).float()


def _box(given: Sequence[Any]) -> Box:
    try:
        left, top, right, bottom = (float(side) for side in given)
    except (TypeError, ValueError):
        left = top = right = bottom = math.nan
    if not (0.0 <= left < right <= 1.0 and 0.0 <= top < bottom <= 1.0):
        raise ConfigError(
            f"region is {tuple(given)}: a box is (left, top, right, bottom) with 0 <= left < right <= 1 and "
            "0 <= top < bottom <= 1"
        )
    return left, top, right, bottom


def _mask(given: Any) -> Tensor:
    try:
        array = given.detach().cpu() if isinstance(given, Tensor) else torch.from_numpy(np.array(given))
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(f"region is {given!r}: give a box of four numbers, or a mask image or array") from None
    if array.dtype == torch.uint8:
        array = array / 255.0
    mask = array.float()
    if mask.dim() == 3 and mask.shape[-1] in (1, 3, 4):
        mask = mask[..., :3].mean(-1)  # a picture: its grey
    if mask.dim() != 2 or not mask.numel():
        raise ConfigError(f"region is a mask of shape {list(array.shape)}: give one of height x width")
    if not torch.isfinite(mask).all() or mask.min() < 0.0 or mask.max() > 1.0:
        raise ConfigError("region is a mask with numbers outside 0 to 1 (an image of bytes: 0 to 255)")
    return mask.contiguous()
