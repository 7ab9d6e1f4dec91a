"""Convert an adapter to another format: load, write aside, load back, compare every delta, and only then rename."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vislora.algebra.compare import Comparison
from vislora.config.convert import ConvertConfig
from vislora.errors import ConfigError, VisloraError
from vislora.files import write_text
from vislora.formats.adapter_file import AdapterFile
from vislora.formats.container import is_one_adapter
from vislora.formats.overview import overview
from vislora.formats.reading import load, uncollected
from vislora.formats.tucker import fold_tucker
from vislora.formats.writing import Loss, pack, pack_whole, unwritable, writable
from vislora.jobs.changes import changed
from vislora.jobs.folders import adapters_below, check_places, destinations
from vislora.jobs.parallel import each, is_worker
from vislora.jobs.proof import Pack, Unproven, check_destination, save_proven
from vislora.records import Done, Note, Progress, Record, result
from vislora.registry import FORMATS


@dataclass
class ConvertReport:
    """How a conversion went. `proven`: modules whose delta was read back equal; `lost`: what could not be written.

    changes, changed: what was asked to be changed, in words and by module; `proven` means equal to that.
    """

    source: Path
    destination: Path
    to: str
    modules: int
    proven: int = 0
    largest: float = 0.0
    relative: float = 0.0
    written: bool = False
    lost: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    differences: dict[str, float] = field(default_factory=dict)
    changes: str = ""
    changed: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Say whether everything was written and proven."""
        return self.written and not self.lost and not self.problems

    @property
    def verdict(self) -> str:
        """Return the outcome in one line."""
        if not self.written:
            return f"not written: {len(self.lost) + len(self.problems)} problem(s) with {self.source}"
        within = f", {self.relative:.1g} of its module" if self.relative else ""
        line = f"proven: {self.proven} of {self.modules} modules equal (max difference {self.largest:.2g}{within})"
        line = f"{line}; {self.changes}" if self.changes else line
        return f"{line}; {len(self.lost)} loss(es), as allowed" if self.lost else line


@dataclass
class FolderReport:
    """How the conversion of a folder of adapters went."""

    source: Path
    destination: Path
    to: str
    files: list[ConvertReport] = field(default_factory=list)

    @property
    def bad(self) -> int:
        """Count the adapters of which something was not written or not proven."""
        return sum(not report.ok for report in self.files)

    @property
    def ok(self) -> bool:
        """Say whether every adapter was written and proven."""
        return not self.bad

    @property
    def verdict(self) -> str:
        """Return the outcome in one line."""
        proven = f"{len(self.files) - self.bad} of {len(self.files)} adapters proven, in {self.destination}"
        names = ", ".join(str(report.source) for report in self.files if not report.ok)
        return f"{proven}; not: {names}" if names else proven

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        places = {"source": str(self.source), "destination": str(self.destination), "to": self.to, "ok": self.ok}
        return {**places, "files": [as_json(report) for report in self.files]}


def convert(source: str | Path, destination: str | Path, to: str, **settings: Any) -> ConvertReport:
    """Convert the adapter `source` to the format `to` at `destination`; `settings` are `ConvertConfig`'s.

    Returns a report whose `ok` says whether everything was written and proven equal. Nothing is written otherwise,
    unless `allow_loss`. Raises `AdapterFileError` for an unreadable source, `ConfigError` for a bad setting.
    """
    values = {"source": Path(source), "destination": Path(destination), "to": to, **settings}
    report: ConvertReport = result(_one(ConvertConfig.of(values)))
    return report


def convert_folder(source: str | Path, destination: str | Path, to: str, **settings: Any) -> FolderReport:
    """Convert every adapter below the folder `source` into the folder `destination`; a bad one stops no other.

    Does as `convert` does, with one report per adapter, but an unreadable adapter is a problem in its report.
    """
    values = {"source": Path(source), "destination": Path(destination), "to": to, **settings}
    config = ConvertConfig.of(values)
    report: FolderReport = result(_folder(config))
    return report


def run(config: ConvertConfig) -> Iterator[Record]:
    """Convert as `config` says; yields a note per problem. The exit code is 1 after a mismatch, a loss or an error."""
    if config.list:
        yield Done(list(FORMATS), overview())
    elif config.source.is_dir() and not is_one_adapter(config.source):
        yield from _folder(config)
    else:
        yield from _one(config)


def _one(config: ConvertConfig) -> Iterator[Record]:
    with uncollected():
        yield from _checked(config)


def _checked(config: ConvertConfig) -> Iterator[Record]:
    _check_places(config)
    adapter = load(config.source, config.allow_pickle)
    yield from (Note(text) for text in adapter.notes)
    changes = changed(replace(adapter, family=config.family or adapter.family), config)
    yield from changes.notes
    adapter = changes.adapter
    losses = unwritable(adapter, config.to)
    report = ConvertReport(config.source, config.destination, config.to, len(adapter.modules))
    report.changes, report.changed = changes.verdict, changes.modules
    report.lost = [str(loss) for loss in losses]
    yield from (Note(f"cannot be kept: {line}", "warning") for line in report.lost)
    if not losses:
        yield from _write(config, adapter, pack_whole, report)
    elif config.allow_loss:
        yield from _write(config, without(adapter, losses, config.to), pack, report)
    else:
        yield Note("nothing was written; allow_loss writes the rest", "warning")
    if config.report is not None:
        write_text(config.report, json.dumps(as_json(report), indent=2) + "\n")
    yield Done(report, report.verdict, 0 if report.ok else 1)


