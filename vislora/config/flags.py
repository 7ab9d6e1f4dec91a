"""Command-line flags from the settings of a job: defaults < TOML (`--config FILE`) < flags."""

from __future__ import annotations

import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from pydantic import TypeAdapter
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from vislora.config import toml
from vislora.config.base import Section
from vislora.errors import ConfigError, listed, nearest

S = TypeVar("S", bound=Section)

SHORT = "A flag can be shortened to its last part when only one ends so: --rank for --adapter.rank."
CONFIG = (
    "TOML file of settings, under the names of these flags{example}. Flags win over it. "
    "Relative paths start at the working directory, in the file too."
)
EXAMPLE = ": `[adapter] rank = 8` is --adapter.rank 8"


def parse(cls: type[S], arguments: Sequence[str], prog: str) -> S:
    """Return the settings that `arguments` ask for.

    Raises `ConfigError` with all problems of the TOML file, of the flags' names, or of the values.
    Exits with tyro's own message when a value cannot be read, and after `--help`.
    """
    arguments = spelled_out(cls, arguments)
    path = _config_file(arguments)
    values = toml.read(path, cls) if path else {}
    has_sections = any("." in name for name in _options(cls))
    extra = (_config_flag(EXAMPLE if has_sections else ""),)
    registry = ConstructorRegistry()
    registry.struct_rule(lambda info: _struct(info, extra if info.type is cls else ()))
    # A repeatable flag would add to the file's list: a setting that a flag names forgets what the file says.
    defaults = _defaults(cls, _without(values, _named(cls, arguments)))
    settings: Any = tyro.cli(
        cls,
        prog=prog,
        description=f"{cls.__doc__}\n\n{SHORT}" if has_sections else cls.__doc__,
        args=arguments,
        default=defaults,
        config=(tyro.conf.PositionalMetavarFromFieldName,),
        registry=registry,
    )
    settings.pop("config")
    return cls.of(settings, where=f"{path} and flags" if path else "settings")


def spelled_out(cls: type[Section], arguments: Sequence[str]) -> list[str]:
    """Return the arguments with full flag names: `--rank` becomes `--adapter.rank` when only one setting ends so.

    Raises `ConfigError` with every unknown or ambiguous name.
    """
    options = _options(cls)
    result, problems = [], []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        matches = _matches(name, options)
        if len(matches) == 1:
            result.append(matches[0] + equals + value)
        elif matches:
            problems.append(f"{name} is short for more than one flag: {', '.join(matches)}")
        else:
            known = {*options, *("--" + _last(option) for option in options)}
            problems.append(f"unknown flag {name}{nearest(name.replace('_', '-'), sorted(known))}")
    if problems:
        raise ConfigError(listed("the command line does not fit; --help lists all flags", problems))
    return result


def _matches(name: str, options: Mapping[str, str]) -> list[str]:
    if not name.startswith("--") or name == "--" or name.startswith("--tyro-"):
        return [name]
    name = name.replace("_", "-")
    return [name] if name in options else [option for option in options if _last(option) == name[2:]]


def _last(option: str) -> str:
    return option.removeprefix("--").rpartition(".")[2]


def _options(cls: type[Section]) -> dict[str, str]:
    """Return every long flag and the dotted name of its setting: `--data.no-flip` -> `data.flip`."""
    options = {"--help": "", "--config": ""}
    for name, field in toml.flat(cls):
        if tyro.conf.Positional in field.metadata:
            continue
        option = "--" + name.replace("_", "-")
        options[option] = name
        if field.annotation is bool:
            head, dot, last = option[2:].rpartition(".")
            options[f"--{head}{dot}no-{last}"] = name
    return options


def _config_flag(example: str) -> StructFieldSpec:
    kind: Any = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]
    return StructFieldSpec(name="config", type=kind, default=None, helptext=CONFIG.format(example=example))


