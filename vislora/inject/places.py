"""Which layers of a denoiser see places of the image, and on which grid: what a region is applied on.

A conv sees its output's grid. Tokens are places when there are as many as a grid of the model has cells: the latents
halved any number of times (UNet), or cut into patches (DiT). In joint layers the tokens of the text come first (FLUX)
or last (Z-Image); the tokens of the images to edit, and padding, follow those of the image.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vislora.errors import AdapterMismatchError

OF_TEXT = re.compile(
    r"(.*\.)?(attn2\.to_[kv]|add_[qkv]_proj|to_added_\w+|to_add_out|\w*_context|context_\w+|txt_\w+|cap_\w+)(\..*)?"
)
TEXT_FIRST = ("Flux", "Chroma", "AuraFlow", "Bria", "CogView4", "LongCat")
"""Transformers (how their names begin) whose joint layers see the tokens of the text, then those of the image."""
HALVINGS = 8
MULTIPLE = 32
"""Z-Image fills the tokens of an image up to a multiple of this (diffusers, transformer_z_image.py, SEQ_MULTI_OF)."""

Grid = tuple[int, int, int, int]
"""Height, width, tokens of other things before them, and after."""


@dataclass(frozen=True)
class Places:
    """What a forward of a denoiser tells of the image. sides: (height, width) of the latents, or of their patches.

    images: tokens of the image with those that follow it wherever there is one, 0 for as many as the grid has cells.
    joint: where the `text` tokens are in layers that see both.
    """

    sides: tuple[int, int]
    patch: int = 1
    text: int = 0
    joint: Literal["", "text first", "text last"] = ""
    images: int = 0

    @staticmethod
    def of(model: nn.Module, latents: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Places:
        """Read them from what `model` is called with. Raises `AdapterMismatchError` when that tells no grid."""
        name = type(model).__name__
        text = kwargs.get("encoder_hidden_states")
        tokens = text.shape[1] if isinstance(text, Tensor) and text.dim() == 3 else 0
        joint: Literal["", "text first"] = "text first" if name.startswith(TEXT_FIRST) else ""
        patch = getattr(getattr(model, "config", None), "patch_size", None)
        if latents.dim() == 4:
            height, width = latents.shape[-2:]
            return Places((height, width), patch if isinstance(patch, int) else 1, tokens, joint)
        images = kwargs.get("x", args[0] if args else None)
        if isinstance(images, list) and images and isinstance(images[0], Tensor) and images[0].dim() == 4:
            return _listed(images[0], int(kwargs.get("patch_size", 2)))
        sides = _sides(kwargs) if latents.dim() == 3 else None
        if sides and sides[0] * sides[1] <= latents.shape[1]:
            return Places(sides, 1, tokens, joint, latents.shape[1])
        raise AdapterMismatchError(
            f"an adapter has a region, and nothing tells the places of the image in what {name} is given "
            f"({list(latents.shape)}): regions are for images of UNets and of FLUX-like or patch transformers; "
            "give a strength without a region"
        )

    def grid(self, path: str, out: Tensor, axis: int) -> Grid | None:
        """Return the grid of a layer with the output `out`, None when it sees no places."""
        if axis != -1:
            return (out.shape[-2], out.shape[-1], 0, 0) if out.dim() == 4 else None
        if out.dim() != 3 or OF_TEXT.fullmatch(path):
            return None
        count = out.shape[1]
        for height, width in self._grids():
            cells = height * width
            images = self.images or cells
            if count == images or (self.joint == "text last" and count > images):
                return height, width, 0, count - cells
            if self.joint == "text first" and count == self.text + images:
                return height, width, self.text, images - cells
        return None

    def _grids(self) -> Iterator[tuple[int, int]]:
        height, width = self.sides
        yield height // self.patch, width // self.patch
        for _ in range(0 if self.patch > 1 or self.images else HALVINGS):
            height, width = (height + 1) // 2, (width + 1) // 2
            yield height, width


def _listed(image: Tensor, patch: int) -> Places:
    """Return the places of Z-Image's latents (channels, frames, height, width), one of a list of equal ones."""
    sides = image.shape[-2] // patch, image.shape[-1] // patch
    cells = sides[0] * sides[1]
    return Places(sides, joint="text last", images=cells + -cells % MULTIPLE)


def _sides(kwargs: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the (height, width) of the image in tokens: as FLUX's ids say it, or Qwen-Image's shapes."""
    ids, shapes = kwargs.get("img_ids"), kwargs.get("img_shapes")
    if isinstance(ids, Tensor):
        flat = ids.reshape(-1, ids.shape[-1]) if ids.dim() == 2 else ids[0]
        own = flat[torch.cumprod(flat[:, 0] == flat[0, 0], 0).bool()]  # what follows is of images to edit
        rows, columns = own[:, 1], own[:, 2]
        sides = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
        return sides if sides[0] * sides[1] == len(own) else None
    while isinstance(shapes, list) and shapes:
        shapes = shapes[0]
    return (int(shapes[1]), int(shapes[2])) if isinstance(shapes, tuple) and len(shapes) == 3 else None
