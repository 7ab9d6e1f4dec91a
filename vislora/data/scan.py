"""Read a folder of images and captions; every image is used, or named with the reason why not."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from vislora import files
from vislora.data.captions import Captions, CaptionSource, read_captions, with_trigger
from vislora.data.images import SUFFIXES, BadImage, decode, is_animated
from vislora.data.listing import Listing, list_folder, shortened
from vislora.data.subsets import Subset, require_images, subset_notes, subset_of
from vislora.errors import DataError, listed

# Each thread may hold an image of the largest size allowed, several times over while it is converted.
_THREADS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class Example:
    """An image with its caption. `width`, `height`: upright, in pixels; `sha256`: of the file's bytes.

    `repeats`: how often it is seen in an epoch. `more_captions`: further ones that it is seen with.
    """

    path: Path
    caption: str
    width: int
    height: int
    sha256: str
    repeats: int = 1
    more_captions: tuple[str, ...] = ()

    @property
    def captions(self) -> tuple[str, ...]:
        """All captions, as they are written."""
        return self.caption, *self.more_captions


@dataclass(frozen=True)
class ScanResult:
    """The usable examples in natural order, the images left out with the reason, and lines that should be seen."""

    examples: list[Example]
    skipped: list[tuple[Path, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Checked:
    """What decoding an image showed; `bad` is the reason why it cannot be used."""

    path: Path
    width: int = 0
    height: int = 0
    sha256: str = ""
    animated: bool = False
    bad: str = ""


def scan(
    folder: str | Path,
    *,
    captions: CaptionSource = "auto",
    each_line: bool = False,
    subsets: Sequence[Subset] = (),
    allow_missing_captions: bool = False,
    skip_bad: bool = False,
    recursive: bool = True,
) -> ScanResult:
    """Read every image of `folder` and its captions; each is decoded once, and none is kept in memory.

    `captions`, `each_line`: as in `read_captions`.
    The first of `subsets` that fits decides on repeats and trigger; a trigger is put before every caption that does not
    have it as a word. `allow_missing_captions` gives images without a caption the empty one (or the trigger alone).
    `skip_bad` leaves bad images out instead of failing.

    Raises `DataError` with every bad image, every missing, unreadable or contradictory caption and every caption file
    without an image, all at once; when there is no folder or no image in it; or for subsets without images.
    """
    listing = list_folder(folder, recursive)
    if not listing.images and not listing.unsupported:
        raise DataError(_no_images(listing))
    checked = check_images(listing.images)
    bad = [(item.path, item.bad) for item in checked if item.bad]
    bad += [(path, f"{path.suffix} is not supported; save it as PNG, JPEG or WebP") for path in listing.unsupported]
    found = read_captions(listing, captions, each_line)
    left_out = {path for path, _ in bad} if skip_bad else set()
    missing = {path: why for path, why in found.empty.items() if path not in left_out}
    _raise_problems(listing, found, [] if skip_bad else bad, {} if allow_missing_captions else missing)
    usable = [item for item in checked if not item.bad]
    if not usable:
        raise DataError(listed(f"no usable image in {listing.folder}:", (_line(listing, *item) for item in bad)))
    names = [listing.name(item.path) for item in usable]
    require_images(subsets, names)
    examples = [
        _example(item, found.texts.get(item.path, ("",)), subset_of(name, subsets))
        for item, name in zip(usable, names, strict=True)
    ]
    notes = _notes(listing, found, usable, missing)
    if len(subsets) > 1:
        notes += subset_notes(subsets, names)
    else:
        notes += _kohya_notes(usable)
    return ScanResult(examples, bad, notes)


def _example(item: Checked, texts: tuple[str, ...], subset: Subset) -> Example:
    caption, *more = (with_trigger(text, subset.trigger) for text in texts)
    return Example(item.path, caption, item.width, item.height, item.sha256, subset.repeats, tuple(more))


def captions_of(examples: Iterable[Example]) -> list[str]:
    """Return all captions of `examples`, in their order."""
    return [caption for example in examples for caption in example.captions]


def dataset_hash(examples: Iterable[Example]) -> str:
    """Return a SHA-256 over the images' and captions' contents in their order; paths do not enter."""
    lines = (f"{example.sha256} {' '.join(map(repr, example.captions))}" for example in examples)
    return hashlib.sha256("\n".join(lines).encode("utf-8")).hexdigest()


def check_images(paths: list[Path]) -> list[Checked]:
    """Decode every image once, and say of each how large it is or why it cannot be used."""
    # Pillow warns from 89 million pixels on; the limit here is stricter than its error and told as such.
    with warnings.catch_warnings(), ThreadPoolExecutor(_THREADS) as pool:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return list(pool.map(_check, paths))


def _check(path: Path) -> Checked:
    try:
        width, height = decode(path).size
        return Checked(path, width, height, files.sha256(path), is_animated(path))
    except BadImage as error:
        return Checked(path, bad=str(error))
    except OSError as error:
        return Checked(path, bad=f"cannot be read: {error.strerror or error}")


def _raise_problems(listing: Listing, found: Captions, bad: list[tuple[Path, str]], missing: dict[Path, str]) -> None:
    lines = [_line(listing, path, reason) for path, reason in bad]
    lines += found.problems
    lines += [_line(listing, path, why) for path, why in missing.items()]
    if not lines:
        return
    steps = []
    if bad:
        steps.append("bad images: fix or remove them, or continue without them with --data.skip-bad")
    if found.problems:
        steps.append("caption files: mend, rename or remove those named above")
    if missing:
        steps.append(
            "missing captions: write them as text files beside the images, take them from the file names with "
            "--data.captions filename, or train without with --data.allow-missing-captions"
        )
    title = f"{len(lines)} problem(s) in {listing.folder} ({len(listing.images)} images):"
    raise DataError("\n".join([listed(title, lines, limit=len(lines)), *steps]))


def _line(listing: Listing, path: Path, reason: str) -> str:
    return f"{listing.name(path)}: {reason}"


def _no_images(listing: Listing) -> str:
    text = f"no images in {listing.folder}"
    if listing.unread:
        text += f" itself; its {len(listing.unread)} subfolder(s) were not read (recursive = false)"
    known = ", ".join(sorted(suffix[1:] for suffix in SUFFIXES))
    return f"{text}; put some there ({known}) or give another folder with --data.folder"


def _notes(listing: Listing, found: Captions, usable: list[Checked], missing: dict[Path, str]) -> list[str]:
    notes = list(found.notes)
    if missing:
        notes.append(f"{len(missing)} image(s) without a caption: {shortened(map(listing.name, missing))}")
    animated = [listing.name(item.path) for item in usable if item.animated]
    if animated:
        notes.append(f"only the first frame is used of {shortened(animated)}")
    same: dict[str, list[str]] = defaultdict(list)
    for item in usable:
        same[item.sha256].append(listing.name(item.path))
    notes += [f"identical files, all used: {shortened(names)}" for names in same.values() if len(names) > 1]
    if listing.others:
        names = shortened(map(listing.name, listing.others))
        notes.append(f"{len(listing.others)} file(s) are neither image nor caption: {names}")
    if listing.unread:
        notes.append(f"subfolder(s) not read, as recursive = false: {shortened(map(listing.name, listing.unread))}")
    return notes


def _kohya_notes(usable: list[Checked]) -> Iterator[str]:
    """Yield what those should know who have sd-scripts' folders."""
    folders = sorted({item.path.parent.name for item in usable if re.match(r"\d+_", item.path.parent.name)})
    if folders:
        yield (
            f"the number in {shortened(folders)} is part of the name, not a repeat count: give it in data.subsets, "
            f'such as pattern = "{folders[0]}/*", repeats = {int(folders[0].partition("_")[0])}'
        )
