"""Where each image's caption comes from: a text file beside it, a metadata file, or its own name."""

from __future__ import annotations

import posixpath
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vislora.data.draws import draw
from vislora.data.listing import Listing, is_paper, same_name, shortened
from vislora.data.metadata import Malformed, read_metadata, read_text
from vislora.errors import DataError, nearest

CaptionSource = Literal["auto", "txt", "metadata", "filename"]
SOURCES = ("auto", "txt", "metadata", "filename")


@dataclass
class Captions:
    """What was found. `texts`: image -> its captions, none empty. `empty`: image -> why its caption has no words.

    `problems`: lines that must be mended; `notes`: lines that should be seen.
    """

    texts: dict[Path, tuple[str, ...]] = field(default_factory=dict)
    empty: dict[Path, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class _Found:
    """Every text that some file gives for an image, as its captions, with that file's name."""

    result: Captions
    each_line: bool
    texts: dict[Path, list[tuple[str, tuple[str, ...]]]] = field(default_factory=lambda: defaultdict(list))
    joined: list[str] = field(default_factory=list)
    unreadable: set[Path] = field(default_factory=set)

    def add(self, image: Path, origin: str, text: str) -> None:
        lines = [words for line in text.splitlines() if (words := " ".join(line.split()))]
        if len(lines) > 1 and not self.each_line:
            self.joined.append(origin)
            lines = [" ".join(lines)]
        self.texts[image].append((origin, tuple(dict.fromkeys(lines))))


def read_captions(listing: Listing, source: str = "auto", each_line: bool = False) -> Captions:
    """Find the captions of every image of `listing`; nothing is raised for a bad file, all are in `problems`.

    `source`: `auto` (metadata and text files), `txt`, `metadata` or `filename`. `each_line`: every line is a caption of
    its own; else they are joined by spaces. A text file belongs to `a.png` when it is `a.txt`, `a.caption` or
    `a.png.txt`.
    Raises `DataError` for an unknown `source`.
    """
    if source not in SOURCES:
        raise DataError(f"unknown caption source '{source}'; use {', '.join(SOURCES)}")
    found = _Found(Captions(), each_line)
    if source == "filename":
        for image in listing.images:
            found.add(image, "its name", caption_from_name(image))
    if source in ("auto", "metadata"):
        _from_metadata(listing, found, source)
    if source in ("auto", "txt"):
        _from_sidecars(listing, found)
    _note_unread(listing, found, source)
    return _settled(listing, found)


def caption_from_name(path: Path) -> str:
    """Return the words of a file name: `red-apple_02.png` gives `red apple`, `0001.png` gives nothing."""
    words = " ".join(re.sub(r"[-_]+", " ", path.stem).split())
    return re.sub(r"(^|\s+)(\d+|\(\d+\))$", "", words)


def with_trigger(caption: str, trigger: str | None) -> str:
    """Return `trigger, caption`, or the caption as it is where it has the trigger as a word (upper or lower case)."""
    if not trigger:
        return caption
    if re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE):
        return caption
    return f"{trigger}, {caption}" if caption else trigger


