"""From the reference tree to the original one: fuse q, k and v by rows, swap the halves of a final modulation.

Exact: members that differ only in the slots that run along the outputs, as those of a fused layer that was cut do, are
joined again, bit for bit. Other LoRA members become block-diagonal - down = [A_q; A_k; A_v], up = diag(B_q, B_k, B_v),
rank = sum of ranks, alpha = scale * rank. A missing member is rows that change nothing. Only unequal scales cost a
rounding: their ratio goes into `up`. Whatever else cannot be fused is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vislora.errors import AdapterFileError
from vislora.formats.adapter_file import AdapterModule, taken
from vislora.formats.contract import Stored
from vislora.formats.rows import AS_LORA, NotByRowsError, Way, cuts, outputs, ways

APART = "a format of the parts' own names (diffusers, peft) keeps them apart"
PRODUCTS = ("lora", "loha", "lokr")
Members = Sequence[AdapterModule | None]


def stored(name: str, module: AdapterModule, swapped: bool = False, scales_all: bool = False) -> Stored:
    """Return `module` as it will stand in the file.

    swapped: with the halves of its output rows exchanged. scales_all: as in `Format`.
    """
    tensors, magnitude, bias = dict(module.tensors), module.magnitude, bias_as(module, scales_all)
    if swapped:
        found = halves_exchanged(module)
        tensors = {slot: taken(item, *found[slot]) if slot in found else item for slot, item in tensors.items()}
        if magnitude is not None and module.magnitude_axis == "out":
            magnitude = _swap(magnitude.flatten())
        bias = None if bias is None else _swap(bias)
    rule, alpha = _scale_in_file(module, tensors, scales_all)
    made = Stored(module.component, name, module.algo, tensors, module.rank, alpha, rule)
    made.magnitude, made.magnitude_axis, made.bias = magnitude, module.magnitude_axis, bias
    return made


def _scale_in_file(module: AdapterModule, tensors: dict[str, Tensor], scales_all: bool) -> tuple[str, float | None]:
    """Return rule and alpha; a factor that LoKr's readers would ignore goes into the first of its two full factors."""
    if module.only_bias:
        return "own", module.alpha
    if module.direction_algorithm.own_rule(tensors) is None:
        return module.rule, _alpha(module)
    if module.rule != "scale" or scales_all:
        return ("scale" if module.rule == "scale" else "own"), module.alpha
    tensors["lokr_w1"] = _rescaled(tensors["lokr_w1"], module.scale)
    return "own", None


def bias_as(module: AdapterModule, scaled: bool) -> Tensor | None:
    """Return the bias as it is added, or (`scaled`) as it is before its readers multiply it by the scale.

    In its own dtype when that is exact, else in float32.
    """
    if module.bias is None or scaled == (module.bias_rule == "scaled"):
        return module.bias
    if scaled and module.scale == 0.0:
        raise AdapterFileError(f"'{module.name}' has a bias and the scale 0, which would make it nothing")
    return _rescaled(module.bias, 1.0 / module.scale if scaled else module.scale)


