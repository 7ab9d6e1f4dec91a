"""Make the sample image folders `ink`, `outline` and `blob` from pinned packages of named icons.

Beside each lies `left-out/<name>`: what its artist drew of subjects that are in no folder, to judge adapters by.

    python train_scripts/make_samples.py --out samples            # make them (again)
    python train_scripts/make_samples.py --out samples --check    # do they match? exit 1 if not

`samples.toml` beside this file says what goes where: the package, its exact version and integrity hash, the subjects,
the captions. `npm` brings the packages, `resvg` draws them; the same command gives the same bytes. A folder is written
whole or not at all, and whatever was in it is replaced.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from vislora.errors import DataError, VisloraError, listed, missing_extra, nearest
from vislora.files import replacing

HERE = Path(__file__).resolve().parent
RECIPE = HERE / "samples.toml"
APACHE = HERE.parent / "LICENSE"
SIZE = 128


@dataclass(frozen=True)
class Folder:
    """One `[[folder]]` of samples.toml."""

    name: str
    package: str
    version: str
    integrity: str
    license: str
    copyright: str
    caption: str
    captions: str
    subjects: tuple[str, ...]
    left_out: tuple[str, ...]
    icons: dict[str, str] = field(default_factory=dict)

    @property
    def beside(self) -> Folder:
        """Return the folder of the subjects that are left out of this one."""
        return replace(self, name=f"left-out/{self.name}", subjects=self.left_out)

    def icon(self, subject: str) -> str:
        """Return the name that the package has for `subject`."""
        return self.icons.get(subject, slug(subject))

    def caption_of(self, subject: str) -> str:
        """Return the caption of `subject`, with its article."""
        text = self.caption.format(subject=subject)
        return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


@dataclass(frozen=True)
class Package:
    """What is read from one npm package: its icons and who made them."""

    icons: dict[str, Any]
    info: dict[str, Any]


def read_recipe(path: Path = RECIPE) -> list[Folder]:
    """Return the folders of samples.toml, their subjects sorted; no excluded or repeated subject may be among them."""
    recipe = tomllib.loads(path.read_text(encoding="utf-8"))
    lists = ("subjects", "left_out")
    folders = [Folder(**{**entry, **{key: tuple(sorted(entry[key])) for key in lists}}) for entry in recipe["folder"]]
    problems = [problem for folder in folders for problem in problems_of(folder, recipe["excluded"])]
    if problems:
        raise DataError(listed(f"{path.name} cannot be used:", problems))
    return folders


def problems_of(folder: Folder, excluded: list[str]) -> list[str]:
    """Return what is wrong with `folder`, in words."""
    names = folder.subjects
    found = [f"{folder.name}: '{name}' is kept for the demo" for name in excluded if name in names]
    found += [
        f"{folder.name}: '{name}' is left out, but not in excluded" for name in folder.left_out if name not in excluded
    ]
    found += [f"{folder.name}: '{name}' is listed twice" for name in sorted(set(names)) if names.count(name) > 1]
    known = {*names, *folder.left_out}
    found += [f"{folder.name}: '{name}' in icons is no subject" for name in folder.icons if name not in known]
    if folder.captions not in ("sidecar", "metadata"):
        found.append(f"{folder.name}: captions is '{folder.captions}', not 'sidecar' or 'metadata'")
    return found


def slug(subject: str) -> str:
    """Return `subject` in kebab case: the name of its file, and of its icon in most packages."""
    return re.sub(r"[^a-z0-9]+", "-", subject.lower()).strip("-")


def fetch(folder: Folder) -> Package:
    """Return the package of `folder`, brought by npm into a folder that is gone afterwards, its integrity verified."""
    spec = f"{folder.package}@{folder.version}"
    with tempfile.TemporaryDirectory() as place:
        archive = npm_pack(spec, Path(place)).read_bytes()
    found = "sha512-" + base64.b64encode(hashlib.sha512(archive).digest()).decode()
    if found != folder.integrity:
        raise DataError(f"{spec} is not the pinned one: its integrity is {found}, samples.toml has {folder.integrity}")
    package = Package(icons=member(archive, "icons.json"), info=member(archive, "info.json"))
    if (spdx := package.info["license"]["spdx"]) != folder.license:
        raise DataError(f"{spec} is under {spdx}, samples.toml has {folder.license}: read its licence again")
    return package


def npm_pack(spec: str, place: Path) -> Path:
    """Return the archive that `npm pack` puts into `place`."""
    command = ["npm", "pack", "--loglevel=error", "--ignore-scripts", spec]
    try:
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise VisloraError("npm is not on the PATH; the icon packages come from it (it is part of Node.js)") from error
    archives = list(place.glob("*.tgz"))
    if done.returncode or len(archives) != 1:
        raise VisloraError(listed(f"`{' '.join(command)}` failed:", (done.stderr or done.stdout).splitlines()))
    return archives[0]


def member(archive: bytes, name: str) -> dict[str, Any]:
    """Return the JSON file `name` of an npm archive."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        file = tar.extractfile(f"package/{name}")
        if file is None:
            raise DataError(f"the package holds no file {name}")
        loaded: dict[str, Any] = json.load(file)
        return loaded


