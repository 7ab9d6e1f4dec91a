"""A library of adapters: folders, what is in them, and an index that notices what changed. Imports no torch.

The index lies in each folder as `.vislora-library.json`. It is a memory and no more: a missing, damaged or foreign one
is made anew, and a folder that cannot be written to has none.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vislora.config.library import LibraryConfig
from vislora.errors import AdapterFileError, ConfigError, VisloraError, listed, nearest
from vislora.files import content_hash, write_text
from vislora.jobs.folders import named_adapters
from vislora.jobs.inspect import FileSummary, inspect
from vislora.records import Done, Note, Progress, Record

INDEX = ".vislora-library.json"
VERSION = 2
PREVIEWS = (".png", ".preview.png", ".jpg", ".jpeg", ".webp", ".preview.jpg", ".preview.jpeg")
TAGS = 3


@dataclass(frozen=True)
class Entry:
    """One adapter of a library. path: its file or PEFT folder. size: bytes. modified: nanoseconds.

    sha256: of its content. family, format: None when not told. rank: the largest. triggers: words that call it up.
    preview: an image beside it. problem: why it cannot be used, or ''.
    """

    name: str
    path: Path
    size: int
    modified: int
    sha256: str
    format: str | None
    family: str | None
    rank: int | None
    triggers: tuple[str, ...]
    preview: Path | None
    problem: str = ""

    def is_about(self, text: str) -> bool:
        """Say whether name, trigger words or family contain `text`, whatever its case."""
        return any(text.lower() in word.lower() for word in (self.name, self.family or "", *self.triggers))

    def as_json(self) -> dict[str, Any]:
        """Return the entry as JSON values."""
        preview = None if self.preview is None else str(self.preview)
        return {**asdict(self), "path": str(self.path), "preview": preview, "triggers": list(self.triggers)}


class Index:
    """The adapters below some folders, by name. A name is the stem of a file; equal stems need the path."""

    def __init__(self, folders: Iterable[str | Path], refresh: bool = False) -> None:
        """Read what is in `folders`. Raises `ConfigError` when one is no folder."""
        self.folders = tuple(Path(folder) for folder in folders)
        self._entries: dict[Path, Entry] = {}
        for _ in self.read(refresh):
            pass

    @property
    def entries(self) -> list[Entry]:
        """Return all adapters, by name."""
        return sorted(self._entries.values(), key=lambda entry: (entry.name, entry.path))

    def read(self, refresh: bool = False) -> Iterator[Progress | Note]:
        """Look what is there now; read and hash only what is new or changed since, everything with `refresh`."""
        missing = [str(folder) for folder in self.folders if not folder.is_dir()]
        if missing:
            raise ConfigError(f"library: no folder {', '.join(missing)}")
        found: dict[Path, Entry] = {}
        for folder in self.folders:
            found.update((yield from _read_folder(folder, refresh)))
        self._entries = found

    def find(self, name: str) -> Entry:
        """Return the adapter of this name, stem, file name or path. Raises `ConfigError`: none, several, or damaged."""
        fitting = [entry for entry in self.entries if name in (entry.name, entry.path.name, str(entry.path))]
        fitting = [entry for entry in fitting if str(entry.path) == name] or fitting
        if len(fitting) > 1:
            raise ConfigError(listed(f"adapter '{name}' could be any of these; give the path:", _paths(fitting)))
        if not fitting:
            searched = ", ".join(map(str, self.folders))
            raise ConfigError(f"no adapter '{name}' in {searched}{nearest(name, [e.name for e in self.entries])}")
        if fitting[0].problem:
            raise AdapterFileError(f"{fitting[0].path}: {fitting[0].problem}")
        return fitting[0]

    def current(self, entry: Entry) -> Entry:
        """Return `entry` as it is on the disk now: the same one, unless the file has changed."""
        fresh = _entry(entry.path, entry)
        self._entries[entry.path] = fresh
        return fresh


def run(config: LibraryConfig) -> Iterator[Record]:
    """List as `config` says; yields progress while files are read. The exit code is 1 when some are damaged."""
    given = config.model_fields_set & {"folders"}
    folders = [folder for folder in config.folders if given or folder.is_dir()]
    if not folders:
        raise ConfigError(f"library: none of {', '.join(map(str, config.folders))} is a folder; name one")
    index = Index(())
    index.folders = tuple(folders)
    yield from index.read(config.refresh)
    entries = [entry for entry in index.entries if entry.is_about(config.find)]
    text = json.dumps([entry.as_json() for entry in entries], indent=2) if config.json else as_text(entries)
    yield Done(entries, text, 1 if any(entry.problem for entry in entries) else 0)


def as_text(entries: Sequence[Entry]) -> str:
    """Return a table for people."""
    if not entries:
        return "no adapters"
    rows = [("name", "family", "format", "rank", "MB", "trigger words", "preview"), *(_row(entry) for entry in entries)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [f"{entry.path}: {entry.problem}" for entry in entries if entry.problem]
    twice = [name for name, count in Counter(entry.name for entry in entries).items() if count > 1]
    return "\n".join([*lines, *(f"'{name}' is the name of several: use the path" for name in twice)])


def _row(entry: Entry) -> tuple[str, ...]:
    cells = (entry.name, entry.family or "?", entry.format or "-", "-" if entry.rank is None else str(entry.rank))
    shown = ", ".join(entry.triggers)
    return *cells, f"{entry.size / 1e6:.1f}", shown, entry.preview.name if entry.preview else ""


def _read_folder(folder: Path, refresh: bool) -> Generator[Progress | Note, None, dict[Path, Entry]]:
    known = {} if refresh else _remembered(folder)
    paths = named_adapters(folder)
    found: dict[Path, Entry] = {}
    for done, path in enumerate(paths, 1):
        found[path] = _entry(path, known.get(path))
        if found[path] is not known.get(path):
            yield Progress(f"reading {folder}", done, len(paths))
    if list(found.values()) != list(known.values()):
        problem = _remember(folder, found.values())
        if problem:
            yield Note(f"{folder}: the index is not kept ({problem})")
    return found


def _entry(path: Path, known: Entry | None) -> Entry:
    """Return what is known of an adapter if size and time are the same, else read it."""
    try:
        size, modified = _stat(path)
        if known is not None and (known.size, known.modified) == (size, modified):
            preview = _preview(path)
            return known if preview == known.preview else _with_preview(known, preview)
        digest = content_hash(path)
        summary = inspect(path)
    except (VisloraError, OSError) as error:
        first = str(error).splitlines()[0].removeprefix(f"{path}: ")
        return Entry(_name(path), path, 0, 0, "", None, None, None, (), _preview(path), first)
    problem = summary.problems[0] if summary.problems else ("" if summary.format else summary.what)
    ranks = [int(rank) for rank in summary.ranks]
    return Entry(
        _name(path),
        path,
        size,
        modified,
        digest,
        summary.format,
        summary.family,
        max(ranks, default=None),
        _triggers(summary),
        _preview(path),
        problem,
    )


def _with_preview(entry: Entry, preview: Path | None) -> Entry:
    return Entry(**{**vars(entry), "preview": preview})


def _stat(path: Path) -> tuple[int, int]:
    files = [path] if path.is_file() else sorted(item for item in path.rglob("*") if item.is_file())
    stats = [file.stat() for file in files]
    return sum(item.st_size for item in stats), max((item.st_mtime_ns for item in stats), default=0)


def _name(path: Path) -> str:
    return path.name.removesuffix(".safetensors")


def _preview(path: Path) -> Path | None:
    return next((file for end in PREVIEWS if (file := path.with_name(_name(path) + end)).is_file()), None)


def _triggers(summary: FileSummary) -> tuple[str, ...]:
    """Return the trigger phrase that the metadata names, else the most frequent tags of its captions.

    One that is less than half as frequent as the first is what a picture shows, and calls nothing up.
    """
    phrase = summary.metadata.get("modelspec.trigger_phrase", "")
    if phrase:
        return tuple(word.strip() for word in phrase.split(",") if word.strip())
    tags: Counter[str] = Counter()
    try:
        for counts in json.loads(summary.metadata.get("ss_tag_frequency", "{}")).values():
            tags.update({str(tag).strip(): int(count) for tag, count in counts.items()})
    except (ValueError, TypeError, AttributeError):
        return ()
    found = tags.most_common(TAGS)
    return tuple(tag for tag, count in found if 2 * count >= found[0][1])


def _remembered(folder: Path) -> dict[Path, Entry]:
    """Return what the index of a folder says; nothing when it is missing, damaged or of another version."""
    try:
        found = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if found["version"] != VERSION:
            return {}
        return {folder / row["path"]: _loaded(folder, row) for row in found["adapters"]}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _loaded(folder: Path, row: dict[str, Any]) -> Entry:
    preview = None if row["preview"] is None else folder / row["preview"]
    return Entry(**{**row, "path": folder / row["path"], "preview": preview, "triggers": tuple(row["triggers"])})


def _remember(folder: Path, entries: Iterable[Entry]) -> str:
    """Write the index of a folder; return why that was not possible, or ''."""
    rows = []
    for entry in entries:
        preview = None if entry.preview is None else entry.preview.relative_to(folder).as_posix()
        rows.append({**entry.as_json(), "path": entry.path.relative_to(folder).as_posix(), "preview": preview})
    try:
        write_text(folder / INDEX, json.dumps({"version": VERSION, "adapters": rows}, indent=1) + "\n")
    except VisloraError as error:
        return str(error)
    return ""


def _paths(entries: Iterable[Entry]) -> list[str]:
    return [str(entry.path) for entry in entries]
