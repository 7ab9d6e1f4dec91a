"""Merging adapters into a base on the disk: its weights plus the sum of the changes, rounded once.

The base is copied, and only the tensors that change are written anew, one at a time: type and shape stay, so all else
of a file does. Every change is made from the untouched weight, whatever else is merged, as in the runtime.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from vislora.algebra.merge import Part
from vislora.errors import AdapterFileError, AdapterMismatchError, ConfigError, ModelError, listed
from vislora.files import content_hash, replacing
from vislora.formats.adapter_file import AdapterFile, AdapterModule
from vislora.formats.checkpoints import Checkpoint, Stored, open_checkpoint
from vislora.formats.comfy import COMFY, DENOISER
from vislora.formats.tensor_file import mapped
from vislora.formats.writing import lay_out
from vislora.records import Progress

NOTE = "vislora-merge.json"
WIDE = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Change:
    """What one adapter does to one stored tensor: the `slot` of `module`, times `weight`."""

    adapter: str
    module: AdapterModule
    weight: float
    slot: str


Changes = dict[Stored, list[Change]]


def merge_into(
    base: Path, parts: Sequence[Part], paths: Mapping[str, Path], output: Path
) -> Iterator[Progress | dict[str, int]]:
    """Write `base` with the adapters merged in to `output`; yields progress, and at the end how many tensors changed.

    Raises `AdapterMismatchError` for what has no place in the base; then nothing is written.
    """
    checkpoint = open_checkpoint(base)
    changes = placed(checkpoint, parts)
    with replacing(output) as temporary:
        if checkpoint.is_file:
            shutil.copyfile(base, temporary)
        else:
            shutil.copytree(base, temporary)
        yield from _write(checkpoint, changes, temporary)
        note = temporary / NOTE if temporary.is_dir() else None
        if note is not None:
            note.write_text(provenance(base, parts, paths), encoding="utf-8")
    if checkpoint.is_file:
        with replacing(output.with_name(f"{output.name}.{NOTE}")) as temporary:
            temporary.write_text(provenance(base, parts, paths), encoding="utf-8")
    yield {"tensors": len(changes), "modules": sum(len(found) for found in changes.values())}


def provenance(base: Path, parts: Sequence[Part], paths: Mapping[str, Path]) -> str:
    """Return what was merged, as JSON."""
    rows = [
        {
            "name": part.name,
            "file": paths[part.name].name,
            "sha256": content_hash(paths[part.name]),
            "strengths": sorted({part.weight(module) for module in part.adapter.modules}),
        }
        for part in parts
    ]
    return json.dumps({"base": base.name, "adapters": rows}, indent=2) + "\n"


def placed(checkpoint: Checkpoint, parts: Sequence[Part]) -> Changes:
    """Return what changes each stored tensor. Raises `AdapterMismatchError` with all that has no place."""
    changes: Changes = {}
    lost: list[str] = []
    for change in (change for part in sorted(parts, key=lambda part: part.name) for change in _of(checkpoint, part)):
        module = change.module
        places = checkpoint.layers.get((module.component, module.path or "", change.slot), [])
        problem = _misfit(module, change.slot, places[0]) if places else "is not in the base"
        lost += [f"{change.adapter}: {module.name}.{change.slot} {problem}"] if problem else []
        for place in places:
            changes.setdefault(place, []).append(change)
    if lost:
        raise AdapterMismatchError(listed(f"{len(lost)} of the changes have no place in {checkpoint.path}:", lost, 5))
    if not changes:
        raise ConfigError("nothing to merge: every strength is 0")
    return changes


def _of(checkpoint: Checkpoint, part: Part) -> Iterator[Change]:
    """Yield all that an adapter changes."""
    _require_family(checkpoint, part)
    for weight, modules in _by_weight(part).items():
        for module in _named_as_stored(checkpoint, replace(part.adapter, modules=modules)):
            yield from (Change(part.name, module, weight, slot) for slot in _slots(module))


def _require_family(checkpoint: Checkpoint, part: Part) -> None:
    family = part.adapter.family
    if family and checkpoint.family and family != checkpoint.family:
        raise AdapterMismatchError(f"'{part.name}' is for '{family}', {checkpoint.path} is a '{checkpoint.family}'")
    odd = [*part.adapter.embeddings, *part.adapter.extras]
    if odd:
        raise AdapterFileError(f"'{part.name}' holds '{odd[0]}', which has no place in a base; convert it without that")


def _by_weight(part: Part) -> dict[float, list[AdapterModule]]:
    found: dict[float, list[AdapterModule]] = {}
    for module in part.adapter.modules:
        weight = part.weight(module)
        if weight:
            found.setdefault(weight, []).append(module)
    return found


def _named_as_stored(checkpoint: Checkpoint, adapter: AdapterFile) -> Iterator[AdapterModule]:
    """Yield the modules under the names that the base has for their layers, fused where it fuses."""
    if not checkpoint.is_file:
        yield from adapter.modules
        return
    yield from (module for module in adapter.modules if module.component != "denoiser")
    denoiser = [module for module in adapter.modules if module.component == "denoiser"]
    for stored in lay_out(denoiser, COMFY, checkpoint.family):
        yield AdapterModule(
            component="denoiser",
            path=stored.name.removeprefix(DENOISER),
            algo=stored.algo,
            tensors=stored.tensors,
            alpha=stored.alpha,
            rule="none" if stored.rule == "own" else stored.rule,  # type: ignore[arg-type]
            magnitude=stored.magnitude,
            magnitude_axis=stored.magnitude_axis,  # type: ignore[arg-type]
            bias=stored.bias,
        )


def _slots(module: AdapterModule) -> list[str]:
    return [*([] if module.only_bias else ["weight"]), *([] if module.bias is None else ["bias"])]


def _misfit(module: AdapterModule, slot: str, place: Stored) -> str:
    if place.info.dtype not in WIDE:
        return f"is kept as {place.info.dtype}, which has too few bits to add to"
    if slot == "bias":
        assert module.bias is not None
        wanted = tuple(module.bias.shape)
        return "" if wanted == place.shape else f"is {list(wanted)}, the base has {list(place.shape)}"
    known = [side for side in module.shape if side != -1]
    fits = module.shape[0] in (-1, place.shape[0]) and len(known) <= len(place.shape)
    return "" if fits else f"is {list(module.shape)}, the base has {list(place.shape)}"


def _write(checkpoint: Checkpoint, changes: Changes, temporary: Path) -> Iterator[Progress]:
    """Write the changed tensors into the copy; each has to read back as it was written."""
    by_file: dict[Path, dict[str, list[Stored]]] = {}
    for place in changes:
        by_file.setdefault(place.file, {}).setdefault(place.key, []).append(place)
    done, total = 0, sum(len(keys) for keys in by_file.values())
    for file, keys in by_file.items():
        target = temporary if checkpoint.is_file else temporary / file.relative_to(checkpoint.path)
        with ExitStack() as stack, open(target, "r+b") as copy:
            read = mapped(file, stack)
            for places in keys.values():
                info = places[0].info
                made = merged(read(info), {place.rows: changes[place] for place in places})
                _put(copy, info.start, made, places[0].key)
                done += 1
                yield Progress(f"merging into {checkpoint.path.name}", done, total)


def _put(file: BinaryIO, start: int, tensor: Tensor, key: str) -> None:
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    file.seek(start)
    file.write(data)
    file.seek(start)
    if file.read(len(data)) != data:
        raise ModelError(f"'{key}' does not read back as it was written: is the disk failing?")


def merged(weight: Tensor, changes: Mapping[tuple[int, int] | None, Sequence[Change]]) -> Tensor:
    """Return `weight` with the changes of its rows added in float64 and rounded once to its own type."""
    total = weight.to(torch.float64)
    for rows, found in changes.items():
        part = slice(None) if rows is None else slice(*rows)
        base = weight[part].to(torch.float64)
        total[part] += torch.stack([_delta(change, base) for change in found]).sum(0)
    rounded = total.to(weight.dtype)
    if not torch.isfinite(rounded).all():
        names = ", ".join(sorted({change.adapter for found in changes.values() for change in found}))
        raise ModelError(f"the merged weight is not finite in {weight.dtype}: {names}; use smaller strengths, or fp32")
    return rounded


def _delta(change: Change, base: Tensor) -> Tensor:
    if change.slot == "bias":
        bias = change.module.bias_delta()
        assert bias is not None
        return change.weight * bias.reshape(base.shape)
    return change.weight * AdapterFile(modules=[]).delta(change.module, base).reshape(base.shape)