def _folder(config: ConvertConfig) -> Iterator[Record]:
    adapters, others = adapters_below(config.source)
    places = destinations(adapters, config.source, config.destination, writable(config.to).container)
    check_places(places, config.source, config.destination, config.overwrite)
    _check_report(config, [*places, *places.values()])
    if others:
        yield Note(f"{len(others)} other files are left alone (first: {others[0]})")
    tasks = [
        config.model_copy(update={"source": source, "destination": target, "report": None})
        for source, target in places.items()
    ]
    whole = FolderReport(config.source, config.destination, config.to)
    for task, (notes, report) in each(_attempt, tasks, config.workers, _killed):
        whole.files.append(report)
        name = task.source.relative_to(config.source)
        yield from (Note(f"{name}: {note.text}", note.level) for note in notes)
        yield Note(f"{name}: {report.verdict}", "info" if report.ok else "warning")
        yield Progress("converting", len(whole.files), len(tasks), {"not proven": whole.bad})
    whole.files.sort(key=lambda report: adapters.index(report.source))
    if config.report is not None:
        write_text(config.report, json.dumps(whole.as_json(), indent=2) + "\n")
    yield Done(whole, whole.verdict, 0 if whole.ok else 1)


def _attempt(config: ConvertConfig) -> tuple[list[Note], ConvertReport]:
    """Convert one adapter of many: whatever goes wrong with it is told, and the others go on."""
    notes = []
    if is_worker():
        torch.set_num_threads(1)
    try:
        for record in _one(config):
            if isinstance(record, Note):
                notes.append(record)
            elif isinstance(record, Done):
                return notes, record.value
    except VisloraError as error:
        return _failed(config, notes, str(error))
    except Exception as error:
        return _failed(config, notes, f"{type(error).__name__}, a fault of vislora's: {error}")
    raise AssertionError("a conversion ends with a report")


def _killed(config: ConvertConfig) -> tuple[list[Note], ConvertReport]:
    return _failed(config, [], "its process was killed, maybe for want of memory; convert it alone")


def _failed(config: ConvertConfig, notes: list[Note], problem: str) -> tuple[list[Note], ConvertReport]:
    report = ConvertReport(config.source, config.destination, config.to, 0, problems=[problem])
    return [*notes, Note(problem, "warning")], report


def without(adapter: AdapterFile, losses: list[Loss], to: str) -> AdapterFile:
    """Return `adapter` without what `to` cannot hold; a Tucker core is multiplied out rather than dropped."""
    if not losses:
        return adapter
    folded = replace(adapter, modules=[fold_tucker(module) for module in adapter.modules], extras={})
    if not writable(to).embeddings:
        folded = replace(folded, embeddings={})
    lost = {name for loss in unwritable(folded, to) for name in loss.names}
    return replace(folded, modules=[module for module in folded.modules if module.name not in lost])


def as_json(report: ConvertReport) -> dict[str, Any]:
    """Return the report as JSON values."""
    fields = {key: value for key, value in vars(report).items() if not isinstance(value, Path)}
    return {"source": str(report.source), "destination": str(report.destination), **fields, "ok": report.ok}


def _write(config: ConvertConfig, adapter: AdapterFile, packed: Pack, report: ConvertReport) -> Iterator[Record]:
    try:
        comparison = save_proven(adapter, config.destination, config.to, config.tolerance, packed)
        report.written = True
    except Unproven as error:
        comparison = error.comparison
    _tell(report, comparison, config.tolerance)
    yield from (Note(f"not equal: {line}", "warning") for line in report.problems)


def _tell(report: ConvertReport, comparison: Comparison, tolerance: float) -> None:
    report.problems = comparison.problems(tolerance)
    report.proven = sum(1 for item in comparison.modules if not item.problem and item.relative <= tolerance)
    report.largest, report.relative = comparison.largest, comparison.relative
    report.differences = {item.name: item.largest for item in comparison.modules}


def _check_places(config: ConvertConfig) -> None:
    source, destination = config.source.resolve(), config.destination.resolve()
    if source == destination or destination in source.parents:
        raise ConfigError(f"destination: {config.destination} is, or holds, the source itself; name another place")
    if source in destination.parents:
        raise ConfigError(f"destination: {config.destination} is in the source; name a place beside it")
    check_destination(config.destination, config.to, config.overwrite)
    _check_report(config, [config.source, config.destination])


def _check_report(config: ConvertConfig, places: Iterable[Path]) -> None:
    if config.report is not None and config.report.resolve() in {place.resolve() for place in places}:
        raise ConfigError(f"report: {config.report} is the place of an adapter; name another file")
