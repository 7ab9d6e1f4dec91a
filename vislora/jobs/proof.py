"""Prove that a written adapter means what its source means, with one module of it in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

from vislora.algebra.compare import Comparison, acts, compare, difference
from vislora.errors import AdapterFileError, ConfigError, listed
from vislora.files import replacing, syncing
from vislora.formats.adapter_file import AdapterFile, AdapterModule
from vislora.formats.contract import Packed
from vislora.formats.reading import streamed, uncollected
from vislora.formats.writing import pack, writable, write

Pack = Callable[[AdapterFile, Path, str], list[Packed]]


class Unproven(AdapterFileError):
    """What was written does not mean what it should; nothing is left of it."""

    def __init__(self, comparison: Comparison, problems: list[str]) -> None:
        self.comparison = comparison
        super().__init__(listed("not written, because read back it is not equal:", problems))


def check_destination(destination: Path, to: str, overwrite: bool) -> None:
    """Raise a `VisloraError` when an adapter of the format `to` cannot be written there."""
    if destination.exists() and not overwrite:
        raise ConfigError(f"destination: {destination} exists; choose another, or set overwrite")
    form, is_file = writable(to), destination.suffix == ".safetensors"
    if form.container == "file" and not is_file:
        raise AdapterFileError(f"{destination}: a {form.name} adapter is a file named *.safetensors")
    if form.container == "folder" and is_file:
        raise AdapterFileError(f"{destination}: a {form.name} adapter is a folder, not a .safetensors file")


def save_proven(adapter: AdapterFile, destination: Path, to: str, tolerance: float, packed: Pack = pack) -> Comparison:
    """Write an adapter aside, load it back, compare every delta, and only then put it in its place.

    Raises `Unproven` when a module differs by more than `tolerance`, relatively, and whatever `packed` raises.
    """
    with replacing(destination) as temporary:
        write(packed(adapter, destination, to), temporary)
        with syncing(temporary):
            comparison = prove(adapter, temporary)
        problems = comparison.problems(tolerance)
        if problems:
            raise Unproven(comparison, problems)
    return comparison


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
