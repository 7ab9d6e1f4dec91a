"""GLoRA: W' = W + scale * (W A1 A2 + B1 B2), a change that depends on the base weight.

Chavan et al., arXiv 2306.07967, as LyCORIS has it (lycoris/modules/glora.py). Slots, r = rank, ones = 1, 1:

    linear      a1 (in, r)          a2 (r, in)          b1 (out, r)          b2 (r, in)
    conv        a1 (in, r, *ones)   a2 (r, in, *ones)   b1 (out, r, *ones)   b2 (r, in, *kernel)
    Tucker      b2 (r, in, *ones)   bm (r, r, *kernel), the rest as above
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vislora.algorithms.base import (
    Algorithm,
    InitOptions,
    Kind,
    LayerSpec,
    Slots,
    add_weight,
    base_weight,
    drawn,
    require_kind,
)
from vislora.errors import AdapterFileError

PLAIN = frozenset({"a1", "a2", "b1", "b2"})
TUCKER = PLAIN | {"bm"}
LAYERS: frozenset[Kind] = frozenset({"linear", "conv"})


def matches(names: frozenset[str]) -> bool:
    """Say whether these slot names are GLoRA's."""
    return names in (PLAIN, TUCKER)


def init(spec: LayerSpec, options: InitOptions) -> dict[str, Tensor]:
    """Draw fresh float32 slots: a1 and b1 as `options.init` says, a2 and b2 zero. No Tucker core, as LyCORIS."""
    require_kind("glora", spec, LAYERS)
    rank = options.rank
    out, fan_in, *kernel = spec.weight_shape
    ones = [1] * len(kernel)
    return {
        "a1": drawn((fan_in, rank, *ones), options),
        "a2": torch.zeros(rank, fan_in, *ones),
        "b1": drawn((out, rank, *ones), options),
        "b2": torch.zeros(rank, fan_in, *kernel),
    }


def kinds(slots: Slots) -> frozenset[Kind]:
    """Return the kinds of layers that these slots can be put on."""
    return LAYERS


def rank(slots: Slots) -> int:
    """Return r."""
    return slots["a2"].shape[0]


def shape(slots: Slots) -> tuple[int, ...]:
    """Return the shape of the delta. Raises `AdapterFileError` when the slots do not fit each other."""
    a1, a2, b1, b2 = (slots[name] for name in ("a1", "a2", "b1", "b2"))
    ranks = {a1.shape[1], a2.shape[0], b1.shape[1], b2.shape[0], *(slots["bm"].shape[:2] if "bm" in slots else ())}
    if len(ranks) > 1 or not a1.shape[0] == a2.shape[1] == b2.shape[1]:
        shapes = ", ".join(f"{name} {tuple(slot.shape)}" for name, slot in slots.items())
        raise AdapterFileError(f"the slots are not of one rank and one layer: {shapes}; the file is damaged")
    return b1.shape[0], b2.shape[1], *slots["bm" if "bm" in slots else "b2"].shape[2:]


def delta(slots: Slots, scale: float, base: Tensor | None = None) -> Tensor:
    """Return scale * (W A1 A2 + B1 B2) in the shape of `base`, which is W."""
    if base is None:
        raise ValueError("GLoRA depends on the base weight")
    on_input = torch.einsum("oi...,ij->oj...", base, slots["a1"].flatten(1) @ slots["a2"].flatten(1))
    up, down = slots["b1"].flatten(1), slots["b2"]
    if "bm" in slots:
        beside = torch.einsum("mn...,om,ni->oi...", slots["bm"], up, down.flatten(1))
    else:
        beside = up @ down.flatten(1)
    return scale * (on_input + beside.reshape(base.shape))


def forward(
    x: Tensor, base_out: Tensor, slots: Slots, scale: float, layer: nn.Module, rank_dropout: float = 0.0
) -> Tensor:
    """Return base_out plus the layer with the delta as its weight; there is no rank dropout."""
    return add_weight(x, base_out, delta(slots, scale, base_weight(layer, slots["a1"])), layer)


GLORA = Algorithm(
    name="glora",
    slots=TUCKER,
    matches=matches,
    init=init,
    rank=rank,
    shape=shape,
    kinds=kinds,
    delta=delta,
    forward=forward,
    needs_base=True,
)
