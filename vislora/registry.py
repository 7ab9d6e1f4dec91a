"""Names of the replaceable parts, each `name -> "module:attribute"`; a part is imported when it is asked for.

A new algorithm, file format or model family is one file and one line here; the contract tests then run over it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from vislora.errors import ConfigError, nearest


class Registry(Mapping[str, Any]):
    """A read-only mapping from a name to a part that is imported on first use."""

    def __init__(self, kind: str, targets: dict[str, str]) -> None:
        self.kind = kind
        self._targets = targets

    def __getitem__(self, name: str) -> Any:
        """Import and return the part `name`. Raises `ConfigError` for an unknown name."""
        if name not in self._targets:
            known = ", ".join(self._targets)
            raise ConfigError(f"unknown {self.kind} '{name}'{nearest(name, self._targets)}; known: {known}")
        module, attribute = self._targets[name].split(":")
        return getattr(importlib.import_module(module), attribute)

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __len__(self) -> int:
        return len(self._targets)

    def __contains__(self, name: object) -> bool:
        return name in self._targets


ALGORITHMS = Registry(
    "algorithm",
    {
        "lora": "vislora.algorithms.lora:LORA",
        "loha": "vislora.algorithms.loha:LOHA",
        "lokr": "vislora.algorithms.lokr:LOKR",
    },
)

FORMATS = Registry(
    "format",
    {
        "kohya": "vislora.formats.kohya:KOHYA",
        "diffusers": "vislora.formats.diffusers:DIFFUSERS",
        "peft": "vislora.formats.peft:PEFT",
    },
)

FAMILIES = Registry("family", {"sd": "vislora.models.sd:StableDiffusion", "sd3": "vislora.models.sd3:StableDiffusion3"})