def without_trigger(caption: str, replace: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the captions that `caption` becomes with each part of it in `replace` replaced by each of its texts.

    One without such a part becomes the empty caption: what it says is what is being learnt.
    """
    found = [caption.replace(part, text) for part, texts in replace.items() if part in caption for text in texts]
    return [" ".join(text.split()) for text in found] or [""]


def at_end(caption: str, end: str) -> str:
    """Return what `caption` is at an end of a slider: `end` with the caption in the place of `{caption}`."""
    return " ".join(end.replace("{caption}", caption).split()).strip(", ")


def tag_orders(caption: str, count: int, keep: int, seed: int, dropout: float = 0.0) -> list[str]:
    """Return up to `count` different captions: this one, and it with its comma-separated tags in other orders.

    The first `keep` tags stay where they are; of the others a share, `dropout`, is left out of all but the first.
    Which orders and tags depends on the seed and the caption alone.
    """
    tags = [tag for part in caption.split(",") if (tag := part.strip())]
    front, rest = tags[:keep], tags[keep:]
    orders = {caption: None}
    for number in range(1, count):
        shuffled = sorted(range(len(rest)), key=lambda place: draw(seed, number, "tag", caption, place))
        kept = [place for place in shuffled if draw(seed, number, "no tag", caption, place) >= dropout]
        orders[", ".join([*front, *(rest[place] for place in kept)])] = None
    return list(orders) if len(rest) > (dropout == 0.0) else [caption]


def _from_metadata(listing: Listing, found: _Found, source: str) -> None:
    if not listing.metadata and source == "metadata":
        found.result.problems.append("no metadata.jsonl or metadata.csv in the folder (captions = 'metadata')")
    images = {same_name(listing.name(image)): image for image in listing.images}
    broken = {same_name(listing.name(image)) for image in listing.unsupported}
    for file in listing.metadata:
        within = posixpath.dirname(listing.name(file))
        for number, entry in enumerate(read_metadata(file), start=1):
            if isinstance(entry, Malformed):
                found.result.problems.append(f"{listing.name(file)}: {entry}")
                continue
            name, text = entry
            wanted = same_name(posixpath.normpath(posixpath.join(within, name)))
            if wanted in images:
                found.add(images[wanted], f"{listing.name(file)} (entry {number})", text)
            elif wanted not in broken:
                hint = nearest(wanted, images)
                found.result.problems.append(f"{listing.name(file)}: there is no image '{name}'{hint}")


def _from_sidecars(listing: Listing, found: _Found) -> None:
    by_name: dict[tuple[Path, str], list[Path]] = defaultdict(list)
    for image in [*listing.images, *listing.unsupported]:
        by_name[image.parent, same_name(image.stem)].append(image)
        by_name[image.parent, same_name(image.name)].append(image)
    for file in listing.captions:
        images = by_name.get((file.parent, same_name(file.stem)), [])
        if images:
            _read_sidecar(listing, found, file, images)
        elif not is_paper(file):
            stems = {image.stem for image in listing.images if image.parent == file.parent}
            found.result.problems.append(f"{listing.name(file)}: caption of no image{nearest(file.stem, stems)}")


def _read_sidecar(listing: Listing, found: _Found, file: Path, images: list[Path]) -> None:
    try:
        text = read_text(file)
    except Malformed as error:
        found.result.problems.append(f"{listing.name(file)}: {error}")
        found.unreadable.update(images)  # named already, so not to be called uncaptioned as well
        return
    for image in images:
        found.add(image, listing.name(file), text)
    if len(images) > 1:
        names = shortened(listing.name(image) for image in images)
        found.result.notes.append(f"{listing.name(file)} is the caption of {len(images)} images: {names}")


def _note_unread(listing: Listing, found: _Found, source: str) -> None:
    unread = listing.metadata if source in ("txt", "filename") else []
    if source in ("metadata", "filename"):
        unread = unread + [file for file in listing.captions if not is_paper(file)]
    if unread:
        names = shortened(listing.name(file) for file in unread)
        found.result.notes.append(f"{len(unread)} caption file(s) not read, as captions = '{source}': {names}")
    if found.joined:
        names = shortened(dict.fromkeys(found.joined))
        found.result.notes.append(
            f"captions of several lines were joined to one: {names}; data.caption_lines = 'each' has each line for one"
        )


def _settled(listing: Listing, found: _Found) -> Captions:
    """Choose the one text of each image; different texts for the same image are a problem."""
    result = found.result
    for image in listing.images:
        origins = found.texts.get(image, [])
        texts = {lines: origin for origin, lines in reversed(origins) if lines}
        if len(texts) > 1:
            files = " and ".join(sorted(texts.values()))
            result.problems.append(f"{listing.name(image)}: different captions in {files}; keep one")
        if texts:
            result.texts[image] = next(iter(texts))
        elif image not in found.unreadable:
            result.empty[image] = f"{origins[0][0]} has no words for a caption" if origins else "no caption"
    return result
