"""Load an adapter: parse its keys, check it, read its tensors."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from vislora.algorithms.base import Rule
from vislora.algorithms.dora import Axis
from vislora.errors import AdapterFileError, listed
from vislora.formats.adapter_file import AdapterFile, AdapterModule, BiasRule, SourceInfo, taken
from vislora.formats.checks import problems
from vislora.formats.detect import ParsedFile, parse_file, unknown_file
from vislora.formats.embeddings import embedding_name, loose_slots
from vislora.formats.header import BITS, TensorInfo
from vislora.formats.parsed import ParsedModule, Ref
from vislora.formats.split_qkv import split_notes
from vislora.formats.tensor_file import Read, copied, is_finite, mapped


@contextmanager
def uncollected() -> Iterator[None]:
    """Let Python's garbage collector wait: thousands of new objects that stay make it go through all of torch's."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@uncollected()
def load(path: str | Path, allow_pickle: bool = False) -> AdapterFile:
    """Read an adapter of any known format: a .safetensors file, a PEFT folder, and a pickle when that is allowed.

    Every tensor of it is in a module, an embedding or `extras`; all stay in the file until they are used, and a file
    that is replaced by renaming, as `save` does, stays readable. Raises `AdapterFileError` when it is unreadable, no
    adapter, incomplete, contradicts itself or holds numbers that are not finite.
    """
    parsed = _sound(path, allow_pickle)
    with ExitStack() as stack:
        reader = _Reader(mapped, stack)
        modules = _unique(parsed.path, ((item, _module(item, reader)) for item in parsed.modules))
        frame = _frame(parsed, reader)
        reader.check(parsed.path)
        return replace(frame, modules=modules, notes=[*frame.notes, *split_notes(modules)])


def load_embedding(path: str | Path, allow_pickle: bool = False) -> dict[str, dict[str, Tensor]]:
    """Read a textual inversion embedding: word -> slot (`emb_params`, `clip_l`, `clip_g`) -> vectors.

    The words are the tokens that the file names (`<cat-toy>`, as diffusers writes them), else there is one, its stem.
    Raises `AdapterFileError` when it is unreadable, no embedding, or holds numbers that are not finite.
    """
    parsed = parse_file(path, allow_pickle)
    refs = [*parsed.embeddings, *parsed.extras]
    slots = loose_slots([ref.key for ref in refs])
    if parsed.modules or not slots:
        raise AdapterFileError(f"{path}: this is no textual inversion embedding; an adapter goes to --adapter")
    with ExitStack() as stack:
        reader = _Reader(copied, stack)
        found: dict[str, dict[str, Tensor]] = {}
        for ref, (token, slot) in zip(refs, slots, strict=True):
            found.setdefault(token or parsed.path.stem, {})[slot] = reader.read(ref)
        reader.check(parsed.path)
    return found


@contextmanager
def streamed(path: str | Path) -> Iterator[tuple[AdapterFile, Iterator[AdapterModule]]]:
    """Open an adapter to read it in pieces, one module at a time in memory: all but the modules, and each of them.

    Raises `AdapterFileError` as `load` does, but two modules for one layer are both given, and their numbers are not
    looked at: this is for comparing an adapter with another.
    """
    parsed = _sound(path)
    with ExitStack() as stack:
        reader = _Reader(copied, stack)
        frame = _frame(parsed, reader)
        yield frame, _one_by_one(parsed, reader)


def _one_by_one(parsed: ParsedFile, reader: _Reader) -> Iterator[AdapterModule]:
    for item in parsed.modules:
        reader.forget()
        yield _module(item, reader)


def _sound(path: str | Path, allow_pickle: bool = False) -> ParsedFile:
    parsed = parse_file(path, allow_pickle)
    if not any(module.path or module.uncut for module in parsed.modules):
        raise unknown_file(parsed)
    faults = problems(parsed.modules)
    if faults:
        title = f"{path}: {len(faults)} of its {len(parsed.modules)} modules are damaged"
        raise AdapterFileError(listed(f"{title}{_foreign(parsed)}:", faults))
    return parsed


def _foreign(parsed: ParsedFile) -> str:
    """Return a hint where modules have tensors of no known kind."""
    names = {module.raw_name for module in parsed.modules}
    first = next((ref.key for ref in parsed.extras if ref.key.rpartition(".")[0] in names), None)
    return f", or of a kind whose package is not installed ('{first}' is of no known one)" if first else ""


def _frame(parsed: ParsedFile, reader: _Reader) -> AdapterFile:
    """Return all of an adapter but its modules."""
    embeddings: dict[str, dict[str, Tensor]] = {}
    for ref in parsed.embeddings:
        name, slot = embedding_name(ref.key)
        embeddings.setdefault(name, {})[slot] = reader.read(ref)
    extras = {ref.key: reader.read(ref) for ref in parsed.extras}
    return AdapterFile(
        modules=[],
        family=parsed.family,
        metadata=parsed.metadata,
        embeddings=embeddings,
        extras=extras,
        source=SourceInfo(parsed.path, parsed.format),
        notes=parsed.notes,
    )


