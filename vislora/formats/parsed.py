"""What a file's keys, shapes and scalars say, before any tensor is read. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vislora.errors import AdapterFileError
from vislora.formats.header import Header, TensorInfo, read_scalar
from vislora.formats.pickles import TensorCopy
from vislora.formats.slots import ALPHA_SLOT, BIASES, COMMON, MAGNITUDES, kind_of, split_key

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Slice:
    """Rows (`dim` 0) or columns of a fused weight: `length` of them from `start`."""

    dim: int
    start: int
    length: int


@dataclass(frozen=True)
class Part:
    """One file of an adapter. `folder`: its component's sub-folder; `config`: adapter_config.json.

    copy: of a pickle's tensors, to which the header belongs; None for a safetensors file.
    """

    path: Path
    header: Header
    folder: str = ""
    config: Mapping[str, Any] | None = None
    copy: TensorCopy | None = None

    @property
    def file(self) -> Path:
        """Return the safetensors file that holds the tensors; `path` is what to call it in a message."""
        return self.copy.path if self.copy else self.path

    def scalar(self, key: str) -> float:
        """Read a tensor of one element."""
        return read_scalar(self.file, key, self.header.tensors[key])


@dataclass(frozen=True)
class Ref:
    """A tensor that has not been read. `rows`: which of its indices along `axis`, in this order; empty means all."""

    part: Part
    key: str
    dtype: str
    shape: tuple[int, ...]
    rows: tuple[tuple[int, int], ...] = ()
    axis: int = 0

    @staticmethod
    def of(part: Part, key: str) -> Ref:
        """Refer to the whole of a tensor."""
        info: TensorInfo = part.header.tensors[key]
        return Ref(part, key, info.dtype, info.shape)

    def taking(self, *rows: tuple[int, int], axis: int = 0) -> Ref:
        """Refer to some of the indices along `axis` of a whole tensor, each given as (first, one past the last)."""
        count = sum(stop - start for start, stop in rows)
        return replace(self, shape=(*self.shape[:axis], count, *self.shape[axis + 1 :]), rows=rows, axis=axis)


@dataclass
class ParsedModule:
    """An adapter module whose tensors are still in the file; the fields are those of `AdapterModule`.

    alpha_key: the key that the alpha was read from, None when it comes from elsewhere.
    numbers: slots that are no tensors of the file but numbers of its config.
    """

    component: str
    path: str | None
    raw_name: str
    algo: str
    refs: dict[str, Ref]
    alpha: float | None = None
    alpha_key: str | None = None
    rule: str = "alpha/r"
    magnitude: Ref | None = None
    magnitude_axis: str | None = None
    bias: Ref | None = None
    bias_rule: str = "added"
    numbers: dict[str, float] = field(default_factory=dict)
    target: Slice | None = None
    group: str | None = None
    uncut: str = ""
    family: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Return how to call this module in a message."""
        return f"{self.component}: {self.path}" if self.path else self.raw_name

    @property
    def keys(self) -> list[str]:
        """Return every key of the file that this module was made of."""
        refs = (*self.refs.values(), self.magnitude, self.bias)
        return [ref.key for ref in refs if ref is not None] + ([self.alpha_key] if self.alpha_key else [])

    @property
    def tree_name(self) -> str | None:
        """Return the path, of a layer that stays whole its original name; None when no table knows the module."""
        return self.group if self.uncut else self.path

    @property
    def inputs(self) -> int | None:
        """Return the layer's number of inputs (of a conv: its input channels), None where the slots do not tell."""
        return inputs_of(self.refs)


# slots whose second axis is the layer's inputs; those of LoKr's two factors are multiplied
INPUTS = ("down", "diff", "hada_w1_b", "a2")
FACTORS = (("lokr_w1", "lokr_w1_b"), ("lokr_w2", "lokr_w2_b"))


