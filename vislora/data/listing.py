"""What lies in a training folder: images, caption files, metadata, and files that are none of these."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vislora.data.images import SUFFIXES
from vislora.errors import DataError

CAPTION_SUFFIXES = (".txt", ".caption")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")

# Pictures to a person, yet not to this package: they are bad images with a reason, never passed over.
_CAMERA = [".raw", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".rw2"]
_EDITORS = [".psd", ".xcf", ".kra", ".svg", ".eps"]
UNSUPPORTED_SUFFIXES = frozenset(
    [".heic", ".heif", ".jxl", ".jp2", ".tga", ".ico", ".exr", ".hdr", *_CAMERA, *_EDITORS]
)
_LITTER = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir"})
_PAPERS = re.compile(r"(readme|licen[sc]e|notice|copying)([ ._-].*)?", re.IGNORECASE)


@dataclass
class Listing:
    """The files of a folder by what they are, in natural order. `unread`: subfolders that were not entered."""

    folder: Path
    images: list[Path] = field(default_factory=list)
    unsupported: list[Path] = field(default_factory=list)
    captions: list[Path] = field(default_factory=list)
    metadata: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    unread: list[Path] = field(default_factory=list)

    def name(self, path: Path) -> str:
        """Return `path` as a person sees it: relative to the folder, with forward slashes."""
        return path.relative_to(self.folder).as_posix()


def list_folder(folder: str | Path, recursive: bool = True) -> Listing:
    """Sort the files of `folder` (and its subfolders) by kind; hidden files and system litter are left out.

    Raises `DataError` when the folder is missing, not a folder or cannot be read.
    """
    folder = Path(folder).expanduser()
    if not folder.exists():
        raise DataError(f"the image folder {folder} does not exist; give an existing one with --data.folder")
    if not folder.is_dir():
        raise DataError(f"{folder} is a file; --data.folder must be a folder of images")
    listing = Listing(folder)
    try:
        for path in _walk(folder, recursive, listing.unread, (folder.resolve(),)):
            _kind(listing, path).append(path)
    except OSError as error:
        raise DataError(f"cannot read the image folder {folder}: {error}") from error
    for paths in (listing.images, listing.unsupported, listing.captions, listing.metadata, listing.others):
        paths.sort(key=lambda path: natural_key(listing.name(path)))
    return listing


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Return a sort key by which `a2` comes before `a10`; equal keys are told apart by the exact name."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def same_name(text: str) -> str:
    """Return `text` with composed accents, as file names differ in this between systems."""
    return unicodedata.normalize("NFC", text)


def is_paper(path: Path) -> bool:
    """Say whether a text file is a README, LICENSE, NOTICE or COPYING rather than a caption."""
    return _PAPERS.fullmatch(path.stem) is not None


def shortened(names: Iterable[str], limit: int = 5) -> str:
    """Return `a, b, c and 7 more`."""
    names = list(names)
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _kind(listing: Listing, path: Path) -> list[Path]:
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return listing.images
    if suffix in UNSUPPORTED_SUFFIXES or suffix == ".avif":
        return listing.unsupported
    if suffix in CAPTION_SUFFIXES:
        return listing.captions
    return listing.metadata if path.name.lower() in METADATA_NAMES else listing.others


def _walk(folder: Path, recursive: bool, unread: list[Path], above: tuple[Path, ...]) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name.lower() in _LITTER:
            continue
        if not path.is_dir():
            yield path
        elif not recursive:
            unread.append(path)
        elif path.resolve() not in above:  # a link to a folder above would never end
            yield from _walk(path, recursive, unread, (*above, path.resolve()))
