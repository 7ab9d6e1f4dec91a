"""IA3: W' = W * (1 + scale * v), a factor per output or per input (Liu et al., arXiv 2205.05638).

As LyCORIS has it (lycoris/modules/ia3.py). Slots: weight, the v, (width,) of a linear layer or (1, width, 1, ...) of a
conv; on_input (): 1 when the width is the inputs', 0 when it is the outputs'.
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
    Rule,
    Slots,
    add_weight,
    base_weight,
    require_kind,
)

CONSTANTS = frozenset({"on_input"})
SLOTS = CONSTANTS | {"weight"}
LAYERS: frozenset[Kind] = frozenset({"linear", "conv"})


def matches(names: frozenset[str]) -> bool:
    """Say whether these slot names are IA3's."""
    return names == SLOTS


def init(spec: LayerSpec, options: InitOptions) -> dict[str, Tensor]:
    """Return zeros per output."""
    require_kind("ia3", spec, LAYERS)
    out, _, *kernel = spec.weight_shape
    weight = torch.zeros(1, out, *[1] * len(kernel)) if kernel else torch.zeros(out)
    return {"weight": weight, "on_input": torch.tensor(0)}


def kinds(slots: Slots) -> frozenset[Kind]:
    """Return the kinds of layers that these slots can be put on."""
    return LAYERS


def rank(slots: Slots) -> int:
    """Return 1: there is no rank."""
    return 1


def own_rule(slots: Slots) -> Rule:
    """Return "none": no alpha counts."""
    return "none"


def shape(slots: Slots) -> tuple[int, ...]:
    """Return the shape of the delta, of which only the outputs or the inputs are known."""
    width = slots["weight"].numel()
    kernel = [ANY] * max(slots["weight"].dim() - 2, 0)
    return (ANY, width, *kernel) if int(slots["on_input"]) else (width, ANY, *kernel)


def delta(slots: Slots, scale: float, base: Tensor | None = None) -> Tensor:
    """Return scale * W * v in the shape of `base`, which is W."""
    if base is None:
        raise ValueError("IA3 depends on the base weight")
    ones = [1] * (base.dim() - 2)
    sizes = (1, -1, *ones) if int(slots["on_input"]) else (-1, 1, *ones)
    return scale * base * slots["weight"].reshape(sizes)


def forward(
    x: Tensor, base_out: Tensor, slots: Slots, scale: float, layer: nn.Module, rank_dropout: float = 0.0
) -> Tensor:
    """Return base_out plus the layer with the delta as its weight: the bias is left as it is. No rank dropout."""
    return add_weight(x, base_out, delta(slots, scale, base_weight(layer, slots["weight"])), layer)


IA3 = Algorithm(
    name="ia3",
    slots=SLOTS,
    matches=matches,
    init=init,
    rank=rank,
    shape=shape,
    kinds=kinds,
    delta=delta,
    forward=forward,
    own_rule=own_rule,
    needs_base=True,
    constants=CONSTANTS,
)
