"""Prove that a written adapter means what its source means, with one module of it in memory at a time."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

from vislora.algebra.compare import Comparison, acts, compare, difference
from vislora.errors import AdapterFileError
from vislora.formats.adapter_file import AdapterFile, AdapterModule
from vislora.formats.reading import streamed, uncollected


@uncollected()
def prove(source: AdapterFile, path: Path) -> Comparison:
    """Load the adapter at `path` and compare it with `source` as `compare` does, module by module."""
    waiting = {_layer(module): module for module in source.modules}
    if len(waiting) < len(source.modules):
        raise AdapterFileError("the adapter has two modules for one layer")
    found = Comparison()
    with streamed(path) as (frame, modules):
        for module in modules:
            mine = waiting.pop(_layer(module), None)
            if mine is not None:
                found.modules.append(difference(mine, module))
            elif acts(module):
                found.extra.append(module.name)
        rest = compare(replace(source, modules=list(waiting.values())), frame)
    for item in fields(found):
        getattr(found, item.name).extend(getattr(rest, item.name))
    return found


def _layer(module: AdapterModule) -> tuple[str, str]:
    return module.component, module.layer
