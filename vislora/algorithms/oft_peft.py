"""PEFT's OFT: W' = W R^T, where R turns blocks of the layer's inputs (peft/tuners/oft/layer.py).

Q is skew, its upper triangle is stored. R is one of two, which turn in opposite directions, as PEFT has them:

    exact    (I - Q) (I + Q)^-1
    series   I + 2 Q + 2 Q^2 + ... + 2 Q^(p - 1) + Q^p, where p = terms - 1, at least 3

Slots: oft_R (blocks, n (n - 1) / 2), one block for all when it is shared; a conv's inputs are in * kernel.
neumann_terms (): terms of the series, without it R is exact. eps (): the norm of each Q is at most eps / sqrt(blocks).
Both come from adapter_config.json.
"""

from __future__ import annotations

import math

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
    block_size,
    require_kind,
)
from vislora.algorithms.oft import LAYERS, own_rule, rank, rotation
from vislora.errors import AdapterFileError

CONSTANTS = frozenset({"neumann_terms", "eps"})
SLOTS = CONSTANTS | {"oft_R"}


def matches(names: frozenset[str]) -> bool:
    """Say whether these slot names are those of PEFT's OFT."""
    return "oft_R" in names and names <= SLOTS


def init(spec: LayerSpec, options: InitOptions) -> dict[str, Tensor]:
    """Return zero blocks, R = I, whose side is the smallest divisor of the inputs that is at least `options.rank`."""
    require_kind("oft_peft", spec, LAYERS)
    inputs = math.prod(spec.weight_shape[1:])
    side = block_size(inputs, options.rank)
    return {"oft_R": torch.zeros(inputs // side, side * (side - 1) // 2)}


def kinds(slots: Slots) -> frozenset[Kind]:
    """Return the kinds of layers that these slots can be put on."""
    return LAYERS


def shape(slots: Slots) -> tuple[int, ...]:
    """Return the shape of the delta as a matrix, of which at most the inputs are known."""
    blocks = slots["oft_R"].shape[0]
    return ANY, ANY if blocks == 1 else blocks * side_of(slots["oft_R"])


def delta(slots: Slots, scale: float, base: Tensor | None = None) -> Tensor:
    """Return scale * (W R^T - W) in the shape of `base`, which is W. Raises `AdapterFileError` if no blocks fit it."""
    if base is None:
        raise ValueError("OFT depends on the base weight")
    side = side_of(slots["oft_R"])
    inputs = math.prod(base.shape[1:])
    if inputs % side:
        raise AdapterFileError(f"its blocks have the side {side}, which does not divide the layer's {inputs} inputs")
    turn = _turn(_skew(slots, side), slots.get("neumann_terms"))
    rows = base.reshape(base.shape[0], -1, side).transpose(0, 1)
    return scale * (rows @ turn.mT).transpose(0, 1).reshape(base.shape)


def forward(
    x: Tensor, base_out: Tensor, slots: Slots, scale: float, layer: nn.Module, rank_dropout: float = 0.0
) -> Tensor:
    """Return base_out plus the layer with the delta as its weight; there is no rank dropout."""
    return add_weight(x, base_out, delta(slots, scale, base_weight(layer, slots["oft_R"])), layer)


def side_of(packed: Tensor) -> int:
    """Return n, of which n (n - 1) / 2 numbers are stored per block."""
    return (1 + math.isqrt(1 + 8 * packed.shape[1])) // 2


def _skew(slots: Slots, side: int) -> Tensor:
    packed = slots["oft_R"]
    row, column = torch.triu_indices(side, side, 1, device=packed.device)
    flat = packed.new_zeros(packed.shape[0], side * side).index_copy(1, row * side + column, packed)
    upper = flat.reshape(-1, side, side)
    matrices = upper - upper.mT
    if "eps" not in slots:
        return matrices
    limit = float(slots["eps"]) / math.sqrt(packed.shape[0])
    norms = torch.linalg.matrix_norm(matrices, keepdim=True)
    return matrices * (limit / norms.clamp(min=limit))


def _turn(matrices: Tensor, terms: Tensor | None) -> Tensor:
    """Return R - I."""
    if terms is None:
        return rotation(-matrices)
    count = int(terms)
    if count < 3:
        return 2.0 * matrices if count == 2 else torch.zeros_like(matrices)
    power, total = matrices, 2.0 * matrices
    for _ in range(max(count, 4) - 3):
        power = power @ matrices
        total = total + 2.0 * power
    return total + power @ matrices


OFT_PEFT = Algorithm(
    name="oft_peft",
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
