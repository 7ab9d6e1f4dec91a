"""Which layers of a denoiser see places of the image, and on which grid: what a region is applied on.

A conv sees its output's grid. Tokens are places when there are as many as a grid of the model has cells: the latents
halved any number of times (UNet), or cut into patches (DiT); in FLUX's joint layers the tokens of the text come first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vislora.errors import AdapterMismatchError

OF_TEXT = re.compile(r"(.*\.)?(attn2\.to_[kv]|add_[qkv]_proj|to_added_\w+|to_add_out|\w*_context|context_\w+)(\..*)?")
TEXT_FIRST = ("Flux", "Chroma", "AuraFlow", "Bria", "CogView4", "LongCat")
"""Transformers (how their names begin) whose joint layers see the tokens of the text, then those of the image."""
HALVINGS = 8


@dataclass(frozen=True)
class Places:
    """What a forward of a denoiser tells of the image. sides: (height, width) of the latents, or of their patches."""

    sides: tuple[int, int]
    patch: int = 1
    text: int = 0
    text_first: bool = False

    @staticmethod
    def of(model: nn.Module, latents: Tensor, kwargs: Mapping[str, Any]) -> Places:
        """Read them from what `model` is called with. Raises `AdapterMismatchError` when that tells no grid."""
        name = type(model).__name__
        text = kwargs.get("encoder_hidden_states")
        tokens = text.shape[1] if isinstance(text, Tensor) and text.dim() == 3 else 0
        ids = kwargs.get("img_ids")
        if latents.dim() == 4:
            patch = getattr(getattr(model, "config", None), "patch_size", None)
            patch = patch if isinstance(patch, int) else 1
            height, width = latents.shape[-2:]
            return Places((height, width), patch, tokens, name.startswith(TEXT_FIRST))
        if latents.dim() == 3 and isinstance(ids, Tensor):
            rows, columns = ids.reshape(-1, ids.shape[-1])[:, -2:].unbind(-1)
            sides = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
            if sides[0] * sides[1] == latents.shape[1]:
                return Places(sides, 1, tokens, name.startswith(TEXT_FIRST))
        raise AdapterMismatchError(
            f"an adapter has a region, and nothing tells the places of the image in what {name} is given "
            f"({list(latents.shape)}): regions are for images of UNets and of FLUX-like or patch transformers; "
            "give a strength without a region"
        )

    def grid(self, path: str, out: Tensor, axis: int) -> tuple[int, int, int] | None:
        """Return (height, width, tokens of the text before) of a layer with the output `out`, None without places."""
        if axis != -1:
            return (out.shape[-2], out.shape[-1], 0) if out.dim() == 4 else None
        if out.dim() != 3 or OF_TEXT.fullmatch(path):
            return None
        for height, width in self._grids():
            if out.shape[1] == height * width:
                return height, width, 0
            if self.text_first and out.shape[1] == self.text + height * width:
                return height, width, self.text
        return None

    def _grids(self) -> list[tuple[int, int]]:
        height, width = self.sides
        if self.patch > 1:
            return [(height // self.patch, width // self.patch)]
        found = [(height, width)]
        for _ in range(HALVINGS):
            height, width = (height + 1) // 2, (width + 1) // 2
            found.append((height, width))
        return found
