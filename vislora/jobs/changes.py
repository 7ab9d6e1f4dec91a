"""What `vislora convert` changes when it is asked to: plain LoRA, unused ranks dropped. And what it says of that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from vislora.algebra.compact import compact
from vislora.algebra.low_rank import Limits
from vislora.algebra.to_lora import Conversion, Kept, to_lora
from vislora.config.convert import ConvertConfig
from vislora.formats.adapter_file import AdapterFile
from vislora.records import Note

ROUNDING = 1e-6
SHOWN = 5


@dataclass
class Changes:
    """What became of an adapter. `verdict`: in a few words, '' for no change; `modules`: for the report, by name."""

    adapter: AdapterFile
    verdict: str = ""
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)


def changed(adapter: AdapterFile, config: ConvertConfig) -> Changes:
    """Return what `config` asks to be made of `adapter`, which is what its file has to mean afterwards."""
    changes = Changes(adapter)
    if config.as_ == "lora":
        _as_lora(changes, config)
    if config.compact:
        changes.adapter, dropped = compact(changes.adapter)
        if dropped:
            shown = f"{dropped[0].name} from rank {dropped[0].before} to {dropped[0].after}"
            changes.notes.append(Note(f"{len(dropped)} modules need less than their rank (first: {shown})"))
    return changes


def _as_lora(changes: Changes, config: ConvertConfig) -> None:
    changes.adapter, told = to_lora(changes.adapter, Limits(config.rank, config.energy))
    made = [item for item in told if isinstance(item, Conversion)]
    changes.notes += [Note(text, "warning") for text in _kept([item for item in told if isinstance(item, Kept)])]
    if not made:
        return
    for item in made:
        entry = {"kind": item.kind, "rank": item.rank, "error": item.error, "reduced": item.reduced}
        changes.modules[item.name] = entry
    changes.verdict = _verdict(made)
    changes.notes += [Note(text) for text in _worst(made)]


def _kept(modules: Sequence[Kept]) -> Iterator[str]:
    reasons: dict[str, list[str]] = {}
    for module in modules:
        reasons.setdefault(module.reason, []).append(module.name)
    for reason, names in reasons.items():
        yield f"{len(names)} modules stay as they are: {reason} (first: {names[0]})"


def _verdict(made: Sequence[Conversion]) -> str:
    """Return `12 modules as plain LoRA, exact`, or with the error that they have."""
    reduced = [item for item in made if item.reduced]
    largest = max((item.error for item in made if not item.reduced), default=0.0)
    if not reduced:
        exactly = "exact" if largest == 0.0 else f"exact but for rounding ({largest:.1g} of a module)"
        return f"{len(made)} modules as plain LoRA, {exactly}"
    errors = [item.error for item in reduced]
    text = f"{len(made)} modules as plain LoRA, {len(reduced)} of them reduced: relative error {fmean(errors):.2g} "
    return f"{text}on average, {max(errors):.2g} at most"


def _worst(made: Sequence[Conversion]) -> Iterator[str]:
    lossy = sorted((item for item in made if item.error > ROUNDING), key=lambda item: -item.error)
    if lossy:
        shown = ", ".join(f"{item.name} {item.error:.2g} (rank {item.rank})" for item in lossy[:SHOWN])
        yield f"largest relative errors of {len(lossy)} reduced modules: {shown}"
