"""Norm: the change of the weight of a LayerNorm, GroupNorm or RMSNorm (LyCORIS' `train_norm`); its bias is apart.

Slot: w_norm (channels,). No layer gets it afresh: what files hold is run, compared and converted.
"""

from __future__ import annotations

from torch import Tensor, nn

from vislora.algorithms.base import Algorithm, InitOptions, Kind, LayerSpec, Rule, Slots, add_weight, require_kind

SLOTS = frozenset({"w_norm"})
NO_KIND: frozenset[Kind] = frozenset()


def matches(names: frozenset[str]) -> bool:
    """Say whether these slot names are those of a norm's change."""
    return names == SLOTS


def init(spec: LayerSpec, options: InitOptions) -> dict[str, Tensor]:
    """Raise `ConfigError`: no layer that adapters are put on is a norm."""
    require_kind("norm", spec, NO_KIND)
    return {}


def kinds(slots: Slots) -> frozenset[Kind]:
    """Return norms."""
    return frozenset({"norm"})


def rank(slots: Slots) -> int:
    """Return 1: there is no rank."""
    return 1


def own_rule(slots: Slots) -> Rule:
    """Return "none": no alpha counts."""
    return "none"


def shape(slots: Slots) -> tuple[int, ...]:
    """Return the shape of the delta."""
    return tuple(slots["w_norm"].shape)


def delta(slots: Slots, scale: float, base: Tensor | None = None) -> Tensor:
    """Return scale * w_norm; `base` is not needed."""
    return scale * slots["w_norm"]


def forward(
    x: Tensor, base_out: Tensor, slots: Slots, scale: float, layer: nn.Module, rank_dropout: float = 0.0
) -> Tensor:
    """Return base_out plus the norm with the change as its weight. No rank dropout."""
    return add_weight(x, base_out, delta(slots, scale), layer)


NORM = Algorithm(
    name="norm",
    slots=SLOTS,
    matches=matches,
    init=init,
    rank=rank,
    shape=shape,
    kinds=kinds,
    delta=delta,
    forward=forward,
    own_rule=own_rule,
)