def svg_of(icons: dict[str, Any], name: str) -> str:
    """Return icon `name` as an SVG document of SIZE x SIZE, `currentColor` being black."""
    icon = icons["icons"][name]
    defaults = {"left": 0, "top": 0, "width": 16, "height": 16}
    box = " ".join(str(icon.get(key, icons.get(key, default))) for key, default in defaults.items())
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{SIZE}" height="{SIZE}" viewBox="{box}" color="#000000">{icon["body"]}</svg>'
    )


def draw(svg: str) -> bytes:
    """Return `svg` drawn on white, as an RGB PNG."""
    try:
        import resvg_py
    except ImportError as error:
        raise missing_extra("resvg-py", "samples", "drawing the sample images") from error
    drawn = resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff")
    buffer = io.BytesIO()
    Image.open(io.BytesIO(drawn)).convert("RGB").save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def contents(folder: Folder, package: Package) -> dict[str, bytes]:
    """Return every file of `folder`, by name."""
    known = package.icons["icons"]
    if missing := [name for name in map(folder.icon, folder.subjects) if name not in known]:
        lines = [f"{name}{nearest(name, known)}" for name in missing]
        raise DataError(listed(f"{folder.package} has no such icons, which '{folder.name}' wants:", lines))
    files = {f"{slug(name)}.png": draw(svg_of(package.icons, folder.icon(name))) for name in folder.subjects}
    captions = {slug(name): folder.caption_of(name) for name in folder.subjects}
    if folder.captions == "sidecar":
        files |= {f"{stem}.txt": f"{text}\n".encode() for stem, text in captions.items()}
    else:
        lines = [json.dumps({"file_name": f"{stem}.png", "text": text}) for stem, text in captions.items()]
        files["metadata.jsonl"] = ("\n".join(lines) + "\n").encode()
    files["LICENSE"] = notice(folder, package.info).encode()
    return files


def notice(folder: Folder, info: dict[str, Any]) -> str:
    """Return the LICENSE file of `folder`: where the pictures are from, what was changed, and the text that is owed."""
    author, terms = info["author"], info["license"]
    facts = {
        "SPDX-License-Identifier": terms["spdx"],
        "Work": f"{info['name']} ({author['url']})",
        "Author": author["name"],
        "Copyright notice": folder.copyright,
        "Licence": f"{terms['title']} ({terms['url']})",
        "Taken from": f"npm package {folder.package}, version {folder.version}",
        "Changes": f"{len(folder.subjects)} icons were chosen, drawn as {SIZE} x {SIZE} PNG on white and captioned",
    }
    head = "".join(f"{key}: {value}\n" for key, value in facts.items())
    return f"{head}\n{owed(folder)}"


def owed(folder: Folder) -> str:
    """Return the licence text that has to go with copies of the pictures."""
    if folder.license == "Apache-2.0":
        return APACHE.read_text(encoding="utf-8")
    texts = tomllib.loads(RECIPE.read_text(encoding="utf-8"))["text"]
    text: str = texts[folder.license].format(copyright=folder.copyright)
    return text


def fingerprint(name: str, data: bytes) -> str:
    """Return the SHA-256 of a file; of a picture, that of its pixels, since zlibs differ in how they pack them."""
    if not name.endswith(".png"):
        return hashlib.sha256(data).hexdigest()
    try:
        with Image.open(io.BytesIO(data)) as image:
            head = f"{image.mode} {image.size}".encode()
            return hashlib.sha256(head + image.tobytes()).hexdigest()
    except OSError as error:
        return f"unreadable: {error}"


def differences(place: Path, files: dict[str, bytes]) -> list[str]:
    """Return what is missing, different or too much in the folder `place`, compared with `files`."""
    there = {path.name for path in place.iterdir()} if place.is_dir() else set()
    found = [f"{place / name}: missing" for name in files if name not in there]
    found += [f"{place / name}: not made by this script" for name in there - set(files) if not name.startswith(".")]
    for name in there & set(files):
        if fingerprint(name, (place / name).read_bytes()) != fingerprint(name, files[name]):
            found.append(f"{place / name}: differs")
    return sorted(found)


def write(place: Path, files: dict[str, bytes]) -> None:
    """Put `files` where the folder `place` is or will be, all at once."""
    with replacing(place) as temporary:
        temporary.mkdir()
        for name, data in files.items():
            (temporary / name).write_bytes(data)
    print(f"{place}: {len(files)} files, {sum(map(len, files.values())) / 1024:.0f} KiB")


def run(out: Path, check: bool) -> int:
    """Make all folders under `out`, or compare them with what would be made; return the exit status."""
    made: dict[str, dict[str, bytes]] = {}
    for folder in read_recipe():
        package = fetch(folder)
        made |= {part.name: contents(part, package) for part in (folder, folder.beside)}
    if not check:
        for name, files in made.items():
            write(out / name, files)
        return 0
    if found := [line for name, files in made.items() for line in differences(out / name, files)]:
        print(listed(f"{out} is not what {Path(__file__).name} makes:", found), file=sys.stderr)
        return 1
    print(f"{out}: {', '.join(made)} match")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Read the command line, run, and return the exit status: 0 done, 1 a difference found, 2 a failure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("samples"), help="the folder that holds the sample folders")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the folders differ")
    chosen = parser.parse_args(arguments)
    try:
        return run(chosen.out, chosen.check)
    except VisloraError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
