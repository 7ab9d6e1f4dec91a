"""Captions from `metadata.jsonl` or `metadata.csv`, as Hugging Face's image folders have them.

Lines: `{"file_name": "a.png", "text": "a red apple"}`, or the columns `file_name,text`; `caption` is read like `text`.
A list of texts in JSON is read like one text of several lines.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEXT_NAMES = ("text", "caption")


class Malformed(ValueError):
    """A line of a metadata file cannot be used; the text says which and why."""


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file without its byte order mark. Raises `Malformed` for other encodings."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Malformed(
            f"not UTF-8 (byte {error.start} is 0x{error.object[error.start]:02x}); save it as UTF-8"
        ) from None
    except OSError as error:
        raise Malformed(f"cannot be read: {error.strerror or error}") from None
    if "\0" in text:
        raise Malformed("contains NUL characters, as UTF-16 text does; save it as UTF-8")
    return text


def read_metadata(path: Path) -> Iterator[tuple[str, str] | Malformed]:
    """Yield (file_name, caption) per line, or what is wrong with the line; every line is looked at."""
    try:
        text = read_text(path)
    except Malformed as error:
        yield error
        return
    lines = _json_lines(text) if path.suffix.lower() == ".jsonl" else _csv_lines(text)
    for number, value in lines:
        try:
            yield _entry(value)
        except Malformed as error:
            yield Malformed(f"line {number}: {error}")


def _json_lines(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            yield number, Malformed(f"not JSON: {error}")


def _csv_lines(text: str) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
    try:
        for row in reader:
            surplus = len(row.pop(None, []))
            if surplus:
                yield reader.line_num, Malformed(f"{surplus} cell(s) too many; put captions with commas in quotes")
            else:
                yield reader.line_num, row
    except csv.Error as error:
        yield reader.line_num, Malformed(f"not CSV: {error}")


def _entry(value: Any) -> tuple[str, str]:
    if isinstance(value, Malformed):
        raise value
    if not isinstance(value, dict):
        raise Malformed("not an object with file_name and text")
    name = value.get("file_name")
    if not isinstance(name, str) or not name.strip():
        raise Malformed(f"no file_name (found: {', '.join(map(str, value)) or 'nothing'})")
    texts = [value[key] for key in TEXT_NAMES if key in value]
    if not texts:
        raise Malformed(f"neither text nor caption (found: {', '.join(map(str, value))})")
    if len(texts) == 2 and texts[0] != texts[1]:
        raise Malformed("both text and caption, and they differ; keep one")
    lines = texts[0] if isinstance(texts[0], list) else ["" if texts[0] is None else texts[0]]
    for line in lines:
        if not isinstance(line, str):
            raise Malformed(f"the caption is {type(line).__name__}, not text")
    return name.strip().replace("\\", "/"), "\n".join(lines)