def halves_exchanged(module: AdapterModule) -> dict[str, tuple[int, tuple[tuple[int, int], ...]]]:
    """Return slot -> (axis, indices) that exchange the halves of the outputs, none for slots that all share.

    Raises `NotByRowsError`.
    """
    total = _outputs(module)
    if total is None:
        return {}
    if total % 2:
        raise NotByRowsError(f"'{module.name}' has no two halves of output rows to exchange")
    return cuts(module.algo, module.tensors, ((total // 2, total), (0, total // 2)))


def why_unfusable(members: Members, sizes: Sequence[int]) -> str:
    """Return why the members of one original layer cannot be fused, and what can be done instead; '' when they can."""
    try:
        _plan(members, sizes)
    except NotByRowsError as problem:
        return str(problem)
    return ""


def fuse(name: str, members: Members, sizes: Sequence[int]) -> Stored:
    """Fuse the members of one original layer, in row order; None is a member that the adapter leaves alone.

    sizes: the rows of every member, as proportions.
    Raises `AdapterFileError` when they cannot be fused exactly.
    """
    try:
        plan = _plan(members, sizes)
    except NotByRowsError as problem:
        raise AdapterFileError(f"'{name}' cannot be fused: {problem}") from None
    fused = _block_diagonal(members, plan.rows) if plan.way is None else _joined(members, plan.rows, plan.way)
    fused.name = name
    present = [member for member in members if member is not None]
    if present[0].magnitude is not None:
        fused.magnitude = torch.cat([member.magnitude.flatten() for member in present if member.magnitude is not None])
        fused.magnitude_axis = "out"
    biases = [None if member is None else bias_as(member, scaled=False) for member in members]
    if any(bias is not None for bias in biases):
        fused.bias = _piled(biases, plan.rows, 0, 0.0)
    return fused


@dataclass(frozen=True)
class _Plan:
    """How to fuse. rows: of every member. way: the slots to join, None for a block-diagonal product."""

    rows: list[int]
    way: Way | None


def _plan(members: Members, sizes: Sequence[int]) -> _Plan:
    present = [member for member in members if member is not None]
    rows = _rows(members, sizes)
    magnitudes = [member for member in present if member.magnitude is not None]
    if magnitudes and (len(magnitudes) < len(members) or any(item.magnitude_axis == "in" for item in magnitudes)):
        raise NotByRowsError(f"all its parts need a magnitude (DoRA) per output; {APART}")
    way = _way(members, rows)
    if way is None and any(set(member.tensors) != {"down", "up"} for member in present):
        raise NotByRowsError(
            _why_not_joined(present, [count for count, item in zip(rows, members, strict=True) if item])
        )
    inputs = {tuple(member.tensors["down"].shape[1:]) for member in present if "down" in member.tensors}
    if len(inputs) > 1:
        raise NotByRowsError(f"its parts have inputs of several shapes: {sorted(inputs)}")
    return _Plan(rows, way)


def _rows(members: Members, sizes: Sequence[int]) -> list[int]:
    """Return the rows of every member, missing ones too. Raises `NotByRowsError` when they are not in proportion."""
    pairs = [(member, size) for member, size in zip(members, sizes, strict=True) if member is not None]
    known = [(_outputs(member), size) for member, size in pairs]
    units = {total / size for total, size in known if total is not None}
    if not units:
        return [0] * len(members)
    if len(units) > 1 or (unit := units.pop()) % 1:
        shares, found = ":".join(map(str, sizes)), sorted({total for total, _ in known if total is not None})
        raise NotByRowsError(f"its parts should have rows in the proportions {shares}, they have {found}")
    return [int(unit) * size for size in sizes]


def _outputs(member: AdapterModule) -> int | None:
    total = outputs(ways(member.algo, member.tensors)[0], member.tensors)
    return total if total is not None or member.bias is None else member.bias.shape[0]


def _way(members: Members, rows: Sequence[int]) -> Way | None:
    """Return the slots whose rows the members have each for itself, while all others are the same; None if none fit."""
    present = [member for member in members if member is not None]
    first = present[0]
    if any((item.algo, item.scale, item.rule) != (first.algo, first.scale, first.rule) for item in present[1:]):
        return None
    gaps = [count for member, count in zip(members, rows, strict=True) if member is None]
    for way in ways(first.algo, first.tensors):
        filled = bool(way) and all(
            along.neutral is not None and count % along.unit == 0 for along in way.values() for count in gaps
        )
        if (filled or not gaps) and all(_same_but(way, first, other) for other in present[1:]):
            return way
    return None


def _same_but(way: Way, first: AdapterModule, other: AdapterModule) -> bool:
    """Say whether two members have the same slots, and the same numbers in those that do not run along the outputs."""
    if first.tensors.keys() - way.keys() != other.tensors.keys() - way.keys():
        return False
    both = first.tensors.keys() & other.tensors.keys()
    return all(_fit(way, slot, first.tensors[slot], other.tensors[slot]) for slot in both)


def _fit(way: Way, slot: str, first: Tensor, other: Tensor) -> bool:
    if slot not in way:
        return first.dtype == other.dtype and torch.equal(first, other)
    axis = way[slot].axis
    rest = [(*tensor.shape[:axis], *tensor.shape[axis + 1 :]) for tensor in (first, other)]
    return rest[0] == rest[1]


def _why_not_joined(present: Sequence[AdapterModule], rows: Sequence[int]) -> str:
    kinds = sorted({member.algo for member in present})
    if len(kinds) > 1:
        why = f"its parts are of several kinds ({', '.join(kinds)})"
    elif _way(present, rows) is not None:
        return f"a part is missing, and with kind {kinds[0]} no rows stand for one that changes nothing"
    else:
        why = f"its parts of kind {kinds[0]} do not share what one module of the fused layer would have once"
    return f"{why}; {AS_LORA if set(kinds) <= set(PRODUCTS) else APART}"


def _joined(members: Members, rows: Sequence[int], way: Way) -> Stored:
    first = next(member for member in members if member is not None)
    tensors = dict(first.tensors)
    for slot, along in way.items():
        counts = [count // along.unit for count in rows]
        found = [member.tensors.get(slot) if member else None for member in members]
        if any(tensor is not None for tensor in found):
            tensors[slot] = _piled(found, counts, along.axis, along.neutral or 0.0)
    rule, alpha = _scale_in_file(first, tensors, scales_all=False)
    return Stored(first.component, "", first.algo, tensors, first.rank, alpha, rule)


def _piled(tensors: Sequence[Tensor | None], counts: Sequence[int], axis: int, neutral: float) -> Tensor:
    """Join tensors along an axis, in the dtype that holds all of them; a missing one is `neutral` numbers."""
    present = [tensor for tensor in tensors if tensor is not None]
    before, after = present[0].shape[:axis], present[0].shape[axis + 1 :]
    dtype = _joint_dtype(present)
    full = [
        present[0].new_full((*before, count, *after), neutral, dtype=dtype) if tensor is None else tensor.to(dtype)
        for tensor, count in zip(tensors, counts, strict=True)
    ]
    return torch.cat(full, axis)


def _swap(tensor: Tensor) -> Tensor:
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


def _alpha(module: AdapterModule) -> float:
    return float(module.rank) if module.alpha is None else module.alpha


def _block_diagonal(members: Members, rows: Sequence[int]) -> Stored:
    present = [member for member in members if member is not None]
    scale = Counter(member.scale for member in present if member.scale).most_common(1)
    common = scale[0][0] if scale else 1.0
    ups = {id(member): _rescaled(member.tensors["up"], member.scale / common) for member in present}
    rank = sum(member.rank for member in present)
    kind = _joint_dtype(list(ups.values()))
    ones = present[0].tensors["up"].shape[2:]
    up = torch.zeros(sum(rows), rank, *ones, dtype=kind)
    row = column = 0
    for member, count in zip(members, rows, strict=True):
        if member is not None:
            up[row : row + count, column : column + member.rank] = ups[id(member)].to(kind)
            column += member.rank
        row += count
    downs = [member.tensors["down"] for member in present]
    down = torch.cat([tensor.to(_joint_dtype(downs)) for tensor in downs])
    return Stored(present[0].component, "", "lora", {"down": down, "up": up}, rank, common * rank, "alpha/r")


def _rescaled(up: Tensor, factor: float) -> Tensor:
    """Return factor * up: in its own dtype when that is exact, else in float32."""
    if factor == 1.0:
        return up
    exact = up.to(torch.float64) * factor
    return exact.to(up.dtype) if torch.equal(exact.to(up.dtype).to(torch.float64), exact) else exact.to(torch.float32)


def _joint_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype that holds all of these exactly."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
