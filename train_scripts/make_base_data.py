"""Draw the pictures that the embedded base is trained on: named icons, each subject in several styles.

    python train_scripts/make_base_data.py --out base-data.npz

`base.toml` beside this file names the packages, with versions and integrity hashes, and says which subjects are taken.
`npm` brings them, `resvg` draws them; some styles are made of the drawings of another (base/treatments.py). Subjects
that look alike are thinned out. The same command gives the same pictures, and prints their hash.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import re
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from base.measures import hog
from base.treatments import SCALE, TREATMENTS
from make_samples import member, npm_pack
from numpy.typing import NDArray
from PIL import Image

from vislora.errors import DataError, VisloraError, missing_extra
from vislora.files import replacing

RECIPE = Path(__file__).resolve().parent / "base.toml"
SAMPLES = RECIPE.with_name("samples.toml")


@dataclass(frozen=True)
class Icon:
    """One drawing: `svg` of `subject`, which its treatment puts into the style with this word."""

    subject: str
    style: str
    svg: str
    treatment: str


def archive(entry: Mapping[str, str]) -> bytes:
    """Return the npm archive that `entry` pins. Raises `DataError` when it is another one."""
    spec = f"{entry['package']}@{entry['version']}"
    with tempfile.TemporaryDirectory() as place:
        found = npm_pack(spec, Path(place)).read_bytes()
    integrity = "sha512-" + base64.b64encode(hashlib.sha512(found).digest()).decode()
    if integrity != entry["integrity"]:
        raise DataError(f"{spec} is not the pinned one: its integrity is {integrity}")
    return found


def subjects_of(recipe: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return emoji -> name and group, for every subject that could be taken."""
    names = member(archive(recipe["names"]), "data-by-emoji.json")
    excluded = re.compile(recipe["excluded"])
    kept = {}
    for emoji, about in names.items():
        name = re.sub(r"[^a-z0-9 -]", "", about["name"].lower()).strip()
        if about["group"] in recipe["groups"] and not excluded.search(about["name"]):
            kept[emoji] = {"name": name, "group": about["group"]}
    return kept


