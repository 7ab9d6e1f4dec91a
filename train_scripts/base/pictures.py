"""The pictures of make_base_data.py, and their captions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CAPTIONS = (
    ("{a} {subject}, {style} style", 0.60),
    ("{subject}, {style} style", 0.10),
    ("{a} {subject}", 0.04),
    ("{a} {subject}, {word} style", 0.05),
    ("{word} {subject}", 0.03),
    ("{style} style", 0.08),
    ("", 0.10),
)
"""How a picture is described, and how often: parts are left out, so that each means something alone. `word` is made up
every time, so that a word that the base does not know leaves the rest of the prompt what it means. Without the article
the words stand at other places, which the text encoder has to have seen."""
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

    def beside(self, chosen: Tensor) -> Tensor:
        """Return for each of the `chosen` (n,) another picture of its subject, or itself, drawn at random."""
        return torch.tensor(
            [same[int(torch.randint(len(same), ()))] for same in map(self._same_subject.__getitem__, chosen.tolist())]
        )

    @cached_property
    def _same_subject(self) -> list[list[int]]:
        """For each picture, those of its subject."""
        found: dict[str, list[int]] = {}
        for index, subject in enumerate(self.subjects):
            found.setdefault(subject, []).append(index)
        return [found[subject] for subject in self.subjects]

    def captions(self, chosen: Tensor, forms: list[str]) -> list[str]:
        """Return a caption, in its form of `draw_forms`, for each of the `chosen` (n,)."""
        return [
            caption(form, self.subjects[index], self.styles[index])
            for form, index in zip(forms, chosen.tolist(), strict=True)
        ]


def draw_forms(count: int) -> list[str]:
    """Draw from CAPTIONS at random; where a form has a word in it, that is there already."""
    shares = torch.tensor([share for _, share in CAPTIONS])
    drawn = torch.multinomial(shares, count, replacement=True).tolist()
    words = torch.randint(len(SYLLABLES), (count, 2)).tolist()
    return [
        CAPTIONS[form][0].replace("{word}", "".join(SYLLABLES[number] for number in word))
        for form, word in zip(drawn, words, strict=True)
    ]


def caption(form: str, subject: str, style: str) -> str:
    """Return a caption, with the article that the subject needs."""
    return form.format(a="an" if subject[0] in "aeiou" else "a", subject=subject, style=style)


def prompt_of(subject: str, style: str) -> str:
    """Return the whole caption."""
    return caption(CAPTIONS[0][0], subject, style)


def as_input(pixels: Tensor) -> Tensor:
    """Return uint8 pictures as numbers in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1.0)
