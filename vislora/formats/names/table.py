"""Tables of layer names: templates with `{}` for numbers, looked up in either direction, never guessed.

A flat name has lost the difference between `.` and `_`, so only a table can give it back. Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Literal

Swap = Literal["never", "always", "two rows per input"]
NUMBER = r"(0|[1-9][0-9]*)"


@dataclass(frozen=True)
class Row:
    """One layer under two names. `path`: reference tree; `stored`: original tree ('' means the same).

    part: (index, count) when the original fuses several layers by rows. swap: is a modulation's output in halves of
    the other order? 'two rows per input' means: when it has two chunks only, as in the last block.
    """

    path: str
    stored: str = ""
    part: tuple[int, int] | None = None
    swap: Swap = "never"


@dataclass(frozen=True)
class Found:
    """Where a stored name leads: a path of the reference tree, maybe a part of the stored layer."""

    path: str
    stored: str
    part: tuple[int, int] | None
    swap: Swap


@dataclass(frozen=True)
class Place:
    """Where a path of the reference tree is stored: a name, maybe as one part of a fused layer."""

    name: str
    part: tuple[int, int] | None = None
    swap: Swap = "never"


class NameTable:
    """The layers of one model, for any number of blocks and any width."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._by_path: dict[str, list[tuple[str, Row]]] = {}
        self._by_flat: dict[str, list[tuple[str, Row]]] = {}
        for row in rows:
            stored = row.stored or row.path
            _enter(self._by_path, row.path, row)
            _enter(self._by_flat, stored.replace(".", "_"), row)
            if stored != row.path:  # some tools flatten the reference tree instead
                _enter(self._by_flat, row.path.replace(".", "_"), Row(row.path))

    def find_flat(self, name: str) -> list[Found]:
        """Return every path that a flat name stands for: one, the parts of a fused layer, or none at all."""
        return [
            Found(row.path.format(*numbers), (row.stored or row.path).format(*numbers), row.part, row.swap)
            for row, numbers in _matches(self._by_flat, name)
        ]

    def place(self, path: str) -> Place | None:
        """Return the (dotted) stored name of a path, or None when this model has no such layer."""
        for row, numbers in _matches(self._by_path, path):
            return Place((row.stored or row.path).format(*numbers), row.part, row.swap)
        return None

    def knows(self, path: str) -> bool:
        """Say whether this model has a layer at `path`."""
        return self.place(path) is not None


@dataclass(frozen=True)
class FamilyNames:
    """How the files of one model family name its components and their layers.

    `flat_prefixes`: kohya's, per component; `folders`: diffusers' component names, also its key prefixes;
    `flattened`: text encoders of the class CLIPTextModel, in whose tree transformers 5 has no `text_model`.
    """

    family: str
    tables: dict[str, NameTable]
    flat_prefixes: dict[str, str]
    folders: dict[str, str]
    flattened: frozenset[str] = frozenset()


def _enter(index: dict[str, list[tuple[str, Row]]], template: str, row: Row) -> None:
    index.setdefault(_outline(template.replace("{}", "0")), []).append((template, row))


@cache
def _pattern(template: str) -> re.Pattern[str]:
    """Compile a template when a name first needs it: all of them together take longer than reading a file's header."""
    return re.compile(re.escape(template).replace(r"\{\}", NUMBER))


def _outline(name: str) -> str:
    return re.sub(r"[0-9]+", "#", name)


def _matches(index: dict[str, list[tuple[str, Row]]], name: str) -> Iterable[tuple[Row, tuple[str, ...]]]:
    for template, row in index.get(_outline(name), ()):
        found = _pattern(template).fullmatch(name)
        if found is not None:
            yield row, found.groups()
