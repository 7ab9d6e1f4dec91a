"""How well an adapter on the embedded base does what its folder shows, and how well it leaves the rest alone.

Style gain: how much of the way from the base's look to the artist's the adapter goes, 1 - (d_adapter - d_real) /
(d_base - d_real), where d is the distance of mean statistics of colour and edges to those of the folder, and `real` is
what the artist drew of the same subjects, which no folder holds. All real drawings went through the VAE, so that its
own look tells nothing. Content: of all drawings of all subjects, the one with the nearest HOG features is of the right
subject; and the same among the base's own drawings when the mean of each look is taken from it, by which a character's
faces can be told apart. Leak: the style gain of prompts that ask for the base's own styles.

Run: python benchmarks/adapter_scores.py --data base-data.npz --adapter FILE --folder samples/ink [--seeds 2] [--leak]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from base_scores import ROOT, draw, load
from torch import Tensor

sys.path.insert(0, str(ROOT / "train_scripts"))

from base.measures import Drawings, content, content_apart, looks, style_gain, subject_of, through_vae
from base.pictures import Pictures, prompt_of

import vislora
from vislora.models import EMBEDDED
from vislora.models.base import Family, place_of

BATCH = 10


def leaks(
    family: Family, name: str, subjects: list[str], styles: list[str], goal: Tensor, real: Tensor
) -> dict[str, float]:
    """Return the style gain where the prompt asks for one of the base's own `styles`."""
    found = {}
    for style in styles:
        prompts = [prompt_of(subject, style) for subject in subjects]
        base, adapted = both(family, name, prompts)
        found[style] = round(style_gain(goal, real, looks(base), looks(adapted)), 3)
    return found


def styles_of(pictures: Pictures) -> list[tuple[Tensor, list[str]]]:
    """Return the drawings of each style with their subjects."""
    found = []
    for style in sorted(set(pictures.styles)):
        some = [index for index, name in enumerate(pictures.styles) if name == style]
        found.append((pictures.pixels[some], [pictures.subjects[index] for index in some]))
    return found


def both(family: Family, name: str, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Draw the prompts with the base and with the adapter, from the same noise."""
    made = []
    for strength in (0.0, 1.0):
        vislora.set_strengths(family.pipeline, {name: strength})
        made.append(draw(family, prompts, BATCH)[0])
    return made[0], made[1]


def main() -> None:
    """Draw, score and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("base-data.npz"))
    parser.add_argument("--base", type=place_of, default=EMBEDDED)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=ROOT / "samples" / "ink")
    parser.add_argument("--form", default="{subject}, ink style")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--leak", action="store_true")
    given = parser.parse_args()
    pictures, family = Pictures.read(given.data), load(given.base)
    side = pictures.pixels.shape[-1]
    shown = Drawings.read(given.folder, side)
    kept = Drawings.read(given.folder.parent / "left-out" / given.folder.name, side)
    goal, real = (looks(through_vae(family.pipeline.vae, part.pixels)) for part in (shown, kept))
    vislora.load(family.pipeline, given.adapter, name="adapter")
    subjects = [subject_of(caption, given.form) for caption in kept.captions]
    base, adapted = both(family, "adapter", kept.captions * given.seeds)
    drawings = [(pictures.pixels, pictures.subjects)]
    drawings += [(part.pixels, [subject_of(text, given.form) for text in part.captions]) for part in (shown, kept)]
    own = styles_of(pictures)
    found: dict[str, Any] = {
        "style gain": round(style_gain(goal, real, looks(base), looks(adapted)), 3),
        "content": round(content(drawings, adapted, subjects * given.seeds), 3),
        "content of the base": round(content(drawings, base, subjects * given.seeds), 3),
        "content of real drawings": round(content(drawings[:2], kept.pixels, subjects), 3),
        "content, looks apart": round(content_apart(own, adapted, subjects * given.seeds), 3),
        "content of real drawings, looks apart": round(content_apart(own, kept.pixels, subjects), 3),
    }
    if given.leak:
        found["leak"] = leaks(family, "adapter", subjects, sorted(set(pictures.styles)), goal, real)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
