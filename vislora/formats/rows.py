"""Where a layer's outputs are in the slots of every kind: what can be cut out of a fused layer, or fused into one.

    lora   up (out, rank): its rows         down (rank, in): shared by all parts
    loha   hada_w1_a and hada_w2_a (out, rank), with a Tucker core their columns
    lokr   the rows of W1, each of which stands for as many outputs as W2 has rows

Formulas: the algorithms' own files; what of it is exact: every rule here leaves all rows of the change as they are.
Torch-free: tensors and references to them are looked at alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vislora.errors import AdapterFileError
from vislora.formats.parsed import Ref, inputs_of

if TYPE_CHECKING:
    from torch import Tensor

Slots = Mapping[str, "Ref | Tensor"]
Ranges = tuple[tuple[int, int], ...]
AS_LORA = "convert it to plain LoRA (--as lora)"
OF_A_RANK = "the nearest plain LoRA of a rank can be (--as lora --rank N)"
KEEP = "a format of the original names holds it as it is"


class NotByRowsError(AdapterFileError):
    """A module's change cannot be cut, fused or reordered by rows exactly. Says why, and what can be done instead."""


@dataclass(frozen=True)
class Along:
    """An axis of a slot that runs along the layer's outputs, every index for `unit` of them.

    neutral: the number that leaves an output as it is, None when no number of this slot alone does.
    """

    axis: int = 0
    unit: int = 1
    neutral: float | None = 0.0


Way = Mapping[str, Along]
"""The slots that run along the outputs, those a module may lack too; the others are shared by all outputs."""


def ways(kind: str, slots: Slots) -> list[Way]:
    """Return every way in which the slots of a module divide by outputs. Raises `NotByRowsError` when there is none."""
    if kind not in _WAYS:
        raise NotByRowsError(f"nothing is known of the rows of kind '{kind}'; {KEEP}")
    try:
        return _WAYS[kind](slots)
    except (IndexError, KeyError) as error:  # a damaged module, which `checks` tells more about
        raise NotByRowsError(f"the slots of this kind '{kind}' fit no layer") from error


def outputs(way: Way, slots: Slots) -> int | None:
    """Return how many outputs the layer has, None when its slots do not tell."""
    return next((slots[slot].shape[along.axis] * along.unit for slot, along in way.items() if slot in slots), None)


def cuts(kind: str, slots: Slots, rows: Ranges) -> dict[str, tuple[int, Ranges]]:
    """Return slot -> (axis, indices to take) for these rows of the layer; other slots are taken whole.

    Raises `NotByRowsError` when no way of dividing the slots gives exactly these rows.
    """
    found = ways(kind, slots)
    for way in found:
        if all(edge % along.unit == 0 for along in way.values() for pair in rows for edge in pair):
            return {
                slot: (along.axis, tuple((start // along.unit, stop // along.unit) for start, stop in rows))
                for slot, along in way.items()
            }
    units = max(along.unit for along in found[0].values())
    advice = AS_LORA if kind == "lokr" else KEEP
    shown = " and ".join(f"{start} to {stop}" for start, stop in rows)
    raise NotByRowsError(f"its rows (kind {kind}) come in blocks of {units}, and {shown} are no whole blocks; {advice}")


def is_swapped(swap: str, kind: str, slots: Slots) -> bool:
    """Say whether the halves of a layer's outputs change places, by what its row of the name table says of `swap`.

    Raises `NotByRowsError` when that depends on the layer's sizes and its slots do not tell them.
    """
    if swap != "two rows per input":
        return swap == "always"
    total, inputs = outputs(ways(kind, slots)[0], slots), inputs_of(slots)
    if total is None or inputs is None:
        raise NotByRowsError(f"kind '{kind}' does not tell whether its layer's halves change places; {KEEP}")
    return total == 2 * inputs


def _lora(slots: Slots) -> list[Way]:
    if "bias_indices" in slots:
        raise NotByRowsError(f"its sparse rest (bias_indices) is not cut; {KEEP}")
    if "up" not in slots:
        raise NotByRowsError("an embedding has no output rows")
    return [{"up": Along()}]


def _full(slots: Slots) -> list[Way]:
    return [{"diff": Along()}]


def _norm(slots: Slots) -> list[Way]:
    return [{"w_norm": Along()}]


def _set(slots: Slots) -> list[Way]:
    return [{"set_weight": Along(neutral=None)}]


def _loha(slots: Slots) -> list[Way]:
    axis = 1 if "hada_t1" in slots else 0
    return [{"hada_w1_a": Along(axis), "hada_w2_a": Along(axis)}]


def _lokr(slots: Slots) -> list[Way]:
    """Row i * k + j of kron(W1, W2) is row i of W1 with row j of W2, k rows in all: W1's rows, or W2's under one."""
    first = "lokr_w1" if "lokr_w1" in slots else "lokr_w1_a"
    second = "lokr_w2" if "lokr_w2" in slots else "lokr_w2_a"
    axis = 1 if "lokr_t2" in slots else 0
    found: list[Way] = [{first: Along(unit=slots[second].shape[axis])}]
    return [*found, {second: Along(axis)}] if slots[first].shape[0] == 1 else found


def _glora(slots: Slots) -> list[Way]:
    """W A1 A2 + B1 B2: the first term has W's own rows; without rows of b1 it is still there."""
    if slots["b1"].shape[1] != slots["b2"].shape[0]:
        raise NotByRowsError(f"its slots are in the order of old LyCORIS; {KEEP}")
    return [{"b1": Along(neutral=None)}]


def _oft(slots: Slots) -> list[Way]:
    if "alpha" in slots and number(slots["alpha"]) > 0:
        limit = number(slots["alpha"])
        raise NotByRowsError(f"its constraint (alpha {limit:g}) bounds the rotation of all rows together; {KEEP}")
    return [{"oft_blocks": Along(unit=slots["oft_blocks"].shape[1]), "rescale": Along(neutral=1.0)}]


def _boft(slots: Slots) -> list[Way]:
    raise NotByRowsError(f"a butterfly (BOFT) mixes rows from everywhere in the layer; {KEEP}")


def _turned_inputs(slots: Slots) -> list[Way]:
    """R turns the inputs, the same way for every output."""
    return [{}]


def _ia3(slots: Slots) -> list[Way]:
    if number(slots["on_input"]):
        return [{}]
    return [{"weight": Along(1 if len(slots["weight"].shape) > 1 else 0)}]


def instead(kind: str, slots: Slots) -> str:
    """Return `; ` and what can be done with a module of this kind where it cannot be held, '' for nothing."""
    if kind in ("loha", "lokr") or "mid" in slots:
        return f"; {AS_LORA}"
    return f"; {OF_A_RANK}" if kind == "full" and "diff" in slots and len(slots["diff"].shape) > 1 else ""


def number(slot: Ref | Tensor) -> float:
    """Return the value of a tensor of one element, or of a reference to one."""
    return slot.part.scalar(slot.key) if isinstance(slot, Ref) else float(slot)


_WAYS: dict[str, Callable[[Any], list[Way]]] = {
    "lora": _lora,
    "full": _full,
    "norm": _norm,
    "set": _set,
    "loha": _loha,
    "lokr": _lokr,
    "glora": _glora,
    "oft": _oft,
    "boft": _boft,
    "oft_peft": _turned_inputs,
    "ia3": _ia3,
}
