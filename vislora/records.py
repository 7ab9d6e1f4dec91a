"""What a job reports while it runs. A job is a generator of records; the last one is `Done`. Nothing calls back up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Note:
    """One line that a person should see. `level`: info or warning."""

    text: str
    level: str = "info"

    @property
    def line(self) -> str:
        """The text, with a word before it when it is a warning."""
        return f"warning: {self.text}" if self.level == "warning" else self.text


@dataclass(frozen=True)
class Progress:
    """`done` of `total` units of `task`; `fields` are figures to show beside the bar (loss, rate, ...)."""

    task: str
    done: int
    total: int
    fields: dict[str, float | str] = field(default_factory=dict)

    @property
    def figures(self) -> str:
        """The fields as text, numbers with four digits: `loss 0.1234  rate 0.001`."""
        return "  ".join(
            f"{name} {value}" if isinstance(value, str) else f"{name} {value:.4g}"
            for name, value in self.fields.items()
        )


@dataclass(frozen=True)
class Done:
    """The end of a job. `value`: what the Python function returns; `summary`: what the command line prints."""

    value: Any
    summary: str = ""
    exit_code: int = 0


Record = Note | Progress | Done


def result(records: Iterable[Record]) -> Any:
    """Run a job to its end and return the value of its `Done`."""
    value = None
    for record in records:
        if isinstance(record, Done):
            value = record.value
    return value
