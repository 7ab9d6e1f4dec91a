"""Patterns in settings: over the paths of layers and of images."""

from __future__ import annotations

import fnmatch
import re

from vislora.errors import ConfigError


def matches(pattern: str, path: str) -> bool:
    """Say whether `pattern` (a glob, or `re:` and a regular expression) matches the whole `path`.

    Raises `ConfigError` for what is no regular expression.
    """
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], path) is not None
        except re.error as error:
            raise ConfigError(f"pattern '{pattern}' is no valid regular expression: {error}") from None
    return fnmatch.fnmatchcase(path, pattern)
