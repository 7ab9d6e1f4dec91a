"""Command-line flags from the settings of a job: defaults < TOML (`--config FILE`) < flags.

Only names and the shape of the command line are read here. Values stay text: the settings themselves turn them into
numbers and paths, so that one validation tells all problems at once.
"""

from __future__ import annotations

import argparse
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic.fields import FieldInfo

from vislora.config import toml
from vislora.config.base import POSITIONAL, REPEATABLE, OneOf, Section, Short
from vislora.errors import ConfigError, listed, nearest

S = TypeVar("S", bound=Section)

SHORT = "A flag can be shortened to its last part when only one ends so: --rank for --adapter.rank."
CONFIG = (
    "TOML file of settings, under the names of these flags{example}. Flags win over it. "
    "Relative paths start at the working directory, in the file too."
)
REQUIRED = " (required)"
EXAMPLE = ": `[adapter] rank = 8` is --adapter.rank 8"


def parse(cls: type[S], arguments: Sequence[str], prog: str) -> S:
    """Return the settings that `arguments` ask for.

    Raises `ConfigError` with all problems of the TOML file, of the flags' names, or of the values.
    Prints the help page and exits after `--help`; its defaults are those of the file, if one is given.
    """
    arguments = spelled_out(cls, arguments)
    path = _config_file(arguments)
    values = toml.read(path, cls) if path else {}
    given = vars(_parser(cls, values, prog).parse_intermixed_args(arguments))
    given.pop("config", None)
    where = f"{path} and flags" if path else "settings"
    return cls.of(_overlaid(values, given), where=where)


def spelled_out(cls: type[Section], arguments: Sequence[str]) -> list[str]:
    """Return the arguments with full flag names: `--rank` becomes `--adapter.rank` when only one setting ends so.

    Raises `ConfigError` with every unknown or ambiguous name.
    """
    options = ["--help", "--config", *(option for name, field in toml.flat(cls) for option in _options(name, field))]
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


def _matches(name: str, options: Sequence[str]) -> list[str]:
    if not name.startswith("--") or name == "--":
        return [name]
    name = name.replace("_", "-")
    return [name] if name in options else [option for option in options if _last(option) == name[2:]]


def _last(option: str) -> str:
    return option.removeprefix("--").rpartition(".")[2]


def _options(name: str, field: FieldInfo) -> list[str]:
    """Return the flags of a setting: `data.flip` has `--data.flip` and `--data.no-flip`, a positional one has none.

    A setting that Python's grammar gives an underscore has none here: `as_` is `--as`.
    """
    if POSITIONAL in field.metadata:
        return []
    head, dot, last = name.rstrip("_").replace("_", "-").rpartition(".")
    return [f"--{head}{dot}{prefix}{last}" for prefix in (("", "no-") if field.annotation is bool else ("",))]


def _config_file(arguments: Sequence[str]) -> str | None:
    for position, argument in enumerate(arguments):
        if argument == "--config" and position + 1 < len(arguments):
            return arguments[position + 1]
        if argument.startswith("--config="):
            return argument.removeprefix("--config=")
    return None


def _overlaid(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested `values` with the dotted names of `given` put over them."""
    result = {name: _overlaid(value, {}) if isinstance(value, Mapping) else value for name, value in values.items()}
    for dotted, value in given.items():
        *sections, name = dotted.split(".")
        place = result
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return result


class _Parser(argparse.ArgumentParser):
    """Tells its errors as ours."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; `{self.prog} --help` lists all flags")


