"""Shows the records of a job: notes and progress on stderr, the summary on stdout, so that a summary can be piped."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack
from types import TracebackType
from typing import Protocol, Self

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
    speaks = is_first_process()
    done = Done(None)
    with ExitStack() as stack:
        screen: View | None = None
        for record in records:
            if isinstance(record, Done):
                done = record
            elif speaks:
                screen = screen or stack.enter_context(view())
                screen.note(record) if isinstance(record, Note) else screen.progress(record)
    if done.summary and speaks:
        sys.stdout.write(done.summary.rstrip("\n") + "\n")
        sys.stdout.flush()
    return done.exit_code


def view() -> View:
    """Return bars when stderr is a terminal, plain lines when it is a file or a pipe."""
    if not sys.stderr.isatty():
        return LineView()
    # A job that reports nothing on the way, such as inspect, does not wait for the import of rich.
    from vislora.bars import BarView

    return BarView()


def is_first_process() -> bool:
    """Say whether this is the process that speaks; launchers of several processes number them in RANK."""
    return os.environ.get("RANK", "0") == "0"


class LineView:
    """A plain line per task at most every ten seconds, and one at its end."""

    def __init__(self) -> None:
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
        print(note.line, file=sys.stderr, flush=True)

    def progress(self, progress: Progress) -> None:
        """Print the state of the task ten seconds after the last line, and when it is done."""
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
        clock = f"{_clock(seconds)}, {_clock(left)} left" if left else _clock(seconds)
        parts = (f"{state.task} {state.done}/{state.total}", state.figures, clock)
        print("  ".join(part for part in parts if part), file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
