"""Convert an adapter to another format: load, write aside, load back, compare every delta, and only then rename."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vislora.algebra.compare import Comparison, compare
from vislora.config.convert import ConvertConfig
from vislora.errors import AdapterFileError, ConfigError
from vislora.files import replacing, write_text
from vislora.formats.adapter_file import AdapterFile
from vislora.formats.reading import load
from vislora.formats.tucker import fold_tucker
from vislora.formats.writing import Loss, save, unwritable
from vislora.records import Done, Note, Record, result


@dataclass
class ConvertReport:
    """How a conversion went. `proven`: modules whose delta was read back equal; `lost`: what could not be written."""

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
        return f"{line}; {len(self.lost)} loss(es), as allowed" if self.lost else line


def convert(source: str | Path, destination: str | Path, to: str, **settings: Any) -> ConvertReport:
    """Convert the adapter `source` to the format `to` at `destination`; `settings` are `ConvertConfig`'s.

    Returns a report whose `ok` says whether everything was written and proven equal. Nothing is written otherwise,
    unless `allow_loss`. Raises `AdapterFileError` for an unreadable source, `ConfigError` for a bad setting.
    """
    values = {"source": Path(source), "destination": Path(destination), "to": to, **settings}
    report: ConvertReport = result(run(ConvertConfig.of(values)))
    return report


def run(config: ConvertConfig) -> Iterator[Record]:
    """Convert as `config` says; yields a note per problem. The exit code is 1 after a mismatch or a loss."""
    _check_places(config)
    adapter = load(config.source)
    yield from (Note(text) for text in adapter.notes)
    adapter = replace(adapter, family=config.family or adapter.family)
    losses = unwritable(adapter, config.to)
    report = ConvertReport(config.source, config.destination, config.to, len(adapter.modules))
    report.lost = [str(loss) for loss in losses]
    yield from (Note(f"cannot be kept: {line}", "warning") for line in report.lost)
    if not losses or config.allow_loss:
        yield from _write(config, without(adapter, losses, config.to), report)
    else:
        yield Note("nothing was written; allow_loss writes the rest", "warning")
    if config.report is not None:
        write_text(config.report, json.dumps(as_json(report), indent=2) + "\n")
    yield Done(report, report.verdict, 0 if report.ok else 1)


def without(adapter: AdapterFile, losses: list[Loss], to: str) -> AdapterFile:
    """Return `adapter` without what `to` cannot hold; a Tucker core is multiplied out rather than dropped."""
    if not losses:
        return adapter
    folded = replace(adapter, modules=[fold_tucker(module) for module in adapter.modules], embeddings={}, extras={})
    lost = {name for loss in unwritable(folded, to) for name in loss.names}
    return replace(folded, modules=[module for module in folded.modules if module.name not in lost])


def as_json(report: ConvertReport) -> dict[str, Any]:
    """Return the report as JSON values."""
    fields = {key: value for key, value in vars(report).items() if not isinstance(value, Path)}
    return {"source": str(report.source), "destination": str(report.destination), **fields, "ok": report.ok}


class _Unproven(Exception):
    """Leaves `replacing`, so that no file stays behind."""


def _write(config: ConvertConfig, adapter: AdapterFile, report: ConvertReport) -> Iterator[Record]:
    try:
        with replacing(config.destination) as temporary:
            save(adapter, temporary, config.to)
            comparison = compare(adapter, load(temporary))
            _tell(report, comparison, config.tolerance)
            if report.problems:
                raise _Unproven
        report.written = True
    except _Unproven:
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
    if config.destination.exists() and not config.overwrite:
        raise ConfigError(f"destination: {config.destination} exists; choose another, or set overwrite")
    if config.to != "peft" and config.destination.suffix != ".safetensors":
        raise AdapterFileError(f"{config.destination}: a {config.to} adapter is a file named *.safetensors")
    if config.to == "peft" and config.destination.suffix == ".safetensors":
        raise AdapterFileError(f"{config.destination}: a peft adapter is a folder, not a .safetensors file")
