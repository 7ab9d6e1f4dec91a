"""`vislora extract`: fine-tuned minus base, as an adapter, with the residual of every layer."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vislora.algebra.extract import Extracted, extract_layer, whole_layer
from vislora.algebra.low_rank import Limits, relative
from vislora.algebra.to_lora import parts_of_whole
from vislora.config.extract import ExtractConfig
from vislora.errors import AdapterMismatchError, ConfigError, listed, nearest
from vislora.files import write_text
from vislora.formats.adapter_file import AdapterFile, AdapterModule
from vislora.formats.checkpoints import Checkpoint, Layer, Stored, open_checkpoint
from vislora.formats.names import FAMILY_NAMES
from vislora.formats.tensor_file import mapped
from vislora.jobs.devices import DTYPES
from vislora.jobs.merge import worst
from vislora.jobs.proof import check_destination, save_proven
from vislora.records import Done, Note, Progress, Record, result


@dataclass(frozen=True)
class ExtractReport:
    """How an extraction went. error: of all layers together; whole: changed tensors that are kept whole.

    left: those that are not in the adapter.
    """

    destination: Path
    family: str | None
    error: float
    layers: tuple[Extracted, ...]
    whole: tuple[str, ...]
    left: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """Return the outcome in one line."""
        parts = [self._layers] if self.layers else []
        if self.whole:
            parts.append(f"{len(self.whole)} norms and biases whole")
        if self.left:
            parts.append(f"{len(self.left)} changed norms, biases or embeddings left out (--exact)")
        return f"{', '.join(parts)}; proven: {self.destination}"

    @property
    def _layers(self) -> str:
        ranks = sorted({layer.rank for layer in self.layers})
        shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        return f"{len(self.layers)} layers of rank {shown}, relative residual {self.error:.3g}"

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        rows = [{**asdict(layer), "error": layer.error} for layer in self.layers]
        fields = {"family": self.family, "error": self.error, "whole": list(self.whole), "left": list(self.left)}
        return {"destination": str(self.destination), **fields, "layers": rows}


def extract(tuned: str | Path, base: str | Path, output: str | Path, **settings: Any) -> ExtractReport:
    """Make an adapter of `tuned` minus `base`; `settings` are `ExtractConfig`'s.

    Raises a `VisloraError` for models that do not belong together; then nothing is written.
    """
    values = {"tuned": Path(tuned), "base": Path(base), "output": Path(output), **settings}
    report: ExtractReport = result(run(ExtractConfig.of(values)))
    return report


def run(config: ExtractConfig) -> Iterator[Record]:
    """Extract as `config` says; yields progress, the layers with the largest residuals, and a report."""
    check_destination(config.output, config.to, config.overwrite)
    tuned, base = open_checkpoint(config.tuned), open_checkpoint(config.base)
    pairs = _paired(tuned, base, _components(config, tuned))
    made = _Made([], [], [], [])
    with ExitStack() as stack:
        readers = {file: mapped(file, stack) for file in {place.file for pair in pairs.values() for place in pair}}
        for done, (layer, pair) in enumerate(pairs.items(), 1):
            change, share = _change(*(_read(readers, place) for place in pair))
            if share > config.least:
                _take(made, layer, change, config, tuned)
            if done % 20 == 0 or done == len(pairs):
                yield Progress("extracting", done, len(pairs))
    modules, layers, left = made.modules, made.layers, made.left
    if not modules:
        hint = f" (of {len(left)} norms, biases or embeddings that did change, --exact keeps norms and biases)"
        reason = f"differ in no layer: there is nothing to extract{hint if left else ''}"
        raise ConfigError(f"{config.tuned} and {config.base} {reason}")
    adapter = AdapterFile(modules=_joined(modules), family=tuned.family, metadata=_metadata(config))
    save_proven(adapter, config.output, config.to, 1e-6)
    yield from map(Note, worst(layers))
    if left:
        yield Note(f"{len(left)} changed norms, biases or embeddings are left out (first: {left[0]})", "warning")
    error = relative(math.hypot(*(item.apart for item in layers)), math.hypot(*(item.norm for item in layers)))
    report = ExtractReport(config.output, tuned.family, error, tuple(layers), tuple(made.whole), tuple(left))
    if config.report is not None:
        write_text(config.report, json.dumps(report.as_json(), indent=2) + "\n")
    yield Done(report, report.verdict)


@dataclass
class _Made:
    """What was made so far. whole, left: changed tensors that the adapter has as they are, and that it has not."""

    modules: list[AdapterModule]
    layers: list[Extracted]
    whole: list[str]
    left: list[str]


def _take(made: _Made, layer: Layer, change: Tensor, config: ExtractConfig, tuned: Checkpoint) -> None:
    """Put the change of one tensor into the adapter, or name it among what is left out."""
    component, name, slot = layer
    limits, dtype = Limits(config.rank, config.energy, config.ratio), DTYPES[config.precision]
    if slot == "weight" and change.dim() > 1 and not _is_embedding(name):
        module, told = extract_layer(component, name, change, limits, dtype)
        made.modules += _at_paths(module, tuned)
        made.layers.append(told)
    elif config.exact and not _is_embedding(name):
        made.modules += _at_paths(whole_layer(component, name, slot, change, dtype), tuned)
        made.whole.append(f"{component}: {name}.{slot}")
    else:
        made.left.append(f"{component}: {name}.{slot}")


def _components(config: ExtractConfig, tuned: Checkpoint) -> list[str]:
    """Return the components to look at. Raises `ConfigError` for one that the model does not have."""
    there = tuned.components()
    odd = [name for name in config.components if name not in there]
    if odd:
        raise ConfigError(f"components: no '{odd[0]}'{nearest(odd[0], there)}; {config.tuned} has: {', '.join(there)}")
    tables = FAMILY_NAMES[tuned.family].tables if tuned.family else there
    return list(config.components) or [name for name in there if name in tables]


def _paired(tuned: Checkpoint, base: Checkpoint, components: list[str]) -> dict[Layer, tuple[Stored, Stored]]:
    """Return both places of every tensor. Raises `AdapterMismatchError` for models that do not belong together."""
    if tuned.is_file != base.is_file:
        raise AdapterMismatchError("one of the models is a folder, the other a file: give both in one form")
    if tuned.family != base.family:
        raise AdapterMismatchError(f"{tuned.path} is a '{tuned.family}', {base.path} is a '{base.family}'")
    pairs = {}
    problems = []
    for layer, places in tuned.layers.items():
        if layer[0] not in components:
            continue
        other = base.layers.get(layer)
        if other is None:
            problems.append(f"{layer[0]}: {layer[1]}.{layer[2]} is not in the base")
        elif other[0].shape != places[0].shape:
            problems.append(f"{layer[0]}: {layer[1]}: {list(places[0].shape)}, in the base {list(other[0].shape)}")
        else:
            pairs[layer] = places[0], other[0]
    if problems:
        raise AdapterMismatchError(listed(f"{base.path} is not what {tuned.path} was tuned from:", problems, limit=5))
    return pairs


def _read(readers: dict[Path, Any], place: Stored) -> Tensor:
    tensor: Tensor = readers[place.file](place.info)
    return (tensor if place.rows is None else tensor[slice(*place.rows)]).to(torch.float32)


def _change(tuned: Tensor, base: Tensor) -> tuple[Tensor, float]:
    """Return the change and its size relative to the base."""
    change = tuned - base
    size = float(change.norm())
    return change, size / (float(base.norm()) or 1.0)


def _is_embedding(name: str) -> bool:
    return name.endswith(("token_embedding", "position_embedding", "embed_tokens", "shared"))


def _at_paths(module: AdapterModule, checkpoint: Checkpoint) -> list[AdapterModule]:
    """Return the module under reference names: cut into its parts where a single file fuses them."""
    if not checkpoint.is_file or module.component != "denoiser":
        return [module]
    whole = replace(module, path=None, group=module.path, uncut="fused", raw_name=module.path or "")
    return list(parts_of_whole(whole, checkpoint.family))


def _joined(modules: list[AdapterModule]) -> list[AdapterModule]:
    """Put a layer's weight and its bias into one module."""
    found: dict[tuple[str, str], AdapterModule] = {}
    for module in modules:
        key = module.component, module.layer
        first = found.get(key)
        if first is None:
            found[key] = module
        else:
            carrier, other = (module, first) if first.only_bias else (first, module)
            found[key] = replace(carrier, bias=other.bias)
    return list(found.values())


def _metadata(config: ExtractConfig) -> dict[str, str]:
    how = {"tuned": config.tuned.name, "base": config.base.name}
    how |= {name: value for name in ("rank", "energy", "ratio") if (value := getattr(config, name)) is not None}
    return {"vislora.extract": json.dumps(how)}
