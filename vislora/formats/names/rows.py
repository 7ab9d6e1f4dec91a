"""Short ways to write the rows of a name table down."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vislora.formats.names.table import Row, Share

Pairs = Iterable[tuple[str, str]]


def renamed(pairs: Pairs, path: str = "", stored: str = "") -> Iterator[Row]:
    """Yield a row per pair (reference name, original name), after the prefixes `path` and `stored`."""
    yield from (Row(path + name, stored + original) for name, original in pairs)


def kept(names: Iterable[str], prefix: str = "") -> Iterator[Row]:
    """Yield a row per layer that has one name in both trees."""
    yield from (Row(prefix + name) for name in names)


def fused(stored: str, paths: Iterable[str], sizes: tuple[int, ...] = (1, 1, 1)) -> Iterator[Row]:
    """Yield the rows of the layers that the original fuses as `stored`. sizes: their rows, as proportions."""
    yield from (Row(path, stored, Share(index, sizes)) for index, path in enumerate(paths))