def _config_file(arguments: Sequence[str]) -> str | None:
    for position, argument in enumerate(arguments):
        if argument == "--config" and position + 1 < len(arguments):
            return arguments[position + 1]
        if argument.startswith("--config="):
            return argument.removeprefix("--config=")
    return None


def _named(cls: type[Section], arguments: Sequence[str]) -> set[str]:
    options = _options(cls)
    return {options[name] for argument in arguments if (name := argument.partition("=")[0]) in options}


def _without(values: Mapping[str, Any], names: set[str], prefix: str = "") -> dict[str, Any]:
    return {
        name: _without(value, names, f"{prefix}{name}.") if isinstance(value, Mapping) else value
        for name, value in values.items()
        if prefix + name not in names
    }


def _defaults(cls: type[Section], values: Mapping[str, Any]) -> Section:
    """Return settings to show as defaults: those of the file, else of the class; tyro's MISSING for required ones."""
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(cls, include_extras=True)
    for name, field in cls.model_fields.items():
        section = toml.section_of(field)
        if section is not None:
            found[name] = _defaults(section, values.get(name, {}))
        elif name in values:
            found[name] = _typed(hints[name], values[name])
        else:
            found[name] = tyro.MISSING if field.is_required() else field.get_default(call_default_factory=True)
    return cls.model_construct(**found)


def _typed(hint: Any, value: Any) -> Any:
    """Return a value of the file as the type that tyro expects; it was checked before."""
    return tuple(value) if _is_tables(hint) else TypeAdapter(hint).validate_python(value)


def _struct(info: StructTypeInfo, extra: Sequence[StructFieldSpec]) -> StructConstructorSpec | None:
    """Tell tyro to build plain dictionaries of sections: one validation then names all problems with their paths."""
    cls: Any = info.type
    if not (isinstance(cls, type) and issubclass(cls, Section)):
        return None

    def instantiate(**values: Any) -> dict[str, Any]:
        return values

    instantiate.__doc__ = cls.__doc__
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = [
        StructFieldSpec(
            name=name,
            type=_flag_type(hints[name], getattr(info.default, name)),
            default=getattr(info.default, name),
            helptext=field.description,
        )
        for name, field in cls.model_fields.items()
    ]
    return StructConstructorSpec(instantiate=instantiate, fields=(*extra, *fields))


def _flag_type(hint: Any, default: Any) -> Any:
    """Return the type with what the help page shows: no None in the placeholder, no default that says nothing."""
    shown: dict[str, Any] = {} if default else {"help_behavior_hint": _default_worth_showing}
    some = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
    if typing.get_origin(hint) in (types.UnionType, typing.Union) and len(some) == 1:
        shown["metavar"] = _placeholder(some[0])
    kind = Annotated[tuple, _TABLES] if _is_tables(hint) else hint
    return Annotated[kind, tyro.conf.arg(**shown)] if shown else kind


def _default_worth_showing(default: str) -> str:
    return "" if default in ("", "None", "''") else f"(default: {default})"


def _placeholder(kind: Any) -> str:
    if typing.get_origin(kind) is Annotated:
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is Literal:
        return "{" + ",".join(map(str, typing.get_args(kind))) + "}"
    return str(getattr(kind, "__name__", kind)).upper()


def _is_tables(hint: Any) -> bool:
    """Say whether a setting is a list of sections, `[[adapter.targets]]` in TOML."""
    return any(isinstance(kind, type) and issubclass(kind, Section) for kind in typing.get_args(hint))


def _tables(texts: list[str]) -> tuple[Any, ...]:
    try:
        return tuple(tomllib.loads(f"table = {text}")["table"] for text in texts)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"expected inline TOML tables such as '{{pattern = \"*.to_k\", rank = 4}}': {error}") from None


_TABLES = PrimitiveConstructorSpec(
    nargs="*",
    metavar="'{KEY = VALUE, ...}' ...",
    instance_from_str=_tables,
    is_instance=lambda instance: isinstance(instance, (tuple, list)),
    str_from_instance=lambda instance: [str(item) for item in instance],
)
