"""From the original tree to the reference one: cut a fused layer into its parts by rows, swap a modulation's halves.

Every part has its rows of some slots and shares the others, so that each row of the change stays as it is, bit for
bit. What cannot be cut so stays one module, whole, with the reason. Torch-free: references are cut.

    double_blocks.0.img_attn.qkv.lora_up.weight  (9216, rank) -> transformer_blocks.0.attn.to_k: rows 3072 to 6144
    double_blocks.0.img_attn.qkv.lokr_w1         (4, 4), W2 of 2304 rows: row 3072 is inside a row of W1, not cut
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vislora.errors import AdapterFileError
from vislora.formats.names import Found
from vislora.formats.parsed import ParsedModule, Slice
from vislora.formats.rows import KEEP, NotByRowsError, Ranges, cuts, is_swapped, outputs, ways

Taken = Callable[[Any, int, Ranges], Any]
"""How to take some indices (first, one past the last) along an axis of a reference or a tensor."""


@dataclass(frozen=True)
class Whole:
    """What is to be cut: the slots of a module, and what lies on top of them, as references or as tensors."""

    kind: str
    slots: Mapping[str, Any]
    magnitude: Any = None
    magnitude_axis: str | None = None
    bias: Any = None

    def outputs(self) -> int | None:
        """Return how many outputs the layer has, None when nothing tells. Raises `NotByRowsError`."""
        found = outputs(ways(self.kind, self.slots)[0], self.slots)
        if found is None and self.bias is not None:
            return int(self.bias.shape[0])
        return found if found is not None or self.magnitude is None else max(self.magnitude.shape)


def parts(module: ParsedModule, leads: Sequence[Found]) -> list[ParsedModule]:
    """Return `module` at every path where its name leads, its output rows cut or swapped as the reference tree has it.

    A module that cannot be cut exactly is returned whole, with path None, the reason in `uncut` and in a note. Raises
    `AdapterFileError` when the rows cannot be shared out.
    """
    whole = Whole(module.algo, module.refs, module.magnitude, module.magnitude_axis, module.bias)
    try:
        fields = [part_fields(whole, lead, module.raw_name, _take_reference) for lead in leads]
    except NotByRowsError as problem:
        note = f"'{module.raw_name}' fuses or reorders layers and stays whole: {problem}"
        return [replace(module, group=leads[0].stored, uncut=str(problem), notes=[*module.notes, note])]
    return [replace(module, refs=item.pop("slots"), **item, notes=list(module.notes)) for item in fields]


def part_fields(whole: Whole, lead: Found, name: str, take: Taken) -> dict[str, Any]:
    """Return path, slots, magnitude, bias, target and group of the part of `whole` that `lead` leads to.

    name: for messages. Raises `NotByRowsError` when there is no such part, `AdapterFileError` when the rows cannot be
    shared out.
    """
    swapped = lead.swap != "never" and is_swapped(lead.swap, whole.kind, whole.slots)
    if lead.part is None and not swapped:
        return {"path": lead.path, "slots": dict(whole.slots)}
    if lead.part is not None and whole.magnitude_axis == "in":
        raise NotByRowsError(f"its magnitude (DoRA) is per input, of a norm over the rows of all parts; {KEEP}")
    rows, target = _rows(whole, lead, name)
    _check_on_top(whole, name)
    found = cuts(whole.kind, whole.slots, rows)
    on_top: dict[str, Any] = {"bias": whole.bias, "magnitude": whole.magnitude}
    if whole.bias is not None:
        on_top["bias"] = take(whole.bias, 0, rows)
    if whole.magnitude is not None and whole.magnitude_axis == "out":
        on_top["magnitude"] = take(whole.magnitude, _long_axis(whole.magnitude), rows)
    slots = {slot: take(item, *found[slot]) if slot in found else item for slot, item in whole.slots.items()}
    group = lead.stored if lead.part is not None else None
    return {"path": lead.path, "slots": slots, **on_top, "target": target, "group": group}


def _rows(whole: Whole, lead: Found, name: str) -> tuple[Ranges, Slice | None]:
    """Return the rows to take, none for a module that does not know of any, and the part of the layer that they are."""
    total = whole.outputs()
    if total is None:
        return (), None
    if lead.part is None:
        if total == 0 or total % 2:
            raise AdapterFileError(f"'{name}' should have two halves of output rows, it has {total} rows")
        return ((total // 2, total), (0, total // 2)), None
    start, stop = lead.part.rows(total, name)
    return ((start, stop),), Slice(0, start, stop - start)


def _check_on_top(whole: Whole, name: str) -> None:
    """Raise `AdapterFileError` when a bias or a magnitude per output is not of the layer's outputs."""
    total = whole.outputs()
    per_output = whole.magnitude if whole.magnitude_axis == "out" else None
    for kind, item in (("bias", whole.bias), ("magnitude", per_output)):
        if item is not None and max(item.shape, default=0) != total:
            raise AdapterFileError(f"'{name}': its {kind} {list(item.shape)} does not fit its {total} output rows")


def _take_reference(ref: Any, axis: int, rows: Ranges) -> Any:
    return ref.taking(*rows, axis=axis)


def _long_axis(magnitude: Any) -> int:
    """Return the axis of the outputs: of (out,), (out, 1, ...), or PEFT's (1, out, 1, 1)."""
    return 1 if len(magnitude.shape) > 1 and magnitude.shape[0] == 1 else 0
