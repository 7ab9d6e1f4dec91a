"""Settings as TOML: the same names as the flags, `[adapter] rank = 8` for `--adapter.rank 8`.

Relative paths mean the same as on the command line: they start at the working directory.
TOML has no null. Only where leaving a setting out does not mean none, `"none"` stands for it: `min_snr_gamma = "none"`.
"""

from __future__ import annotations

import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic.fields import FieldInfo

from vislora.config.base import Section
from vislora.errors import ConfigError, nearest

S = TypeVar("S", bound=Section)
NONE = "none"


def load(path: str | Path, cls: type[S]) -> S:
    """Read a TOML file as settings of `cls`. Raises `ConfigError` with every problem."""
    return cls.of(_values(path, cls), where=str(path))


def loads(text: str, cls: type[S]) -> S:
    """Read TOML text as settings of `cls`: the inverse of `dump`."""
    return cls.of(_with_none(cls, _parsed(text, "TOML")), where="TOML")


def read(path: str | Path, cls: type[Section]) -> dict[str, Any]:
    """Return the values of a TOML file, checked against `cls`; settings that flags may still add can be missing."""
    values = _values(path, cls)
    cls.check(values, where=str(path))
    return values


def dump(config: Section) -> str:
    """Return every setting that is not None as TOML: `loads(dump(config), type(config)) == config`."""
    return tomli_w.dumps(_plain(config))


def _values(path: str | Path, cls: type[Section]) -> dict[str, Any]:
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        names = [item.name for item in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        raise ConfigError(f"no such config file: {path}{nearest(path.name, names)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config file {path}: {error}") from None
    return _with_none(cls, _parsed(text, str(path)))


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where} is not valid TOML: {error}") from None


def _with_none(cls: type[Section], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy in which `"none"` is None where `cls` says so."""
    result = dict(values)
    for name, field in cls.model_fields.items():
        value = result.get(name)
        section = section_of(field)
        if section is not None and isinstance(value, Mapping):
            result[name] = _with_none(section, value)
        elif value == NONE and _needs_none(field):
            result[name] = None
    return result


def _plain(section: Section) -> dict[str, Any]:
    """Return the settings as TOML knows them, plain ones first: a table ends the list of its parent's own keys."""
    fields = type(section).model_fields
    found = {name: _written(fields[name], value) for name, value in section}
    return {name: value for name, value in sorted(found.items(), key=_is_table) if value is not None}


def _written(field: FieldInfo, value: Any) -> Any:
    if value is None:
        return NONE if _needs_none(field) else None
    if isinstance(value, Section):
        return _plain(value)
    if isinstance(value, (tuple, list)):
        return [_written(field, item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _is_table(item: tuple[str, Any]) -> bool:
    value = item[1]
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def _needs_none(field: FieldInfo) -> bool:
    """Say whether None is allowed but is not what leaving the setting out means."""
    return not field.is_required() and field.default is not None and types.NoneType in typing.get_args(field.annotation)


def section_of(field: FieldInfo) -> type[Section] | None:
    """Return the class of a field that is one nested section, None for any other field."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def flat(cls: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield (dotted name, field) of every setting of `cls` and of its nested sections."""
    for name, field in cls.model_fields.items():
        section = section_of(field)
        if section is None:
            yield prefix + name, field
        else:
            yield from flat(section, f"{prefix}{name}.")