class _Reader:
    """Reads every tensor once, however many modules share it."""

    def __init__(self, opened: Callable[[Path, ExitStack], Read], stack: ExitStack) -> None:
        self._opened, self._stack = opened, stack
        self._files: dict[Path, Read] = {}
        self._tensors: dict[tuple[Path, str], Tensor] = {}
        self._mapped: dict[tuple[Path, str], TensorInfo] = {}

    def read(self, ref: Ref) -> Tensor:
        """Return the tensor that `ref` stands for."""
        tensor = self._whole(ref)
        if not ref.rows:
            return tensor
        return taken(tensor, ref.axis, ref.rows)

    def forget(self) -> None:
        """Give up the tensors that were read so far."""
        self._tensors.clear()
        self._mapped.clear()

    def check(self, path: Path) -> None:
        """Raise `AdapterFileError` when tensors that were read are not finite."""
        if all(is_finite(numbers) for numbers in self._runs()):
            return
        odd = sorted({key for (_, key), tensor in self._tensors.items() if not is_finite(tensor)})
        if odd:
            title = f"{path}: {len(odd)} tensors hold numbers that are not finite (NaN or infinite):"
            raise AdapterFileError(listed(title, odd))

    def _runs(self) -> Iterator[Tensor]:
        """Yield all that was read: of a mapped file neighbours of one type as one, for a file has thousands."""
        infos: dict[Path, list[TensorInfo]] = {}
        for place, tensor in self._tensors.items():
            if place in self._mapped:
                infos.setdefault(place[0], []).append(self._mapped[place])
            else:
                yield tensor
        for path, found in infos.items():
            found.sort(key=lambda info: info.start)
            first = found[0]
            for info, following in zip(found, [*found[1:], None], strict=True):
                if following is None or (following.start, following.dtype) != (info.end, info.dtype):
                    count = (info.end - first.start) * 8 // BITS[info.dtype]
                    yield self._files[path](TensorInfo(info.dtype, (count,), first.start, info.end))
                    first = following or first

    def _whole(self, ref: Ref) -> Tensor:
        place = ref.part.path, ref.key
        if place not in self._tensors:
            try:
                if ref.part.path not in self._files:
                    opened = copied if ref.part.copy else self._opened  # a temporary copy is deleted soon
                    self._files[ref.part.path] = opened(ref.part.file, self._stack)
                info = ref.part.header.tensors[ref.key]
                tensor = self._files[ref.part.path](info)
                if self._opened is mapped and not ref.part.copy:
                    self._mapped[place] = info
            except (OSError, RuntimeError, ValueError) as error:
                raise AdapterFileError(f"{ref.part.path}: '{ref.key}' cannot be read: {error}") from error
            self._tensors[place] = tensor
        return self._tensors[place]


def _module(item: ParsedModule, reader: _Reader) -> AdapterModule:
    return AdapterModule(
        component=item.component,
        path=item.path,
        algo=item.algo,
        tensors={**{slot: reader.read(ref) for slot, ref in item.refs.items()}, **_numbers(item)},
        alpha=item.alpha,
        rule=cast(Rule, item.rule),
        raw_name=item.raw_name,
        magnitude=reader.read(item.magnitude) if item.magnitude else None,
        magnitude_axis=cast("Axis | None", item.magnitude_axis),
        bias=reader.read(item.bias) if item.bias else None,
        bias_rule=cast(BiasRule, item.bias_rule),
        target=item.target,
        group=item.group,
        uncut=item.uncut,
        notes=item.notes,
    )


def _numbers(item: ParsedModule) -> dict[str, Tensor]:
    return {slot: torch.tensor(number, dtype=torch.float64) for slot, number in item.numbers.items()}


def _unique(path: Path, pairs: Iterable[tuple[ParsedModule, AdapterModule]]) -> list[AdapterModule]:
    """Drop a module that stands twice under two names; two that differ are an error, for either could be meant."""
    kept: dict[tuple[str, str], tuple[ParsedModule, AdapterModule]] = {}
    clashes = []
    for item, module in pairs:
        first, other = kept.setdefault((module.component, module.layer), (item, module))
        if other is module:
            continue
        if _equal(other, module):
            other.notes.append(f"'{module.raw_name}' repeats '{other.raw_name}'")
        else:
            one, two = _differing_keys(first, other, item, module)
            clashes.append(f"'{one}' and '{two}' ({module.name})")
    if clashes:
        raise AdapterFileError(listed(f"{path}: two modules are for the same layer and differ:", clashes))
    return [module for _, module in kept.values()]


def _differing_keys(
    first_item: ParsedModule, first: AdapterModule, second_item: ParsedModule, second: AdapterModule
) -> tuple[str, str]:
    """Return the keys of the first tensors that differ, else of the alphas, else the modules' names."""
    for slot in first.tensors.keys() & second.tensors.keys():
        if not _same(first.tensors[slot], second.tensors[slot]):
            return first_item.refs[slot].key, second_item.refs[slot].key
    return first_item.alpha_key or first.raw_name, second_item.alpha_key or second.raw_name


def _equal(first: AdapterModule, second: AdapterModule) -> bool:
    if first.tensors.keys() != second.tensors.keys() or _rules(first) != _rules(second):
        return False
    pairs = [(tensor, second.tensors[slot]) for slot, tensor in first.tensors.items()]
    pairs += [
        (a, b)
        for a, b in ((first.magnitude, second.magnitude), (first.bias, second.bias))
        if a is not None and b is not None
    ]
    both = (first.magnitude is None) == (second.magnitude is None) and (first.bias is None) == (second.bias is None)
    return both and all(_same(a, b) for a, b in pairs)


def _rules(module: AdapterModule) -> tuple[object, ...]:
    """Return the scale and the rules: an alpha that is the rank and one that is not written down are the same."""
    scale = (module.alpha, module.rule) if module.unsupported or module.only_bias else module.scale
    return scale, module.magnitude_axis, module.bias_rule


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)
