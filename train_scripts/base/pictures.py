"""The pictures of make_base_data.py, their captions and tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

CAPTIONS = (("{a} {subject}, {style} style", 0.80), ("{a} {subject}", 0.07), ("{style} style", 0.03), ("", 0.10))
"""How a picture is described, and how often: parts are left out, so that each means something alone."""


@dataclass(frozen=True)
class Pictures:
    """pixels: (n, 3, height, width), uint8. held_out: which of them no model is trained on."""

    pixels: Tensor
    subjects: list[str]
    styles: list[str]
    held_out: Tensor

    @staticmethod
    def read(path: Path) -> Pictures:
        """Read the file of make_base_data.py."""
        with np.load(path, allow_pickle=False) as data:
            pixels = torch.from_numpy(data["pictures"]).permute(0, 3, 1, 2).contiguous()
            names = [[str(name) for name in data[key]] for key in ("subjects", "styles")]
            return Pictures(pixels, names[0], names[1], torch.from_numpy(data["held_out"]))

    def trained(self) -> Pictures:
        """Return those that a model may be trained on."""
        kept = (~self.held_out).nonzero().flatten().tolist()
        subjects, styles = ([names[index] for index in kept] for names in (self.subjects, self.styles))
        return Pictures(self.pixels[kept], subjects, styles, self.held_out[kept])

    def captions(self) -> list[list[str]]:
        """Return every picture's captions, in the order of `CAPTIONS`."""
        pairs = zip(self.subjects, self.styles, strict=True)
        return [[caption(form, subject, style) for form, _ in CAPTIONS] for subject, style in pairs]

    def tokens(self, tokenizer: Any) -> Tensor:
        """Return the token ids of the captions, (n, captions, length)."""
        texts = self.captions()
        flat = [text for row in texts for text in row]
        ids = tokenizer(flat, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return ids.reshape(len(texts), len(CAPTIONS), -1)


def caption(form: str, subject: str, style: str) -> str:
    """Return a caption, with the article that the subject needs."""
    return form.format(a="an" if subject[0] in "aeiou" else "a", subject=subject, style=style)


def prompt_of(subject: str, style: str) -> str:
    """Return the whole caption."""
    return caption(CAPTIONS[0][0], subject, style)


def as_input(pixels: Tensor) -> Tensor:
    """Return uint8 pictures as numbers in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1.0)
