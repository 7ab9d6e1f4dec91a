"""Folders of adapters: what is in them, and where each goes. Nothing is written, nothing but names is looked at."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from vislora.errors import ConfigError
from vislora.formats.container import CONFIG, is_one_adapter

SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")


def adapters_below(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return all adapter files and PEFT folders below `folder`, in order, and all other files.

    Hidden files and folders are passed over; links to folders are not followed.
    """
    adapters: list[Path] = []
    others: list[Path] = []
    for name, folders, files in os.walk(folder):
        place = Path(name)
        folders[:] = sorted(item for item in folders if not item.startswith("."))
        whole = place != folder and is_one_adapter(place)
        if whole:
            adapters.append(place)
            folders[:] = [item for item in folders if not (place / item / CONFIG).is_file()]
        for file in sorted(item for item in files if not item.startswith(".")):
            known = not whole and Path(file).suffix.lower() in SUFFIXES
            (adapters if known else others).append(place / file)
    return adapters, [item for item in others if item.parent not in adapters]


def named_adapters(folder: Path) -> list[Path]:
    """Return the adapters below `folder` that can be called by name; checkpoints of training runs are not adapters."""
    found, _ = adapters_below(folder)
    safe = [path for path in found if path.is_dir() or path.suffix == ".safetensors"]
    return [path for path in safe if "checkpoints" not in path.parts]


def destinations(adapters: Iterable[Path], source: Path, destination: Path, container: str) -> dict[Path, Path]:
    """Return where each adapter of the folder `source` goes: its own name below `destination`."""
    return {item: destination / _renamed(item, item.relative_to(source), container) for item in adapters}


def check_places(places: Mapping[Path, Path], source: Path, destination: Path, overwrite: bool) -> None:
    """Raise `ConfigError` with all that is wrong with these destinations, before anything is written."""
    if not places:
        raise ConfigError(f"source: {source} holds no adapter: no file named *.safetensors, no PEFT folder")
    inner, outer = destination.resolve(), source.resolve()
    if inner == outer or inner in outer.parents or outer in inner.parents:
        raise ConfigError(f"destination: {destination} is, holds or is in the source; name a folder beside it")
    if destination.exists() and not destination.is_dir():
        raise ConfigError(f"destination: {destination} is a file; {source} is a folder of adapters and needs a folder")
    problems = list(_clashes(places))
    if not overwrite:
        problems += [f"{target} exists; choose another place, or set overwrite" for target in _existing(places)]
    if problems:
        raise ConfigError(problems, where=f"destination: {len(problems)} problem(s), nothing was written")


def _renamed(path: Path, name: Path, container: str) -> Path:
    bare = name if path.is_dir() else name.with_suffix("")
    return bare if container == "folder" else bare.with_name(f"{bare.name}.safetensors")


def _clashes(places: Mapping[Path, Path]) -> Iterator[str]:
    taken: dict[Path, Path] = {}
    for source, target in places.items():
        if target in taken:
            yield f"{taken[target]} and {source} would both become {target}; rename one"
        taken.setdefault(target, source)
    for target, source in taken.items():
        around = next((taken[parent] for parent in target.parents if parent in taken), None)
        if around is not None:
            yield f"{source} would go into the folder that {around} becomes; move one"


def _existing(places: Mapping[Path, Path]) -> list[Path]:
    return [target for target in places.values() if target.exists()]
