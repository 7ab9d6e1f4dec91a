"""How well an adapter on the embedded base does what its folder shows, and how well it leaves the rest alone.

Style gain: how much of the way from the base's look to the artist's the adapter goes, 1 - (d_adapter - d_real) /
(d_base - d_real), where d is the distance of mean statistics of colour and edges to those of the folder, and `real` is
what the artist drew of the same subjects, which no folder holds. All real drawings went through the VAE, so that its
own look tells nothing. Content: of all drawings of all subjects, the one with the nearest HOG features is of the right
subject. Leak: the style gain of prompts that ask for the base's own styles.

Run: python benchmarks/adapter_scores.py --data base-data.npz --adapter FILE --folder samples/ink [--seeds 2] [--leak]
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from base_scores import ROOT, draw, load, through_vae
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(ROOT / "train_scripts"))

from base.measures import hog, look
from base.pictures import Pictures, prompt_of

import vislora
from vislora.data.scan import Example, scan

WHITE, BATCH = 0.96, 10


@dataclass(frozen=True)
class Drawings:
    """What somebody drew: uint8 pixels (n, 3, side, side), and the captions."""

    pixels: Tensor
    captions: list[str]

    @staticmethod
    def read(folder: Path, side: int) -> Drawings:
        """Read a folder of captioned pictures."""
        examples = scan(folder).examples
        return Drawings(torch.stack([_pixels(example, side) for example in examples]), [e.caption for e in examples])


def _pixels(example: Example, side: int) -> Tensor:
    with Image.open(example.path) as image:
        small = image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
    return torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).reshape(side, side, 3).permute(2, 0, 1)


def looks(pixels: Tensor) -> Tensor:
    """Return the statistics of the look (n, 26)."""
    x = pixels.float() / 255.0
    return look(x, (x.amin(1) < WHITE).float())


def style_gain(goal: Tensor, real: Tensor, base: Tensor, adapted: Tensor) -> float:
    """Return the style gain. All are statistics (n, 26): of the folder, of the artist's other drawings, of pictures."""
    spread = torch.cat([goal, base]).std(0).clamp(min=1e-3)

    def distance(found: Tensor) -> float:
        return float(((found.mean(0) - goal.mean(0)) / spread).norm())

    nearest = distance(real)
    return 1.0 - (distance(adapted) - nearest) / (distance(base) - nearest)


def subject_of(caption: str, form: str) -> str:
    """Return the subject in a caption such as `a fox, ink style`; `form` is `{subject}, ink style`."""
    before, after = form.split("{subject}")
    return caption.split(" ", 1)[1].removeprefix(before).removesuffix(after)


def content(pictures: Pictures, others: list[tuple[Tensor, list[str]]], drawn: Tensor, subjects: list[str]) -> float:
    """Return how often the nearest of all drawings is of the right subject. `others`: more drawings to choose from."""
    pixels = torch.cat([pictures.pixels, *(part for part, _ in others)])
    names = [*pictures.subjects, *(name for _, part in others for name in part)]
    nearest = (hog(drawn) @ hog(pixels).T).argmax(1).tolist()
    return sum(names[index] == subject for index, subject in zip(nearest, subjects, strict=True)) / len(subjects)


def leaks(pipe: Any, name: str, subjects: list[str], styles: list[str], goal: Tensor, real: Tensor) -> dict[str, float]:
    """Return the style gain where the prompt asks for one of the base's own `styles`."""
    found = {}
    for style in styles:
        prompts = [prompt_of(subject, style) for subject in subjects]
        base, adapted = both(pipe, name, prompts)
        found[style] = round(style_gain(goal, real, looks(base), looks(adapted)), 3)
    return found


def both(pipe: Any, name: str, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Draw the prompts with the base and with the adapter, from the same noise."""
    made = []
    for strength in (0.0, 1.0):
        vislora.set_strengths(pipe, {name: strength})
        made.append(draw(pipe, prompts, BATCH)[0])
    return made[0], made[1]


def main() -> None:
    """Draw, score and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("base-data.npz"))
    parser.add_argument("--base", type=Path, default=ROOT / "vislora" / "assets" / "base")
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=ROOT / "samples" / "ink")
    parser.add_argument("--form", default="{subject}, ink style")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--leak", action="store_true")
    given = parser.parse_args()
    pictures, pipe = Pictures.read(given.data), load(given.base)
    side = pictures.pixels.shape[-1]
    shown = Drawings.read(given.folder, side)
    kept = Drawings.read(given.folder.parent / "left-out" / given.folder.name, side)
    goal, real = (looks(through_vae(pipe, part.pixels)) for part in (shown, kept))
    vislora.load(pipe, given.adapter, name="adapter")
    subjects = [subject_of(caption, given.form) for caption in kept.captions]
    base, adapted = both(pipe, "adapter", kept.captions * given.seeds)
    drawings = [(part.pixels, [subject_of(text, given.form) for text in part.captions]) for part in (shown, kept)]
    found: dict[str, Any] = {
        "style gain": round(style_gain(goal, real, looks(base), looks(adapted)), 3),
        "content": round(content(pictures, drawings, adapted, subjects * given.seeds), 3),
        "content of the base": round(content(pictures, drawings, base, subjects * given.seeds), 3),
        "content of real drawings": round(content(pictures, drawings[:1], kept.pixels, subjects), 3),
    }
    if given.leak:
        found["leak"] = leaks(pipe, "adapter", subjects, sorted(set(pictures.styles)), goal, real)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
