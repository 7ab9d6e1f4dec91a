"""Set: W' = W + scale * (set_weight - W), another weight in the place of a layer's (ComfyUI's `set_weight`).

BFL's control LoRAs for FLUX.1 have it for the scales of their norms. Slot: set_weight, of the shape of the weight.
ComfyUI puts it in whole, whatever the strength. No layer gets it afresh: what a file holds is run and converted.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vislora.algorithms.base import (
    KINDS,
    Algorithm,
    InitOptions,
    Kind,
    LayerSpec,
    Rule,
    Slots,
    add_weight,
    require_kind,
)

SLOTS = frozenset({"set_weight"})
NO_KIND: frozenset[Kind] = frozenset()


def matches(names: frozenset[str]) -> bool:
    """Say whether these slot names are those of another weight."""
    return names == SLOTS


def init(spec: LayerSpec, options: InitOptions) -> dict[str, Tensor]:
    """Raise `ConfigError`: a fresh one would have to be the base weight, which nothing here knows."""
    require_kind("set", spec, NO_KIND)
    return {}


def kinds(slots: Slots) -> frozenset[Kind]:
    """Return all kinds of layers, norms too."""
    return KINDS | {"norm"}


def rank(slots: Slots) -> int:
    """Return 1: there is no rank."""
    return 1


def own_rule(slots: Slots) -> Rule:
    """Return "none": no alpha counts."""
    return "none"


def shape(slots: Slots) -> tuple[int, ...]:
    """Return the shape of the delta."""
    return tuple(slots["set_weight"].shape)


def delta(slots: Slots, scale: float, base: Tensor | None = None) -> Tensor:
    """Return scale * (set_weight - base)."""
    if base is None:
        raise ValueError("what another weight changes depends on the base weight")
    return scale * (slots["set_weight"].reshape(base.shape) - base)


def forward(
    x: Tensor, base_out: Tensor, slots: Slots, scale: float, layer: nn.Module, rank_dropout: float = 0.0
) -> Tensor:
    """Return base_out plus the layer with the change as its weight. No rank dropout."""
    base: Tensor = layer.weight  # type: ignore[assignment]
    # in float32: the difference of two weights that are nearly equal
    wide = base.to(x.device, torch.promote_types(base.dtype, torch.float32))
    change = delta({"set_weight": slots["set_weight"].to(wide.dtype)}, scale, wide)
    return add_weight(x, base_out, change.to(slots["set_weight"].dtype), layer)


SET = Algorithm(
    name="set",
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
)
