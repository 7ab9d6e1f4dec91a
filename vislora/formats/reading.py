"""Load an adapter: parse its keys, check it, read its tensors."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vislora.algorithms.base import Rule
from vislora.algorithms.dora import Axis
from vislora.errors import AdapterFileError, listed
from vislora.formats.adapter_file import AdapterFile, AdapterModule, SourceInfo
from vislora.formats.checks import problems
from vislora.formats.detect import BUNDLE, parse_file, unknown_file
from vislora.formats.parsed import ParsedModule, Ref

EMBEDDING_SLOTS = ("string_to_param", "emb_params", "clip_l_out", "clip_g_out", "clip_l", "clip_g", "t5")


def load(path: str | Path) -> AdapterFile:
    """Read an adapter of any known format: a .safetensors file, or a PEFT folder.

    Every tensor of it is in a module, an embedding or `extras`. Raises `AdapterFileError` when it is unreadable, no
    adapter, incomplete, contradicts itself or holds numbers that are not finite.
    """
    parsed = parse_file(path)
    if not any(module.path for module in parsed.modules):
        raise unknown_file(parsed)
    faults = problems(parsed.modules)
    if faults:
        raise AdapterFileError(
            listed(f"{path}: {len(faults)} of its {len(parsed.modules)} modules are damaged:", faults)
        )
    with ExitStack() as stack:
        reader = _Reader(stack)
        modules = _unique([_module(item, reader) for item in parsed.modules])
        embeddings: dict[str, dict[str, Tensor]] = {}
        for ref in parsed.embeddings:
            name, slot = _embedding_name(ref.key)
            embeddings.setdefault(name, {})[slot] = reader.read(ref)
        extras = {ref.key: reader.read(ref) for ref in parsed.extras}
    if reader.not_finite:
        title = f"{path}: {len(reader.not_finite)} tensors hold numbers that are not finite (NaN or infinite):"
        raise AdapterFileError(listed(title, sorted(reader.not_finite)))
    return AdapterFile(
        modules=modules,
        family=parsed.family,
        metadata=parsed.metadata,
        embeddings=embeddings,
        extras=extras,
        source=SourceInfo(Path(path), parsed.format),
        notes=parsed.notes,
    )


class _Reader:
    """Reads every tensor once, however many modules share it, and remembers those that are not finite."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._files: dict[Path, Any] = {}
        self._tensors: dict[tuple[Path, str], Tensor] = {}
        self.not_finite: set[str] = set()

    def read(self, ref: Ref) -> Tensor:
        tensor = self._whole(ref)
        if not ref.rows:
            return tensor
        parts = [tensor[start:stop] for start, stop in ref.rows]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _whole(self, ref: Ref) -> Tensor:
        place = ref.part.path, ref.key
        if place not in self._tensors:
            try:
                if ref.part.path not in self._files:
                    self._files[ref.part.path] = self._stack.enter_context(safe_open(ref.part.path, "pt"))
                tensor = self._files[ref.part.path].get_tensor(ref.key)
            except (SafetensorError, OSError, RuntimeError, ValueError) as error:
                raise AdapterFileError(f"{ref.part.path}: '{ref.key}' cannot be read: {error}") from error
            if tensor.is_floating_point() and not _finite(tensor):
                self.not_finite.add(ref.key)
            self._tensors[place] = tensor
        return self._tensors[place]


def _finite(tensor: Tensor) -> bool:
    wide = tensor if tensor.element_size() > 1 else tensor.to(torch.float32)
    return bool(torch.isfinite(wide).all())


def _module(item: ParsedModule, reader: _Reader) -> AdapterModule:
    return AdapterModule(
        component=item.component,
        path=item.path,
        algo=item.algo,
        tensors={slot: reader.read(ref) for slot, ref in item.refs.items()},
        alpha=item.alpha,
        rule=cast(Rule, item.rule),
        raw_name=item.raw_name,
        magnitude=reader.read(item.magnitude) if item.magnitude else None,
        magnitude_axis=cast("Axis | None", item.magnitude_axis),
        bias=reader.read(item.bias) if item.bias else None,
        target=item.target,
        group=item.group,
        notes=item.notes,
    )


def _unique(modules: Iterable[AdapterModule]) -> list[AdapterModule]:
    """Drop a module that stands twice under two names; two that differ are an error, for either could be meant."""
    kept: dict[tuple[str, str], AdapterModule] = {}
    clashes = []
    for module in modules:
        key = module.component, module.path or module.raw_name
        other = kept.setdefault(key, module)
        if other is module:
            continue
        if _equal(other, module):
            other.notes.append(f"'{module.raw_name}' repeats '{other.raw_name}'")
        else:
            clashes.append(f"'{other.raw_name}' and '{module.raw_name}' ({module.name})")
    if clashes:
        raise AdapterFileError(listed("two modules of the file are for the same layer and differ:", clashes))
    return list(kept.values())


def _equal(first: AdapterModule, second: AdapterModule) -> bool:
    if first.tensors.keys() != second.tensors.keys() or (first.alpha, first.rule) != (second.alpha, second.rule):
        return False
    pairs = [(tensor, second.tensors[slot]) for slot, tensor in first.tensors.items()]
    pairs += [
        (a, b)
        for a, b in ((first.magnitude, second.magnitude), (first.bias, second.bias))
        if a is not None and b is not None
    ]
    both = (first.magnitude is None) == (second.magnitude is None) and (first.bias is None) == (second.bias is None)
    return both and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def _embedding_name(key: str) -> tuple[str, str]:
    """Split `bundle_emb.my.style.string_to_param.*` into ('my.style', 'string_to_param.*'); a name may hold dots."""
    rest = key.removeprefix(BUNDLE)
    for slot in EMBEDDING_SLOTS:
        name, found, tail = rest.rpartition(f".{slot}")
        if found:
            return name, slot + tail
    name, _, slot = rest.rpartition(".")
    return name or rest, slot