def inputs_of(slots: Mapping[str, Ref | Tensor]) -> int | None:
    """Return the inputs of the layer that these slots (tensors, or references to them) are for, None if unknown.

    Those of a LoHa or LoKr without a Tucker core are taken for a linear layer's: the slots do not tell a kernel.
    """
    known = next((slots[slot] for slot in INPUTS if slot in slots and len(slots[slot].shape) > 1), None)
    if known is not None:
        return known.shape[1]
    first, second = (next((slots[slot].shape for slot in names if slot in slots), ()) for names in FACTORS)
    return first[1] * second[1] if len(first) > 1 and len(second) > 1 else None


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
    """Build the module of one group of `collect`; the caller fills in component, path and a config's alpha.

    Raises `AdapterFileError` when it has two biases or two magnitudes.
    """
    refs = {slot: Ref.of(part, key) for slot, key in slots.items() if slot not in COMMON}
    module = ParsedModule("", None, raw_name, kind_of(slots), refs)
    _split_oft(module)
    _order_glora(module)
    if "alpha" in slots and module.algo in ALPHA_SLOT:
        refs["alpha"] = Ref.of(part, slots["alpha"])
    elif "alpha" in slots:
        module.alpha, module.alpha_key = part.scalar(slots["alpha"]), slots["alpha"]
    magnitude = _only(raw_name, slots, MAGNITUDES)
    if magnitude:
        module.magnitude = Ref.of(part, slots[magnitude])
        module.magnitude_axis = _axis(module.magnitude) if magnitude == "dora_scale" else "out"
    bias = _only(raw_name, slots, BIASES)
    if bias:
        module.bias, module.bias_rule = Ref.of(part, slots[bias]), BIASES[bias]
    return module


def _only(raw_name: str, slots: Mapping[str, str], names: Iterable[str]) -> str | None:
    """Return which of `names` the module has, None for none. Raises `AdapterFileError` for several."""
    found = sorted(set(names) & slots.keys())
    if len(found) > 1:
        keys = " and ".join(f"'{slots[slot]}'" for slot in found)
        raise AdapterFileError(f"'{raw_name}' has two tensors for one thing: {keys}")
    return found[0] if found else None


def _axis(scale: Ref) -> str:
    """Return the axis of a `dora_scale`: (out, 1, ...) or (1, in, ...)."""
    return "in" if len(scale.shape) > 1 and scale.shape[0] == 1 and scale.shape[1] > 1 else "out"


def _split_oft(module: ParsedModule) -> None:
    """Tell BOFT from OFT, whose slots have the same name: its blocks have four axes, for they come in stages."""
    if module.algo == "oft" and "oft_blocks" in module.refs and len(module.refs["oft_blocks"].shape) == 4:
        module.algo = "boft"
        module.refs["boft_blocks"] = module.refs.pop("oft_blocks")


def _order_glora(module: ParsedModule) -> None:
    """Give GLoRA's slots LyCORIS' order of today: older files have a1 for a2 and b1 for b2, and the reverse.

    Shapes tell, a1 (in, r) and b1 (out, r) or a1 (r, in) and b1 (r, in); of a square layer, whose shapes fit both, the
    order in which the rank is the smaller side. When both sides are equal it is taken for today's.
    """
    refs = module.refs
    if module.algo != "glora" or any(
        slot not in refs or len(refs[slot].shape) < 2 for slot in ("a1", "a2", "b1", "b2")
    ):
        return
    a1, a2, b1, b2 = (refs[slot].shape for slot in ("a1", "a2", "b1", "b2"))
    today = a1[1] == a2[0] == b1[1] == b2[0]
    older = a1[0] == a2[1] == b1[0] == b2[1]
    if older and (not today or a1[0] < a1[1]):
        refs["a1"], refs["a2"], refs["b1"], refs["b2"] = refs["a2"], refs["a1"], refs["b2"], refs["b1"]
        module.notes.append(f"'{module.raw_name}' has GLoRA's slots in LyCORIS' older order")
    elif older and a1[0] == a1[1]:
        module.notes.append(
            f"'{module.raw_name}' may be GLoRA in either order of slots; it is read in LyCORIS' of today"
        )
