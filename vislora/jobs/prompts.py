"""Prompts and the adapters that they name: `<lora:name:0.8>` in the text, `--adapter path:0.8` on the command line.

What a tag can say beside the number: `strengths.parse_parts`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vislora.errors import ConfigError, listed, nearest
from vislora.inject.strength import Strength, strength_in_range
from vislora.jobs.folders import named_adapters
from vislora.jobs.strengths import parse_parts

_TAG = re.compile(r"<lora:([^:<>]+)((?::[^:<>]*)*)>")
_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Prompt:
    """What the model is given, and the adapters (name or path -> strength) that the text asked for."""

    text: str
    strengths: dict[str, Strength]


def parse_prompt(raw: str) -> Prompt:
    """Take every `<lora:name>` and `<lora:name:strength>` out of a prompt; one named twice counts with the sum.

    Raises `ConfigError` for a strength that is no number, and for one with parts of an adapter that is named twice.
    """
    strengths: dict[str, Strength] = {}
    for name, parts in _TAG.findall(raw):
        found = parse_parts(name, parts.split(":")[1:])
        strengths[name] = _sum(name, strengths[name], found) if name in strengths else found
    text = re.sub(r"\s{2,}", " ", _TAG.sub("", raw)).strip()
    return Prompt(re.sub(r"\s+,", ",", text), strengths)


def _sum(name: str, one: Strength, other: Strength) -> Strength:
    if not (one.is_plain and other.is_plain):
        raise ConfigError(f"a prompt names '{name}' twice, and not by a number alone: name it once")
    return Strength(strength_in_range(name, one.value + other.value))


def parse_adapter(raw: str) -> tuple[str, float]:
    """Split `style.safetensors:0.8` into the name or path and the strength (1 when there is none)."""
    name, colon, number = raw.rpartition(":")
    if not colon or not re.fullmatch(r"[+-]?[\d.]+(e[+-]?\d+)?|[+-]?(nan|inf(inity)?)", number, re.IGNORECASE):
        return raw, 1.0
    return name, _strength(name, number, raw)


def read_prompts(given: Sequence[str], file: Path | None) -> list[str]:
    """Return the prompts of the flags, then those of the file. Raises `ConfigError` when there is none at all."""
    prompts = list(given)
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"prompts: {file} cannot be read as UTF-8 text ({error})") from None
        prompts += [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise ConfigError("no prompt: give --prompt 'a fox, ink style' (more than once if you like) or --prompts FILE")
    return prompts


def find_adapter(name: str, folders: Iterable[Path]) -> Path:
    """Return the file that `name` means: a path, or the one of that name in `folders`, searched through.

    Raises `ConfigError` when there is none (with the nearest names) or more than one.
    """
    given = Path(name).expanduser()
    if given.exists():
        return given
    found = [path for folder in folders for path in named_adapters(folder)]
    fitting = sorted({path.resolve() for path in found if name in (path.stem, path.name)})
    if len(fitting) > 1:
        raise ConfigError(listed(f"adapter '{name}' could be any of these; give the path:", map(str, fitting)))
    if not fitting:
        searched = ", ".join(str(folder) for folder in folders)
        near = nearest(name, {path.stem for path in found})
        raise ConfigError(
            f"no adapter '{name}': it is no file, and not in {searched}{near}; name folders by --adapters"
        )
    return next(path for path in found if path.resolve() == fitting[0])


def label_adapters(names: Iterable[str], folders: Sequence[Path]) -> tuple[dict[str, str], dict[str, Path]]:
    """Find every named adapter; return (name as given -> label, label -> path).

    A file has one label, its stem, however it was named; files that share a stem get folders in front. The labels do
    not depend on the order of the names: deltas are summed in the order of the labels.
    """
    found = {name: find_adapter(name, folders) for name in names}
    files = {path.resolve(): path for path in found.values()}
    labels = {name: _label(path.resolve(), files) for name, path in found.items()}
    return labels, {labels[name]: files[path.resolve()] for name, path in found.items()}


def _label(path: Path, files: Iterable[Path]) -> str:
    """Return as few of the last parts of `path` as tell it from the other `files`."""
    others = [_parts(file) for file in files if file != path]
    parts = _parts(path)
    for count in range(1, len(parts) + 1):
        if all(other[-count:] != parts[-count:] for other in others):
            return "/".join(parts[-count:])
    return path.as_posix()


def _parts(path: Path) -> tuple[str, ...]:
    return (*path.parts[1:-1], path.name.removesuffix(_SUFFIX))


def _strength(name: str, number: str, raw: str) -> float:
    try:
        value = float(number)
    except ValueError:
        raise ConfigError(f"'{raw}': the strength of '{name}' is '{number}', which is no number") from None
    return strength_in_range(name, value)
