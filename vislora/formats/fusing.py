"""From the reference tree to the original one: fuse q, k and v by rows, swap the halves of a final modulation.

Exact: members that share `down` and alpha (a fused layer that was split) are stacked again, bit for bit. Others become
block-diagonal - down = [A_q; A_k; A_v], up = diag(B_q, B_k, B_v), rank = sum of ranks, alpha = scale * rank - where a
missing member is rows of zeros. Only unequal scales cost a rounding: their ratio goes into `up`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from vislora.errors import AdapterFileError
from vislora.formats.adapter_file import AdapterModule
from vislora.formats.contract import Stored


def stored(name: str, module: AdapterModule, swapped: bool = False) -> Stored:
    """Return `module` as it will stand in the file. `swapped`: with the halves of its output rows exchanged."""
    tensors, magnitude = dict(module.tensors), module.magnitude
    if swapped:
        if "up" not in tensors or tensors["up"].shape[0] % 2:
            raise AdapterFileError(f"'{module.name}' has no two halves of output rows to exchange")
        tensors["up"] = _halves_exchanged(tensors["up"])
        if magnitude is not None and module.magnitude_axis == "out":
            magnitude = _halves_exchanged(magnitude.flatten())
    made = Stored(module.component, name, module.algo, tensors, module.rank, _alpha(module), module.rule)
    made.magnitude, made.magnitude_axis = magnitude, module.magnitude_axis
    return made


def fuse(name: str, members: Sequence[AdapterModule | None]) -> Stored:
    """Fuse the members of one original layer, in row order; None is a member that the adapter leaves alone.

    Raises `AdapterFileError` when their shapes cannot be rows of one layer.
    """
    present = [member for member in members if member is not None]
    _check(name, present)
    fused = _stacked(name, members, present) if _shared(present) else _block_diagonal(name, members, present)
    magnitudes = [member.magnitude.flatten() for member in present if member.magnitude is not None]
    if magnitudes:
        if len(magnitudes) < len(members) or any(member.magnitude_axis == "in" for member in present):
            raise AdapterFileError(f"'{name}' cannot be fused: all its parts need a magnitude (DoRA) per output")
        fused.magnitude, fused.magnitude_axis = torch.cat(magnitudes), "out"
    return fused


def _halves_exchanged(tensor: Tensor) -> Tensor:
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


def _alpha(module: AdapterModule) -> float:
    return float(module.rank) if module.alpha is None else module.alpha


def _stacked(name: str, members: Sequence[AdapterModule | None], present: Sequence[AdapterModule]) -> Stored:
    first = present[0]
    zeros = torch.zeros_like(first.tensors["up"])
    up = torch.cat([zeros if member is None else member.tensors["up"] for member in members])
    tensors = {"down": first.tensors["down"], "up": up}
    return Stored(first.component, name, first.algo, tensors, first.rank, _alpha(first), first.rule)


def _check(name: str, present: Sequence[AdapterModule]) -> None:
    odd = [member.name for member in present if set(member.tensors) != {"down", "up"}]
    if odd:
        raise AdapterFileError(f"'{odd[0]}' cannot be fused into '{name}': only plain down and up projections can")
    shapes = {member.shape for member in present}
    if len(shapes) > 1:
        raise AdapterFileError(f"the parts of '{name}' should have one shape, they have {sorted(shapes)}")


def _shared(present: Sequence[AdapterModule]) -> bool:
    """Say whether these are the rows of one low-rank product: the same down, the same scale."""
    first = present[0]
    return len(present) > 1 and all(
        member.tensors["down"].dtype == first.tensors["down"].dtype
        and member.tensors["up"].dtype == first.tensors["up"].dtype
        and torch.equal(member.tensors["down"], first.tensors["down"])
        and (member.scale, member.rule) == (first.scale, first.rule)
        for member in present[1:]
    )


def _block_diagonal(name: str, members: Sequence[AdapterModule | None], present: Sequence[AdapterModule]) -> Stored:
    scale = Counter(member.scale for member in present if member.scale).most_common(1)
    common = scale[0][0] if scale else 1.0
    ups = {id(member): _rescaled(member.tensors["up"], member.scale / common) for member in present}
    rank = sum(member.rank for member in present)
    rows = present[0].tensors["up"].shape[0]
    kind = _joint_dtype(list(ups.values()))
    ones = present[0].tensors["up"].shape[2:]
    up = torch.zeros(rows * len(members), rank, *ones, dtype=kind)
    column = 0
    for index, member in enumerate(members):
        if member is not None:
            up[index * rows : (index + 1) * rows, column : column + member.rank] = ups[id(member)].to(kind)
            column += member.rank
    downs = [member.tensors["down"] for member in present]
    down = torch.cat([tensor.to(_joint_dtype(downs)) for tensor in downs])
    return Stored(present[0].component, name, "lora", {"down": down, "up": up}, rank, common * rank, "alpha/r")


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
