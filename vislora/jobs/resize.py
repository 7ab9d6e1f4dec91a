"""`vislora resize`: an adapter of a smaller rank, with the error of every module."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vislora import formats
from vislora.algebra.low_rank import Limits
from vislora.algebra.resize import Left, Resized, resize
from vislora.config.resize import ResizeConfig
from vislora.errors import ConfigError
from vislora.files import write_text
from vislora.formats.reading import uncollected
from vislora.jobs.devices import DTYPES
from vislora.jobs.merge import format_of, worst
from vislora.jobs.proof import check_destination, save_proven
from vislora.records import Done, Note, Record, result


@dataclass(frozen=True)
class ResizeReport:
    """How a resize went. error: of all resized modules together; sizes in bytes."""

    source: Path
    destination: Path
    to: str
    error: float
    before: int
    after: int
    modules: tuple[Resized, ...]
    left: tuple[Left, ...]

    @property
    def verdict(self) -> str:
        """Return the outcome in one line."""
        ranks = sorted({module.after for module in self.modules})
        shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        sizes = f"{self.before / 1e6:.1f} to {self.after / 1e6:.1f} MB"
        text = f"{len(self.modules)} modules now of rank {shown}, relative error {self.error:.3g}, {sizes}"
        return f"{text}; proven: {self.destination}"

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        rows = [{**asdict(module), "error": module.error} for module in self.modules]
        fields = {"error": self.error, "before": self.before, "after": self.after, "to": self.to}
        places = {"source": str(self.source), "destination": str(self.destination)}
        return {**places, **fields, "modules": rows, "left": [asdict(item) for item in self.left]}


def resize_adapter(source: str | Path, destination: str | Path, **settings: Any) -> ResizeReport:
    """Write the adapter `source` with smaller ranks to `destination`; `settings` are `ResizeConfig`'s.

    Raises a `VisloraError` for what cannot be read, reduced or written; then nothing is written.
    """
    values = {"source": Path(source), "destination": Path(destination), **settings}
    report: ResizeReport = result(run(ResizeConfig.of(values)))
    return report


def run(config: ResizeConfig) -> Iterator[Record]:
    """Resize as `config` says; yields what stays as it is, the worst modules, and a report."""
    if config.destination.resolve() == config.source.resolve():
        raise ConfigError(f"destination: {config.destination} is the source itself; name another place")
    with uncollected():
        adapter = formats.load(config.source, config.allow_pickle)
        to = config.to or format_of(adapter)
        check_destination(config.destination, to, config.overwrite)
        yield from map(Note, adapter.notes)
        dtype = DTYPES[config.precision] if config.precision else None
        made, told = resize(adapter, Limits(config.rank, config.energy, config.ratio), dtype)
        resized = tuple(item for item in told if isinstance(item, Resized))
        left = tuple(item for item in told if isinstance(item, Left))
        if not resized:
            raise ConfigError(f"source: {config.source} has no module whose rank could be reduced")
        for reason in dict.fromkeys(item.reason for item in left):
            names = [item.name for item in left if item.reason == reason]
            yield Note(f"{len(names)} modules stay as they are: {reason} (first: {names[0]})", "warning")
        save_proven(made, config.destination, to, config.tolerance)
    yield from map(Note, worst(resized))
    norm = math.hypot(*(item.norm for item in resized))
    error = math.hypot(*(item.apart for item in resized)) / (norm or 1.0)
    sizes = _size(config.source), _size(config.destination)
    report = ResizeReport(config.source, config.destination, to, error, *sizes, resized, left)
    if config.report is not None:
        write_text(config.report, json.dumps(report.as_json(), indent=2) + "\n")
    yield Done(report, report.verdict)


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
