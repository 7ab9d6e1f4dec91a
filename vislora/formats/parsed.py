"""What a file's keys, shapes and scalars say, before any tensor is read. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vislora.errors import AdapterFileError
from vislora.formats.header import Header, TensorInfo, read_scalar
from vislora.formats.slots import COMMON, kind_of, split_key


@dataclass(frozen=True)
class Slice:
    """Rows (`dim` 0) or columns of a fused weight: `length` of them from `start`."""

    dim: int
    start: int
    length: int


@dataclass(frozen=True)
class Part:
    """One safetensors file of an adapter. `folder`: its component's sub-folder; `config`: adapter_config.json."""

    path: Path
    header: Header
    folder: str = ""
    config: Mapping[str, Any] | None = None

    def scalar(self, key: str) -> float:
        """Read a tensor of one element."""
        return read_scalar(self.path, key, self.header.tensors[key])


@dataclass(frozen=True)
class Ref:
    """A tensor that has not been read. `rows`: which of its rows, in this order; empty means all."""

    part: Part
    key: str
    dtype: str
    shape: tuple[int, ...]
    rows: tuple[tuple[int, int], ...] = ()

    @staticmethod
    def of(part: Part, key: str) -> Ref:
        """Refer to the whole of a tensor."""
        info: TensorInfo = part.header.tensors[key]
        return Ref(part, key, info.dtype, info.shape)

    def taking(self, *rows: tuple[int, int]) -> Ref:
        """Refer to some rows, each given as (first, one past the last)."""
        count = sum(stop - start for start, stop in rows)
        return replace(self, shape=(count, *self.shape[1:]), rows=rows)


@dataclass
class ParsedModule:
    """An adapter module whose tensors are still in the file; the fields are those of `AdapterModule`."""

    component: str
    path: str | None
    raw_name: str
    algo: str
    refs: dict[str, Ref]
    alpha: float | None = None
    rule: str = "alpha/r"
    magnitude: Ref | None = None
    magnitude_axis: str | None = None
    bias: Ref | None = None
    target: Slice | None = None
    group: str | None = None
    family: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Return how to call this module in a message."""
        return f"{self.component}: {self.path}" if self.path else self.raw_name


def collect(part: Part, keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """Group keys by module: raw name -> slot -> key. Keys that end in no known slot are left out."""
    groups: dict[str, dict[str, str]] = {}
    for key in keys:
        found = split_key(key)
        if found is None:
            continue
        name, slot = found
        taken = groups.setdefault(name, {})
        # oft_blocks.0, .1, ... of a fused layer are several tensors of one slot
        slot = slot if slot not in taken or slot != "oft_blocks" else f"{slot}.{key.rsplit('.', 1)[-1]}"
        if slot in taken:
            raise AdapterFileError(f"{part.path}: '{taken[slot]}' and '{key}' are the same slot of one module")
        taken[slot] = key
    return groups


def module_of(part: Part, raw_name: str, slots: Mapping[str, str]) -> ParsedModule:
    """Build the module of one group of `collect`; the caller fills in component, path and a config's alpha."""
    refs = {slot: Ref.of(part, key) for slot, key in slots.items() if slot not in COMMON}
    module = ParsedModule("", None, raw_name, kind_of(slots), refs)
    if "alpha" in slots:
        module.alpha = part.scalar(slots["alpha"])
    if "lora_magnitude_vector" in slots:
        module.magnitude, module.magnitude_axis = Ref.of(part, slots["lora_magnitude_vector"]), "out"
    if "dora_scale" in slots:
        module.magnitude = Ref.of(part, slots["dora_scale"])
        # (out, 1, ...) or (1, in, ...)
        inputs = len(module.magnitude.shape) > 1 and module.magnitude.shape[0] == 1 and module.magnitude.shape[1] > 1
        module.magnitude_axis = "in" if inputs else "out"
    if "bias" in slots or "up_bias" in slots:
        module.bias = Ref.of(part, slots["bias" if "bias" in slots else "up_bias"])
    return module
