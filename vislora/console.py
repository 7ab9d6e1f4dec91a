"""Shows the records of a job: notes and progress on stderr, the summary on stdout, so that a summary can be piped."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from vislora.records import Done, Note, Progress, Record

SECONDS_BETWEEN_LINES = 10.0


class View(Protocol):
    """Where notes and progress are shown while a job runs."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def note(self, note: Note) -> None:
        """Show one line."""

    def progress(self, progress: Progress) -> None:
        """Show how far a task is."""


def show(records: Iterable[Record]) -> int:
    """Run a job to its end, show what it reports, and return its exit code."""
    done = Done(None)
    with view(Console(stderr=True)) as screen:
        for record in records:
            if isinstance(record, Note):
                screen.note(record)
            elif isinstance(record, Progress):
                screen.progress(record)
            else:
                done = record
    if done.summary and _is_first_process():
        sys.stdout.write(done.summary.rstrip("\n") + "\n")
        sys.stdout.flush()
    return done.exit_code


def view(console: Console) -> View:
    """Return bars for a terminal, plain lines for a file or a pipe."""
    console.quiet = not _is_first_process()
    return BarView(console) if console.is_terminal else LineView(console)


def figures(progress: Progress) -> str:
    """Return the fields as text, numbers with four digits: `loss 0.1234  rate 0.001`."""
    return "  ".join(
        f"{name} {value:.4g}" if isinstance(value, (int, float)) else f"{name} {value}"
        for name, value in progress.fields.items()
    )


class BarView:
    """One bar per task, with its figures, the time passed and the time left; notes scroll by above."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tasks: dict[str, TaskID] = {}
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tasks:
            self._bars.stop()

    def note(self, note: Note) -> None:
        """Print one line above the bars."""
        _print(self._console, note)

    def progress(self, progress: Progress) -> None:
        """Move the bar of the task; the first record of a task adds its bar."""
        if not self._tasks:
            self._bars.start()
        if progress.task not in self._tasks:
            self._tasks[progress.task] = self._bars.add_task(escape(progress.task), figures="")
        self._bars.update(
            self._tasks[progress.task],
            completed=progress.done,
            total=progress.total,
            figures=escape(figures(progress)),
        )


class LineView:
    """A plain line per task at most every ten seconds, and one at its end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._task = ""
        self._begun = self._written = 0.0
        self._waiting: Progress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flush()

    def note(self, note: Note) -> None:
        """Print one line."""
        _print(self._console, note)

    def progress(self, progress: Progress) -> None:
        """Print the state of the task when it is new, ten seconds after the last line, and when it is done."""
        now = time.monotonic()
        if progress.task != self._task:
            self._flush()
            self._task, self._begun, self._written = progress.task, now, now
        self._waiting = progress
        if progress.done >= progress.total or now - self._written >= SECONDS_BETWEEN_LINES:
            self._flush()

    def _flush(self) -> None:
        """Print the last state that was not printed yet."""
        if self._waiting is None:
            return
        self._written = time.monotonic()
        state, self._waiting = self._waiting, None
        seconds = self._written - self._begun
        left = seconds / state.done * (state.total - state.done) if state.done else 0.0
        parts = [f"{state.task} {state.done}/{state.total}", figures(state), _clock(seconds)]
        if left:
            parts[-1] += f", {_clock(left)} left"
        self._console.out("  ".join(part for part in parts if part), highlight=False)


def _print(console: Console, note: Note) -> None:
    prefix = "warning: " if note.level == "warning" else ""
    style = "yellow" if note.level == "warning" else None
    console.print(prefix + note.text, style=style, markup=False, highlight=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _is_first_process() -> bool:
    """Say whether this is the process that speaks; launchers of several processes number them in RANK."""
    return os.environ.get("RANK", "0") == "0"
