"""Say what an adapter file is and holds, from its headers alone: no tensor is read, no torch imported."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vislora.config.inspect import InspectConfig
from vislora.formats.checks import problems
from vislora.formats.detect import ParsedFile, parse_file
from vislora.formats.other_things import looks_like
from vislora.formats.parsed import ParsedModule, Ref
from vislora.formats.slots import CORES, NO_SCALE
from vislora.records import Done, Record

LONGEST_VALUE = 100
# slots whose rows are the rank
RANKS = ("down", "embedding_down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b", "a2")


@dataclass
class FileSummary:
    """What is known of a file. `what`: in words; `format` is None when it is no adapter; sizes in bytes."""

    path: Path
    what: str
    format: str | None
    family: str | None
    size: int
    parameters: int
    components: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, int] = field(default_factory=dict)
    dtypes: dict[str, int] = field(default_factory=dict)
    embeddings: list[str] = field(default_factory=list)
    extras: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    modules: list[dict[str, Any]] = field(default_factory=list)


def inspect(path: str | Path, allow_pickle: bool = False) -> FileSummary:
    """Summarise the adapter at `path`. Raises `AdapterFileError` when its headers cannot be read at all."""
    parsed = parse_file(path, allow_pickle)
    modules = parsed.modules
    refs = [ref for module in modules for ref in _refs(module)] + parsed.embeddings + parsed.extras
    distinct = {(ref.part.path, ref.key): ref for ref in refs}
    return FileSummary(
        path=Path(path),
        what=_what(parsed),
        format=parsed.format,
        family=parsed.family,
        size=sum(part.path.stat().st_size for part in parsed.parts),
        parameters=sum(part.header.tensors[key].count for part in parsed.parts for key in part.header.tensors),
        components=_histogram(module.component for module in modules),
        kinds=_histogram(_kind(module) for module in modules),
        ranks=_histogram(_rank(module) for module in modules if _rank(module) is not None),
        alphas=_histogram(_alpha(module) for module in modules if module.algo not in NO_SCALE),
        dtypes=_histogram(ref.dtype for ref in distinct.values()),
        embeddings=[ref.key for ref in parsed.embeddings],
        extras=[ref.key for ref in parsed.extras],
        problems=problems(modules),
        notes=parsed.notes,
        metadata=parsed.metadata,
        modules=[_details(module) for module in modules],
    )


def run(config: InspectConfig) -> Iterator[Record]:
    """Inspect as `config` says. The exit code is 1 when the file is damaged as an adapter."""
    summary = inspect(config.path, config.allow_pickle)
    text = json.dumps(as_json(summary), indent=2) if config.json else as_text(summary, config.metadata)
    yield Done(summary, text, 1 if summary.problems else 0)


def as_json(summary: FileSummary) -> dict[str, Any]:
    """Return the summary as JSON values."""
    return {**vars(summary), "path": str(summary.path)}


def as_text(summary: FileSummary, metadata: bool = True) -> str:
    """Return the summary as a table for people."""
    rows = [
        ("file", str(summary.path)),
        ("this is", summary.what),
        ("format", summary.format or "-"),
        ("family", summary.family or "unknown"),
        ("size", f"{summary.size:,} bytes, {summary.parameters:,} parameters"),
        ("modules", _counts(summary.components)),
        ("kinds", _counts(summary.kinds)),
        ("ranks", _counts(summary.ranks)),
        ("alphas", _counts(summary.alphas)),
        ("dtypes", _counts(summary.dtypes)),
        ("embeddings", ", ".join(summary.embeddings)),
        ("not placed", ", ".join(summary.extras[:5]) + (" ..." if len(summary.extras) > 5 else "")),
        *(("problem", line) for line in summary.problems),
        *(("note", line) for line in summary.notes[:20]),
    ]
    lines = [f"{name:<11} {value}" for name, value in rows if value]
    if metadata and summary.metadata:
        lines += ["metadata", *(f"  {key}: {_short(value)}" for key, value in sorted(summary.metadata.items()))]
    return "\n".join(lines)


def _what(parsed: ParsedFile) -> str:
    resolved = sum(1 for module in parsed.modules if module.tree_name)
    if resolved:
        return f"an adapter with {len(parsed.modules)} modules"
    if parsed.modules:
        return f"an adapter, none of whose {len(parsed.modules)} modules is a layer of a known model family"
    return looks_like([key for part in parsed.parts for key in part.header.tensors])


def _refs(module: ParsedModule) -> list[Ref]:
    return [ref for ref in (*module.refs.values(), module.magnitude, module.bias) if ref is not None]


def _kind(module: ParsedModule) -> str:
    tucker = " (Tucker)" if CORES & module.refs.keys() else ""
    sparse = " + sparse rest" if "bias_values" in module.refs else ""
    dora = f" + dora per {module.magnitude_axis}put" if module.magnitude else ""
    kind = "bias" if not module.refs and module.bias else f"{module.algo}{tucker}{sparse}{dora}"
    return f"{kind} + bias" if module.bias and module.refs else kind


def _rank(module: ParsedModule) -> int | None:
    """Return the rank that the slots tell, None for kinds without one and for what is damaged."""
    for slot in RANKS:
        if slot in module.refs and module.refs[slot].shape:
            return module.refs[slot].shape[0]
    return None


def _alpha(module: ParsedModule) -> str:
    if module.rule == "scale" or not {"lokr_w1", "lokr_w2"} <= module.refs.keys():
        return "rank" if module.alpha is None else f"{module.alpha:g}"
    return "ignored"


def _details(module: ParsedModule) -> dict[str, Any]:
    return {
        "component": module.component,
        "path": module.path,
        "raw_name": module.raw_name,
        "kind": _kind(module),
        "rank": _rank(module),
        "alpha": module.alpha,
        "rule": module.rule,
        "part_of": module.group,
        "slots": {slot: list(ref.shape) for slot, ref in module.refs.items()},
    }


def _histogram(values: Iterable[Any]) -> dict[str, int]:
    return {str(value): count for value, count in Counter(values).most_common()}


def _counts(histogram: dict[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in histogram.items())


def _short(value: str) -> str:
    line = " ".join(value.split())
    return line if len(line) <= LONGEST_VALUE else f"{line[:LONGEST_VALUE]}... ({len(value):,} characters)"
