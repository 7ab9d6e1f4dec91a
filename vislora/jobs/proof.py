"""Prove that a written adapter means what its source means, with one module of it in memory at a time."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

from vislora.algebra.compare import Comparison, compare
from vislora.errors import AdapterFileError
from vislora.formats.adapter_file import AdapterFile, AdapterModule
from vislora.formats.reading import stream, uncollected


@uncollected()
def prove(source: AdapterFile, path: Path) -> Comparison:
    """Load the adapter at `path` and compare it with `source` as `compare` does, module by module."""
    waiting = {_layer(module): module for module in source.modules}
    if len(waiting) < len(source.modules):
        raise AdapterFileError("the adapter has two modules for one layer")
    found = Comparison()
    pieces = stream(path)
    frame = next(pieces)
    for piece in pieces:
        mine = [waiting.pop(_layer(module)) for module in piece.modules if _layer(module) in waiting]
        _add(found, compare(replace(source, modules=mine, embeddings={}, extras={}), piece))
    _add(found, compare(replace(source, modules=list(waiting.values())), frame))
    return found


def _layer(module: AdapterModule) -> tuple[str, str]:
    return module.component, module.layer


def _add(whole: Comparison, part: Comparison) -> None:
    for item in fields(whole):
        getattr(whole, item.name).extend(getattr(part, item.name))
