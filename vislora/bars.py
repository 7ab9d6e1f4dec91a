"""Progress on a terminal, drawn by rich: one bar per task, notes scroll by above."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from vislora.records import Note, Progress


class BarView:
    """One bar per task, with its figures, the time passed and the time left."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._tasks: dict[str, TaskID] = {}
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
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
        style = "yellow" if note.level == "warning" else None
        self._console.print(note.line, style=style, markup=False, highlight=False, soft_wrap=True)

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
            figures=escape(progress.figures),
        )
