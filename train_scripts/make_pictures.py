"""Make the pictures of the README and of docs/, with the embedded base and the sample adapters.

    python train_scripts/make_pictures.py [--only NAME]

sheet.png: base, two styles, both. composition.png: two styles, and a style on a character, under every composition.
change.png: a style put on pictures. slider.png: prompts at many strengths of the slider in runs/slider, which is
trained first where there is none.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from demo import ROWS, SECOND, STYLE, SUBJECTS
from PIL import Image

import vislora
from vislora.errors import VisloraError
from vislora.files import replacing
from vislora.reports.sheet import contact_sheet

ROOT = Path(__file__).resolve().parent.parent
ADAPTERS = ROOT / "samples" / "adapters"
OUT = ROOT / "docs" / "images"
FACES = ("an angry face", "a smiling face with sunglasses", "a sleepy face", "a drooling face")
WORDS = {"outline": "outline style", "blob": "blobby style", "ink": "ink style"}
BLEND = 0.6


def row(prompts: Sequence[str], strengths: Mapping[str, float], **settings: Any) -> list[Image.Image]:
    """Make one picture per prompt; all rows begin from the same noise."""
    with tempfile.TemporaryDirectory() as folder:
        pictures = vislora.generate(
            prompt=tuple(prompts),
            adapter=tuple(f"{name}:{strength}" for name, strength in strengths.items()),
            adapters=(ADAPTERS,),
            batch_size=len(prompts),
            output=Path(folder),
            **settings,
        )
        return [picture.image for picture in pictures]


def zipped(first: str, folder: Path) -> Path:
    """Merge `first` and ink by ZipLoRA; return the adapter. The prompts are of the pictures that they learned from."""
    own = {
        "outline": [
            "a cat, outline style",
            "a rose, outline style",
            "a frog, outline style",
            "a rocket, outline style",
        ],
        "blob": [f"a {face} face, blobby style" for face in ("nerd", "thinking", "grinning", "sleeping")],
        "ink": [f"{subject}, ink style" for subject in ("a cat", "a tulip", "a panda", "a rocket")],
    }
    path = folder / f"zip-{first}.safetensors"
    wanted = {name: tuple(own[name]) for name in (first, "ink")}
    vislora.merge((first, "ink"), path, adapters=(ADAPTERS,), method="ziplora", prompts=wanted, to="kohya")
    return path


def sheet() -> Image.Image:
    """Return the base, each style, and both at once."""
    rows = []
    for strengths in ROWS.values():
        style = SECOND if list(strengths) == [SECOND] else STYLE
        rows.append(row([f"{subject}, {style} style" for subject in SUBJECTS], strengths))
    return contact_sheet(rows, list(ROWS), SUBJECTS, cell=128)


def composition() -> Image.Image:
    """Return two pairs of adapters, each alone and under every composition."""
    styles = [f"{subject}, outline style, ink style" for subject in SUBJECTS[:4]]
    faces = [f"{face}, blobby style, ink style" for face in FACES]
    pairs = {"content": ("outline", styles), "character": ("blob", faces)}
    rows: dict[str, list[Image.Image]] = {}
    for first, prompts in pairs.values():
        both = {first: 1.0, "ink": 1.0}
        words = {name: WORDS[name] for name in both}
        ways: dict[str, list[Image.Image]] = {
            "first": row(prompts, {first: 1.0}),
            "ink": row(prompts, {"ink": 1.0}),
            "sum": row(prompts, both),
            "sum of 0.6": row(prompts, dict.fromkeys(both, BLEND)),
            "switch": row(prompts, both, compose={"method": "switch"}),
            "composite": row(prompts, both, compose={"method": "composite"}),
            **{
                f"{method}, by prompt": row(
                    prompts, both, compose={"method": method, "by_prompt": True, "words": words}
                )
                for method in ("switch", "composite")
            },
            "klora": row(prompts, both, compose={"method": "klora", "content": first, "style": "ink"}),
        }
        with tempfile.TemporaryDirectory() as folder:
            ways["ziplora"] = row(prompts, {str(zipped(first, Path(folder))): 1.0})
        for label, images in ways.items():
            rows.setdefault(label, []).extend(images)
    labels = ["outline | blob" if label == "first" else label for label in rows]
    columns = [*SUBJECTS[:4], *(face.replace("a smiling face with ", "") for face in FACES)]
    return contact_sheet(list(rows.values()), labels, columns, cell=128)


def change() -> Image.Image:
    """Return pictures in one style, and ink put on them with more and more change."""
    subjects = SUBJECTS[:6]
    with tempfile.TemporaryDirectory() as folder:
        prompts = tuple(f"{subject}, flat style" for subject in subjects)
        sources = vislora.generate(prompt=prompts, seed=5, output=Path(folder))
        rows = {"picture": [source.image for source in sources]}
        for much in (0.2, 0.4, 0.6, 0.8):
            rows[f"change {much}"] = [
                row([f"{subject}, ink style"], {"ink": 1.0}, source=source.path, change=much)[0]
                for subject, source in zip(subjects, sources, strict=True)
            ]
    return contact_sheet(list(rows.values()), list(rows), subjects, cell=96)


def slider() -> Image.Image:
    """Return prompts at strengths of the sample slider, one prompt a row."""
    path = ROOT / "runs" / "slider" / "slider.safetensors"
    if not path.exists():
        command = [sys.executable, "-m", "vislora", "train", "--config", "samples/slider.toml"]
        subprocess.run(command, cwd=ROOT, check=True)
    prompts = ("a fox, flat style", "a crown, 3d style", "a guitar, noto style", "an owl, flat style")
    strengths = (-4, -2, -1, 0, 0.5, 1, 2)
    columns = [row(prompts, {str(path): strength}) for strength in strengths]
    rows = [list(images) for images in zip(*columns, strict=True)]
    return contact_sheet(rows, prompts, [f"{strength:g}" for strength in strengths], cell=96)


PICTURES: dict[str, Callable[[], Image.Image]] = {
    "sheet": sheet,
    "composition": composition,
    "change": change,
    "slider": slider,
}


def main() -> int:
    """Make the pictures that are asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=tuple(PICTURES), help="make this one alone")
    only = parser.parse_args().only
    for name, make in PICTURES.items():
        if only in (None, name):
            picture = make().quantize(256)
            with replacing(OUT / f"{name}.png") as temporary:
                picture.save(temporary, format="PNG", optimize=True)
            print(OUT / f"{name}.png", flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except VisloraError as error:
        sys.exit(f"error: {error}")