class _Switch(argparse.Action):
    """`--data.flip` stores True, `--data.no-flip` False."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, option == self.option_strings[0])


def _parser(cls: type[Section], values: Mapping[str, Any], prog: str) -> _Parser:
    """Build the parser; what is not on the command line is absent from its result."""
    has_sections = any(toml.section_of(field) for field in cls.model_fields.values())
    parser = _Parser(
        prog=prog,
        usage=" ".join([prog, *_required(cls), "[options]"]),
        description=cls.__doc__,
        epilog=SHORT if has_sections else None,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=8),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    about = CONFIG.format(example=EXAMPLE if has_sections else "")
    parser.add_argument("--config", metavar="FILE", type=Path, help=about)
    _add(cls, parser, parser, values)
    return parser


def _required(cls: type[Section]) -> Iterator[str]:
    """Yield what the usage line says of each setting without a default, and of each that needs no flag."""
    for name, field in toml.flat(cls):
        if POSITIONAL in field.metadata and not field.is_required():
            yield f"[{name.upper()}]"
        elif field.is_required():
            yield " ".join([*_options(name, field), name.upper() if POSITIONAL in field.metadata else _metavar(field)])


def _add(cls: type[Section], parser: _Parser, group: Any, values: Mapping[str, Any], prefix: str = "") -> None:
    """Add the settings of a section to `group`, then a group of its own for each section in it."""
    for name, field in cls.model_fields.items():
        if toml.section_of(field) is None:
            _add_setting(group, prefix + name, field, _shown(field, values.get(name)))
    for name, field in cls.model_fields.items():
        section = toml.section_of(field)
        if section is not None:
            inner = parser.add_argument_group(f"{prefix}{name} options", field.description)
            _add(section, parser, inner, values.get(name, {}), f"{prefix}{name}.")


def _add_setting(group: Any, name: str, field: FieldInfo, shown: str) -> None:
    about = f"{field.description or ''}{shown}".replace("%", "%%")
    if POSITIONAL in field.metadata:
        count = ("+" if field.is_required() else "*") if _is_list(field) else (None if shown == REQUIRED else "?")
        group.add_argument(name, metavar=name.upper(), nargs=count, help=about)
        return
    keywords: dict[str, Any] = {"dest": name, "help": about}
    if field.annotation is bool:
        keywords |= {"action": _Switch, "nargs": 0}
    else:
        keywords |= {"metavar": _metavar(field), "type": _reader(field)}
        if REPEATABLE in field.metadata:
            keywords["action"] = "append"
        elif _is_list(field):
            keywords["nargs"] = "*"
    short = [item.flag for item in field.metadata if isinstance(item, Short)]
    group.add_argument(*short, *_options(name, field), **keywords)


def _shown(field: FieldInfo, from_file: Any) -> str:
    """Return what the help page says of the default: nothing, when there is none worth showing."""
    if from_file is None and field.is_required():
        return REQUIRED
    default = field.get_default(call_default_factory=True) if from_file is None else from_file
    if default is None or default in ("", (), [], {}, Path()):
        return ""
    if isinstance(default, bool):
        return f" (default: {'on' if default else 'off'})"
    return f" (default: {' '.join(map(str, default)) if isinstance(default, (tuple, list)) else default})"


def _reader(field: FieldInfo) -> Any:
    """Return the function that reads one word of a flag."""
    if _is_tables(field) or _is_table(field):
        return _table
    kinds = _alternatives(field)
    allows_none = types.NoneType in typing.get_args(field.annotation)
    return _text_or_none if allows_none and not {str, Path} & set(kinds) else str


def _text_or_none(text: str) -> str | None:
    return None if text.lower() == toml.NONE else text


def _table(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(f"table = {text}")["table"]
    except tomllib.TOMLDecodeError:
        example = '{name = "text", number = 4}'
        raise argparse.ArgumentTypeError(f"expected inline TOML tables such as '{example}', got {text!r}") from None


def _metavar(field: FieldInfo) -> str:
    if _is_tables(field) or _is_table(field):
        return "'{KEY = VALUE, ...}'"
    kind = _alternatives(field)[0]
    named = next((item for item in field.metadata if isinstance(item, OneOf)), None)
    if named is not None:
        return "{" + ",".join(named.known) + "}"
    if typing.get_origin(kind) is Literal:
        return "{" + ",".join(map(str, typing.get_args(kind))) + "}"
    return {int: "INT", float: "FLOAT", Path: "PATH"}.get(kind, "TEXT")


def _alternatives(field: FieldInfo) -> list[Any]:
    """Return the types that a word of the flag may have: `tuple[Path, ...]` -> Path, `float | None` -> float."""
    kind = field.annotation
    if typing.get_origin(kind) in (types.UnionType, typing.Union, tuple):
        kinds = [item for item in typing.get_args(kind) if item not in (types.NoneType, ...)]
    else:
        kinds = [kind]
    return [typing.get_args(item)[0] if typing.get_origin(item) is Annotated else item for item in kinds]


def _is_list(field: FieldInfo) -> bool:
    return typing.get_origin(field.annotation) is tuple


def _is_table(field: FieldInfo) -> bool:
    """Say whether a setting is one table of names and values."""
    return typing.get_origin(field.annotation) is dict


def _is_tables(field: FieldInfo) -> bool:
    """Say whether a setting is a list of sections, `[[adapter.targets]]` in TOML."""
    return _is_list(field) and any(
        isinstance(kind, type) and issubclass(kind, Section) for kind in _alternatives(field)
    )
