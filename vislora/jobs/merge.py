"""`vislora merge`: several adapters as one, with the relative error against the sum that was asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vislora import formats
from vislora.algebra.low_rank import Limits
from vislora.algebra.merge import How, MergedModule, Part, merge
from vislora.config.merge import MergeConfig
from vislora.errors import ConfigError
from vislora.files import write_text
from vislora.formats.adapter_file import AdapterFile, AdapterModule
from vislora.inject.strength import Strength
from vislora.jobs.devices import DTYPES, pick_device
from vislora.jobs.merge_base import merge_into
from vislora.jobs.prompts import parse_adapter
from vislora.jobs.proof import check_destination, save_proven
from vislora.jobs.stacks import label_once
from vislora.jobs.strengths import declared
from vislora.jobs.ziplora import ZipOptions, learn
from vislora.models.base import load_family
from vislora.records import Done, Note, Record, result
from vislora.registry import FORMATS

SHOWN, ROUNDING = 5, 1e-6


@dataclass(frozen=True)
class MergeReport:
    """How a merge went. error: of all modules together, |made - asked for| / |asked for|, Frobenius norms."""

    destination: Path
    to: str
    method: str
    strengths: dict[str, float]
    error: float
    modules: tuple[MergedModule, ...]

    @property
    def verdict(self) -> str:
        """Return the outcome in one line."""
        ranks = sorted({module.rank for module in self.modules})
        shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        error = "equal to their sum" if self.error <= ROUNDING else f"relative error {self.error:.3g} against their sum"
        names = ", ".join(f"{name}:{strength:g}" for name, strength in self.strengths.items())
        return f"merged {names}: {len(self.modules)} modules, rank {shown}, {error}; proven: {self.destination}"

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        rows = [{**asdict(module), "error": module.error} for module in self.modules]
        fields = {key: value for key, value in vars(self).items() if key not in ("modules", "destination")}
        return {"destination": str(self.destination), **fields, "modules": rows}


def merge_adapters(adapter: Sequence[str | Path], output: str | Path, **settings: Any) -> Any:
    """Merge adapters, such as `("ink.safetensors:0.8", "outline.safetensors:0.5")`; `settings` are `MergeConfig`'s.

    Returns a `MergeReport`; with `base`, what was merged where.

    Raises a `VisloraError` for what cannot be merged or written; then nothing is written.
    """
    values = {"adapter": tuple(map(str, adapter)), "output": Path(output), **settings}
    return result(run(MergeConfig.of(values)))


def run(config: MergeConfig) -> Iterator[Record]:
    """Merge as `config` says; yields what was odd, the worst modules, and a report."""
    given = [(table.adapter, declared(table)) for table in config.stack]
    given += [(name, Strength(value)) for name, value in map(parse_adapter, config.adapter)]
    labels, paths = label_once([name for name, _ in given], config.adapters)
    strengths = {labels[name]: strength for name, strength in given}
    if config.output.resolve() in {path.resolve() for path in paths.values()}:
        raise ConfigError(f"output: {config.output} is one of the adapters; name another place")
    files = {}
    for name, path in paths.items():
        files[name] = formats.load(path, config.allow_pickle)
        yield from (Note(f"adapter '{name}': {line}") for line in files[name].notes)
    _require_known(strengths, files)
    parts = [Part(name, files[name], _weight(strengths[name])) for name in sorted(files)]
    if config.base is None:
        yield from _into_adapter(config, parts, strengths)
    else:
        yield from _into_base(config, config.base, parts, paths)


def _into_adapter(config: MergeConfig, parts: list[Part], strengths: dict[str, Strength]) -> Iterator[Record]:
    to = config.to or format_of(parts[0].adapter)
    check_destination(config.output, to, config.overwrite)
    dtype = DTYPES[config.precision] if config.precision else None
    wanted = parts
    if config.method == "ziplora":
        parts = yield from _zipped(config, parts)
    method = "sum" if config.method == "ziplora" else config.method
    how = How(method, config.density, config.seed, Limits(config.rank, config.energy), dtype)
    merged, told = merge(parts, how)
    if wanted is not parts:
        told = _against(told, parts, wanted)
    save_proven(merged, config.output, to, config.tolerance)
    yield from map(Note, worst(told))
    values = {name: strengths[name].value for name in sorted(strengths)}
    report = MergeReport(config.output, to, config.method, values, _whole(told), tuple(told))
    if config.report is not None:
        write_text(config.report, json.dumps(report.as_json(), indent=2) + "\n")
    yield Done(report, report.verdict)


def _zipped(config: MergeConfig, parts: list[Part]) -> Generator[Record, None, list[Part]]:
    """Return the parts with learned factors in their columns."""
    device = pick_device("auto")
    family = load_family(config.learn_on or None, torch.float32, device)
    for item in learn(family, parts, config.prompts, ZipOptions(config.steps, seed=config.seed)):
        if isinstance(item, list):
            return item
        yield item
    raise AssertionError("learning ends with the parts")


def _against(told: list[MergedModule], made: list[Part], wanted: list[Part]) -> list[MergedModule]:
    """Return what became of each layer against the sum of `wanted`, which are `made` with other factors."""
    taken = [Part(f"{part.name} taken away", part.adapter, lambda module: -1.0) for part in wanted]
    _, asked = merge(wanted)
    _, apart = merge([*made, *taken])
    norms = {item.name: (one.wanted, item.wanted) for one, item in zip(asked, apart, strict=True)}
    return [replace(item, wanted=norms[item.name][0], apart=norms[item.name][1]) for item in told]


def _into_base(config: MergeConfig, base: Path, parts: list[Part], paths: dict[str, Path]) -> Iterator[Record]:
    output = config.output
    if output.exists() and not config.overwrite:
        raise ConfigError(f"output: {output} exists; choose another, or set overwrite")
    if output.resolve() == base.resolve() or base.resolve() in output.resolve().parents:
        raise ConfigError(f"output: {output} is, or is in, the base itself; name another place")
    if base.is_file() and output.suffix != ".safetensors":
        raise ConfigError(f"output: {base} is one file, so {output} has to be named *.safetensors")
    report: dict[str, Any] = {"base": str(base), "destination": str(output)}
    for item in merge_into(base, parts, paths, output):
        if isinstance(item, dict):
            report |= item
        else:
            yield item
    if config.report is not None:
        write_text(config.report, json.dumps(report, indent=2) + "\n")
    names = ", ".join(part.name for part in parts)
    yield Done(report, f"merged {names} into {report['tensors']} tensors of {base}: {output}")


def format_of(adapter: AdapterFile) -> str:
    """Return the format of the file that an adapter is from, or kohya where that is only read."""
    name = adapter.source.format
    return name if name is not None and name in FORMATS and FORMATS[name].writable else "kohya"


def worst(told: Sequence[Any]) -> Iterator[str]:
    """Say which modules have the largest relative `error`."""
    lossy = sorted((item for item in told if item.error > ROUNDING), key=lambda item: -item.error)
    if lossy:
        shown = ", ".join(f"{item.name} {item.error:.2g}" for item in lossy[:SHOWN])
        yield f"largest relative errors of {len(lossy)} modules: {shown}"


def _whole(told: Sequence[MergedModule]) -> float:
    wanted = math.hypot(*(module.wanted for module in told))
    apart = math.hypot(*(module.apart for module in told))
    return apart / wanted if wanted else apart


def _weight(strength: Strength) -> Any:
    def weight(module: AdapterModule) -> float:
        return strength.on(module.component, module.layer)

    return weight


def _require_known(strengths: dict[str, Strength], files: dict[str, AdapterFile]) -> None:
    """Raise `ConfigError` when a strength names components or layers that its adapter does not have."""
    for name, strength in strengths.items():
        layers: dict[str, list[str]] = {}
        for module in files[name].modules:
            layers.setdefault(module.component, []).append(module.layer)
        strength.require_known(name, layers)
