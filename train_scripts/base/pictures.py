"""The pictures of make_base_data.py, and their captions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CAPTIONS = (
    ("{a} {subject}, {style} style", 0.70),
    ("{a} {subject}", 0.04),
    ("{a} {subject}, {word} style", 0.05),
    ("{word} {subject}", 0.03),
    ("{style} style", 0.08),
    ("", 0.10),
)
"""How a picture is described, and how often: parts are left out, so that each means something alone. `word` is made up
every time, so that a word that the base does not know leaves the rest of the prompt what it means."""
SYLLABLES = tuple(first + second for first in "bcdfghjklmnprstvwz" for second in "aeiou")


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

    def texts(self) -> list[str]:
        """Return all that a vocabulary should know."""
        return [prompt_of(subject, style) for subject, style in zip(self.subjects, self.styles, strict=True)]

    def captions(self, chosen: Tensor) -> list[str]:
        """Return a caption, drawn at random, for each of the `chosen` (n,)."""
        shares = torch.tensor([share for _, share in CAPTIONS])
        forms = torch.multinomial(shares, len(chosen), replacement=True).tolist()
        words = torch.randint(len(SYLLABLES), (len(chosen), 2)).tolist()
        return [
            caption(CAPTIONS[form][0], self.subjects[index], self.styles[index], "".join(SYLLABLES[n] for n in word))
            for form, index, word in zip(forms, chosen.tolist(), words, strict=True)
        ]


def caption(form: str, subject: str, style: str, word: str = "") -> str:
    """Return a caption, with the article that the subject needs."""
    return form.format(a="an" if subject[0] in "aeiou" else "a", subject=subject, style=style, word=word)


def prompt_of(subject: str, style: str) -> str:
    """Return the whole caption."""
    return caption(CAPTIONS[0][0], subject, style)


def as_input(pixels: Tensor) -> Tensor:
    """Return uint8 pictures as numbers in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1.0)
