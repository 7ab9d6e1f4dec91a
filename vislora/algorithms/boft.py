"""BOFT: W' = s * R_m ... R_1 W, orthogonal block rotations of output rows in butterfly order.

Liu et al., arXiv 2311.06243, section 4, as LyCORIS has it (lycoris/modules/boft.py). In stage i rows that are
2^i * n / 2 apart come together in blocks of n rows. Every block is (I + Q) (I - Q)^-1 with Q = block - block^T. Slots:

    boft_blocks (stages, blocks, n, n), in files `oft_blocks`; rescale and alpha as in OFT
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vislora.algorithms.base import (
    ANY,
    Algorithm,
    InitOptions,
    Kind,
    LayerSpec,
    Slots,
    add_weight,
    base_weight,
    require_kind,
)
from vislora.algorithms.oft import CONSTANTS, LAYERS, own_rule, rank, rescaled, rotation, skew
from vislora.errors import ConfigError

SLOTS = frozenset({"boft_blocks", "rescale", "alpha"})


def matches(names: frozenset[str]) -> bool:
    """Say whether these slot names are BOFT's."""
    return "boft_blocks" in names and names <= SLOTS


def init(spec: LayerSpec, options: InitOptions) -> dict[str, Tensor]:
    """Return zero blocks, all rotations I, of the largest even side up to `options.rank` that allows a butterfly.

    The number of blocks has to be a power of two. Raises `ConfigError` when `out` has no such divisor.
    """
    require_kind("boft", spec, LAYERS)
    out = spec.weight_shape[0]
    sides = [side for side in range(2, out + 1, 2) if out % side == 0 and _power(out // side)]
    fitting = [side for side in sides if side <= options.rank]
    if not fitting:
        hint = f"; rank {sides[0]} is the least that fits" if sides else ""
        raise ConfigError(f"algorithm 'boft' cannot cut {out} outputs into 2^k blocks of at most {options.rank}{hint}")
    side, blocks = fitting[-1], out // fitting[-1]
    return {"boft_blocks": torch.zeros(blocks.bit_length(), blocks, side, side), "alpha": torch.tensor(0.0)}


def kinds(slots: Slots) -> frozenset[Kind]:
    """Return the kinds of layers that these slots can be put on."""
    return LAYERS


def shape(slots: Slots) -> tuple[int, ...]:
    """Return the shape of the delta as a matrix, of which only the outputs are known."""
    _, blocks, side, _ = slots["boft_blocks"].shape
    return blocks * side, ANY


def delta(slots: Slots, scale: float, base: Tensor | None = None) -> Tensor:
    """Return scale * (s * R_m ... R_1 W - W) in the shape of `base`, which is W."""
    if base is None:
        raise ValueError("BOFT depends on the base weight")
    stages, count, side, _ = slots["boft_blocks"].shape
    turns = rotation(skew(slots["boft_blocks"], slots.get("alpha"), count * side))
    rows = base.flatten(1)
    change = torch.zeros_like(rows)
    for stage in range(stages):
        order = _order(count * side, 2**stage * side // 2).to(rows.device)
        moved = (turns[stage] @ (rows + change)[order].reshape(count, side, -1)).reshape(rows.shape)
        change = change + moved[torch.argsort(order)]
    return scale * rescaled(change.reshape(base.shape), base, slots)


def forward(
    x: Tensor, base_out: Tensor, slots: Slots, scale: float, layer: nn.Module, rank_dropout: float = 0.0
) -> Tensor:
    """Return base_out plus the layer with the delta as its weight: the bias is not turned. No rank dropout."""
    return add_weight(x, base_out, delta(slots, scale, base_weight(layer, slots["boft_blocks"])), layer)


def _order(size: int, apart: int) -> Tensor:
    """Return the rows' order in which each row is followed by the one that is `apart` behind it."""
    return torch.arange(size).reshape(-1, 2, apart).mT.flatten()


def _power(number: int) -> bool:
    return number & (number - 1) == 0


BOFT = Algorithm(
    name="boft",
    slots=SLOTS,
    matches=matches,
    init=init,
    rank=rank,
    shape=shape,
    kinds=kinds,
    delta=delta,
    forward=forward,
    flat=True,
    own_rule=own_rule,
    needs_base=True,
    constants=CONSTANTS,
)
