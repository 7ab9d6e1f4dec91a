"""Every error that vislora raises on purpose. The command line prints one as a readable block and exits 2.

A message names the thing that is wrong, its value, and the next step.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class VisloraError(Exception):
    """Base of all errors that a user can cause and mend."""


class ConfigError(VisloraError, ValueError):
    """A setting is unknown, missing or out of range, or an extra is not installed. Holds all problems at once."""

    def __init__(self, problems: str | Sequence[str], where: str = "") -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__(listed(where, self.problems) if where else "\n".join(self.problems))


class AdapterFileError(VisloraError, ValueError):
    """An adapter file is unreadable, unknown, incomplete or not finite."""


class AdapterMismatchError(VisloraError, ValueError):
    """An adapter does not fit the model that it was given to."""


class ModelError(VisloraError, ValueError):
    """A base model is missing, incomplete or of no known family."""


class DataError(VisloraError, ValueError):
    """Training images or captions are unusable. Holds every bad one."""


def listed(title: str, lines: Iterable[str], limit: int = 20) -> str:
    """Format `title` and at most `limit` indented lines; say how many more there are."""
    lines = list(lines)
    shown = [f"  {line}" for line in lines[:limit]]
    if len(lines) > limit:
        shown.append(f"  ... and {len(lines) - limit} more")
    return "\n".join([title, *shown])


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return ` (did you mean 'a' or 'b'?)`, or an empty string when nothing is close."""
    close = difflib.get_close_matches(name, list(known), n=count, cutoff=0.55)
    if not close:
        return ""
    return " (did you mean " + " or ".join(f"'{item}'" for item in close) + "?)"


def missing_extra(package: str, extra: str, purpose: str) -> ConfigError:
    """Return the error for an optional package that is not installed."""
    return ConfigError(f"{purpose} needs the package '{package}': pip install 'vislora[{extra}]'")
