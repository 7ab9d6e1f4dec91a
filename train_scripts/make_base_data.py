"""Draw the pictures that the embedded base is trained on: named icons, each subject in several styles.

    python train_scripts/make_base_data.py --out base-data.npz

`base.toml` beside this file names the packages, with versions and integrity hashes, and says which subjects are taken.
`npm` brings them, `resvg` draws them on white; the same command gives the same pictures, and prints their hash.
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
from make_samples import member, npm_pack
from numpy.typing import NDArray
from PIL import Image

from vislora.errors import DataError, VisloraError, missing_extra
from vislora.files import replacing

RECIPE = Path(__file__).resolve().parent / "base.toml"


@dataclass(frozen=True)
class Icon:
    """One drawing: `svg` of `subject` in the style with this word."""

    subject: str
    style: str
    svg: str


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
    """Return every drawing of the recipe, in a fixed order."""
    subjects = subjects_of(recipe)
    by_style: dict[str, dict[str, str]] = {}
    for style in recipe["style"]:
        archived = archive(style)
        icons = member(archived, "icons.json")
        chosen = {e: name for e, name in icon_names(archived, subjects).items() if allowed(style, subjects[e])}
        by_style[style["word"]] = {emoji: svg_of(icons, name, recipe["size"]) for emoji, name in chosen.items()}
    enough = [e for e in subjects if sum(e in found for found in by_style.values()) >= needed(recipe, subjects[e])]
    return [
        Icon(subjects[emoji]["name"], word, found[emoji])
        for emoji in sorted(enough, key=lambda emoji: subjects[emoji]["name"])
        for word, found in by_style.items()
        if emoji in found
    ]


def allowed(style: Mapping[str, Any], about: Mapping[str, str]) -> bool:
    """Say whether a style may show subjects of this group."""
    return about["group"] not in style.get("without", ())


def needed(recipe: Mapping[str, Any], about: Mapping[str, str]) -> int:
    """Return in how many styles a subject must be drawn: one less where a style leaves its group out."""
    return recipe["sets"] - sum(not allowed(style, about) for style in recipe["style"])


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
    """Yield the pictures (size, size, 3) of `icons` on white, and say how far it is."""
    try:
        import resvg_py
    except ImportError as error:
        raise missing_extra("resvg-py", "samples", "drawing the pictures") from error
    for number, icon in enumerate(icons, 1):
        png = resvg_py.svg_to_bytes(svg_string=icon.svg, background="#ffffff")
        yield np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))
        if number % 200 == 0 or number == len(icons):
            print(f"drawn {number} of {len(icons)}", flush=True)


def held_out(icons: list[Icon], count: int, styles: list[str]) -> NDArray[np.bool_]:
    """Choose `count` pairs to keep out of training, as many of each style, of subjects that every other style draws."""
    drawings: dict[str, set[str]] = {}
    for icon in icons:
        drawings.setdefault(icon.subject, set()).add(icon.style)
    everywhere = [subject for subject, found in drawings.items() if len(found) == len(styles)]
    chosen = np.random.default_rng(0).permutation(everywhere)[:count]
    pairs = {(str(subject), styles[number % len(styles)]) for number, subject in enumerate(chosen)}
    return np.array([(icon.subject, icon.style) in pairs for icon in icons])


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
    apart = held_out(icons, recipe["held_out"], styles)
    with replacing(chosen.out) as temporary, temporary.open("wb") as file:
        subjects, words = np.array([icon.subject for icon in icons]), np.array([icon.style for icon in icons])
        np.savez_compressed(file, pictures=pictures, subjects=subjects, styles=words, held_out=apart)
    count = len({icon.subject for icon in icons})
    digest = hashlib.sha256(pictures.tobytes() + "\n".join(f"{i.subject}/{i.style}" for i in icons).encode())
    print(f"{len(icons)} pictures of {count} subjects in {len(styles)} styles, {apart.sum()} pairs held out")
    print(
        f"{chosen.out}: {chosen.out.stat().st_size / 1e6:.1f} MB, pictures and names have SHA-256 {digest.hexdigest()}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
