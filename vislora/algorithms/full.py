"""Full: W' = W + scale * diff, the whole change of a weight (LyCORIS' `full`, and what extraction tools keep as it is).

Slot: diff, of the shape of the weight. A file's alpha does not count.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vislora.algorithms.base import Algorithm, InitOptions, LayerSpec, Rule, Slots, add_weight

SLOTS = frozenset({"diff"})


def matches(names: frozenset[str]) -> bool:
    """Say whether these slot names are those of a full change."""
    return names == SLOTS


def init(spec: LayerSpec, options: InitOptions) -> dict[str, Tensor]:
    """Return a zero change, whatever `options` say."""
    return {"diff": torch.zeros(spec.weight_shape)}


def rank(slots: Slots) -> int:
    """Return 1: a full change has no rank."""
    return 1


def own_rule(slots: Slots) -> Rule:
    """Return "none": no alpha counts."""
    return "none"


def shape(slots: Slots) -> tuple[int, ...]:
    """Return the shape of the delta."""
    return tuple(slots["diff"].shape)


def delta(slots: Slots, scale: float, base: Tensor | None = None) -> Tensor:
    """Return scale * diff; `base` is not needed."""
    return scale * slots["diff"]


def forward(
    x: Tensor, base_out: Tensor, slots: Slots, scale: float, layer: nn.Module, rank_dropout: float = 0.0
) -> Tensor:
    """Return base_out plus the layer with the delta as its weight."""
    return add_weight(x, base_out, delta(slots, scale), layer)


FULL = Algorithm(
    name="full",
    slots=SLOTS,
    matches=matches,
    init=init,
    rank=rank,
    shape=shape,
    delta=delta,
    forward=forward,
    own_rule=own_rule,
)
