"""Closed, documented settings: an unknown key is an error that names the nearest; all problems are told at once."""

from __future__ import annotations

import importlib
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic_core.core_schema import CoreSchema, no_info_after_validator_function

from vislora.errors import ConfigError, nearest
from vislora.registry import Registry

T = TypeVar("T")
POSITIONAL, REPEATABLE = "positional", "repeatable"
Positional = Annotated[T, POSITIONAL]
"""A setting that the command line takes without a flag."""
Repeatable = Annotated[T, REPEATABLE]
"""A list whose flag is repeated for every item."""


@dataclass(frozen=True)
class Short:
    """A second, short flag of a setting: `-o`."""

    flag: str


@dataclass(frozen=True)
class OneOf:
    """A text setting that names a part; an alias of one becomes its name. Other names are an error with the nearest.

    target: "module:attribute" of the mapping with these names, imported when a value is checked or help is shown.
    """

    target: str

    @property
    def known(self) -> Mapping[str, Any]:
        """Return the mapping: a registry, or a plain one without aliases."""
        module, attribute = self.target.split(":")
        found: Mapping[str, Any] = getattr(importlib.import_module(module), attribute)
        return found

    def checked(self, value: str | None) -> str | None:
        """Return the name that `value` stands for; no value, or an empty one, is returned as it is."""
        known = self.known
        if not value or value in known:
            return known.name_of(value) if value and isinstance(known, Registry) else value
        raise ValueError(f"unknown name{nearest(value, known)}; known: {', '.join(known)}")

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self.checked, handler(source))


class Section(BaseModel):
    """A group of settings. Fields are documented by the string under each; TOML keys and flags have the same names."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True)

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str = "settings") -> Self:
        """Validate `values` (nested mappings).

        Raises `ConfigError` with every problem, its dotted path and the nearest name.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise ConfigError(list(_problems(cls, error)), where=f"{where}: {error.error_count()} problem(s)") from None

    @classmethod
    def check(cls, values: Mapping[str, Any], where: str = "settings") -> None:
        """Raise `ConfigError` as `of` does, but not for what further settings can mend.

        That is: a missing setting, and a rule over several settings of a section.
        """
        try:
            cls.model_validate(dict(values))
        except ValidationError as error:
            problems = list(_problems(cls, error, partial=True))
            if problems:
                raise ConfigError(problems, where=f"{where}: {len(problems)} problem(s)") from None


def _problems(cls: type[Section], error: ValidationError, partial: bool = False) -> Iterator[str]:
    for item in error.errors():
        loc = item["loc"]
        if partial and (item["type"] == "missing" or _is_rule_of_section(item)):
            continue
        path = ".".join(str(part) for part in loc)
        if item["type"] == "missing":
            yield from (f"{name}: required, but not given" for name in _required(path, _section_at(cls, loc)))
        elif item["type"] == "extra_forbidden":
            section = _section_at(cls, loc[:-1])
            yield f"{path}: unknown setting{nearest(str(loc[-1]), section.model_fields if section else ())}"
        else:
            message = item["msg"].removeprefix("Value error, ")
            got = item["input"]
            shown = f" (got {got!r})" if isinstance(got, (str, int, float, bool)) and loc else ""
            if item["type"] == "literal_error" and isinstance(got, str):
                shown += nearest(got, re.findall("'([^']+)'", message))
            yield f"{path}: {message}{shown}" if loc else message


def _required(path: str, section: type[Section] | None) -> list[str]:
    """Return the paths of what is missing at `path`: of a whole section, the settings that it cannot do without."""
    fields = section.model_fields if section else {}
    return [f"{path}.{name}" for name, field in fields.items() if field.is_required()] or [path]


def _is_rule_of_section(item: Mapping[str, Any]) -> bool:
    """Say whether a section as a whole was refused: its validator saw a mapping, a field's sees a plain value."""
    return item["type"] in ("value_error", "assertion_error") and isinstance(item["input"], (Mapping, Section))


def _section_at(cls: type[Section], loc: tuple[int | str, ...]) -> type[Section] | None:
    """Follow the field names of `loc` from `cls`; list indices are passed over."""
    current: type[Section] | None = cls
    for part in loc:
        if current is not None and isinstance(part, str) and part in current.model_fields:
            current = _section_in(current.model_fields[part].annotation)
    return current


def _section_in(annotation: Any) -> type[Section] | None:
    if (
        isinstance(annotation, type)
        and not isinstance(annotation, types.GenericAlias)
        and issubclass(annotation, Section)
    ):
        return annotation
    for argument in typing.get_args(annotation):
        found = _section_in(argument)
        if found is not None:
            return found
    return None