def icon_names(archived: bytes, subjects: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Return emoji -> name of its icon: by code point where the package has a list of them, else by name."""
    icons = member(archived, "icons.json")["icons"]
    try:
        points = member(archived, "chars.json")
    except KeyError:
        points = {}
    found = {}
    for emoji, about in subjects.items():
        code = "-".join(f"{ord(letter):x}" for letter in emoji if letter != "\ufe0f")
        named = re.sub(r"[^a-z0-9]+", "-", about["name"]).strip("-")
        name = points.get(code) or named
        if name in icons:
            found[emoji] = name
    return found


def icons_of(recipe: Mapping[str, Any]) -> list[Icon]:
    """Return every drawing of the recipe whose subject all icon sets draw, in a fixed order."""
    subjects = subjects_of(recipe)
    sources: dict[str, dict[str, str]] = {}
    for style in recipe["style"]:
        if "package" in style:
            archived = archive(style)
            icons = member(archived, "icons.json")
            names = icon_names(archived, subjects)
            side = SCALE * recipe["size"]
            sources[style["word"]] = {emoji: svg_of(icons, name, side) for emoji, name in names.items()}
    everywhere = [emoji for emoji in subjects if all(emoji in found for found in sources.values())]
    return [
        Icon(subjects[emoji]["name"], style["word"], sources[source_of(style)][emoji], treatment_of(style))
        for emoji in sorted(everywhere, key=lambda emoji: subjects[emoji]["name"])
        for style in recipe["style"]
    ]


def source_of(style: Mapping[str, str]) -> str:
    """Return the style whose drawings a style is made of."""
    return style.get("of", style["word"])


def treatment_of(style: Mapping[str, str]) -> str:
    """Return what is done to the drawings: those of an icon set stay as they are."""
    return style["word"] if "of" in style else "plain"


def svg_of(icons: Mapping[str, Any], name: str, size: int) -> str:
    """Return icon `name` as an SVG document of `size` x `size`."""
    icon = icons["icons"][name]
    defaults = {"left": 0, "top": 0, "width": 16, "height": 16}
    box = " ".join(str(icon.get(key, icons.get(key, default))) for key, default in defaults.items())
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{size}" height="{size}" viewBox="{box}" color="#000000">{icon["body"]}</svg>'
    )


def drawn(icons: list[Icon]) -> Iterator[NDArray[np.uint8]]:
    """Yield the pictures (size, size, 3) of `icons`, and say how far it is."""
    try:
        import resvg_py
    except ImportError as error:
        raise missing_extra("resvg-py", "samples", "drawing the pictures") from error
    for number, icon in enumerate(icons, 1):
        drawing = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=icon.svg)))).convert("RGBA")
        yield np.asarray(TREATMENTS[icon.treatment](drawing))
        if number % 200 == 0 or number == len(icons):
            print(f"drawn {number} of {len(icons)}", flush=True)


def thinned(names: list[str], pictures: NDArray[np.uint8], count: int, kept: set[str]) -> list[str]:
    """Return `count` subjects, those `kept` and then, one by one, the one that looks least like any chosen before.

    names: a subject for each row of `pictures` (subjects, styles, size, size, 3).
    """
    features = torch.stack([hog(torch.from_numpy(part).permute(0, 3, 1, 2)) for part in pictures.swapaxes(0, 1)])
    apart = torch.stack([torch.cdist(part, part) for part in features]).mean(0)
    chosen = [number for number, name in enumerate(names) if name in kept]
    while len(chosen) < min(count, len(names)):
        distance = apart[chosen].amin(0)
        distance[chosen] = -1.0
        chosen.append(int(distance.argmax()))
    return [names[number] for number in sorted(chosen)]


def held_out(subjects: list[str], styles: list[str], count: int) -> set[tuple[str, str]]:
    """Choose `count` pairs to keep out of training, each of another subject, as many of each style."""
    chosen = np.random.default_rng(0).permutation(subjects)[:count]
    return {(str(subject), styles[number % len(styles)]) for number, subject in enumerate(chosen)}


def subjects_of_samples() -> set[str]:
    """Return the subjects of the samples: the base has to know them."""
    recipe = tomllib.loads(SAMPLES.read_text(encoding="utf-8"))
    return {*recipe["excluded"], *(subject for folder in recipe["folder"] for subject in folder["subjects"])}


def main() -> int:
    """Make the file; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("base-data.npz"), help="the file to write")
    chosen = parser.parse_args()
    recipe = tomllib.loads(RECIPE.read_text(encoding="utf-8"))
    try:
        icons = icons_of(recipe)
        pictures = np.stack(list(drawn(icons)))
    except VisloraError as error:
        print(error, file=sys.stderr)
        return 2
    styles = [style["word"] for style in recipe["style"]]
    rows = pictures.reshape(-1, len(styles), *pictures.shape[1:])
    names = [icon.subject for icon in icons[:: len(styles)]]
    subjects = thinned(names, rows, recipe["subjects"], subjects_of_samples())
    kept = [number for number, icon in enumerate(icons) if icon.subject in set(subjects)]
    icons, pictures = [icons[number] for number in kept], pictures[kept]
    apart = held_out(subjects, styles, recipe["held_out"])
    with replacing(chosen.out) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file,
            pictures=pictures,
            subjects=np.array([icon.subject for icon in icons]),
            styles=np.array([icon.style for icon in icons]),
            held_out=np.array([(icon.subject, icon.style) in apart for icon in icons]),
        )
    digest = hashlib.sha256(pictures.tobytes() + "\n".join(f"{i.subject}/{i.style}" for i in icons).encode())
    print(f"{len(icons)} pictures of {len(subjects)} subjects in {len(styles)} styles, {len(apart)} pairs held out")
    print(
        f"{chosen.out}: {chosen.out.stat().st_size / 1e6:.1f} MB, pictures and names have SHA-256 {digest.hexdigest()}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
