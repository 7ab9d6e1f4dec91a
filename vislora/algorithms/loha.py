"""LoHa: W' = W + scale * (A1 B1) * (A2 B2), the entrywise product of two low-rank products, of rank up to r^2.

FedPara (Hyeon-Woo et al., arXiv 2108.06098, section 2.2); as LyCORIS has it (Yeh et al., arXiv 2309.14859, section 3).
Slots for i = 1 and 2, r = rank; a weight with a kernel is the matrix (out, in * kernel), or Tucker-decomposed:

    any layer   hada_wi_a (out, r)      hada_wi_b (r, in * kernel)
    Tucker      hada_wi_a (r, out)      hada_wi_b (r, in)              hada_ti (r, r, *kernel)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vislora.algorithms.base import Algorithm, InitOptions, LayerSpec, Slots, add_weight
from vislora.errors import AdapterFileError

PLAIN = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
TUCKER = PLAIN | {"hada_t1", "hada_t2"}


def matches(names: frozenset[str]) -> bool:
    """Say whether these slot names are LoHa's."""
    return names in (PLAIN, TUCKER)


def init(spec: LayerSpec, options: InitOptions) -> dict[str, Tensor]:
    """Draw fresh float32 slots as LyCORIS does, whatever `options.init`: normal, with hada_w2_a zero."""
    rank = options.rank
    out, fan_in, *kernel = spec.weight_shape
    tucker = options.tucker and math.prod(kernel) > 1
    left = (rank, out) if tucker else (out, rank)
    right = (rank, fan_in) if tucker else (rank, fan_in * math.prod(kernel))
    slots = {
        "hada_w1_a": _normal(left, 0.1, options),
        "hada_w1_b": _normal(right, 1.0, options),
        "hada_w2_a": torch.zeros(left),
        "hada_w2_b": _normal(right, 1.0, options),
    }
    if tucker:
        slots["hada_t1"] = _normal((rank, rank, *kernel), 0.1, options)
        slots["hada_t2"] = _normal((rank, rank, *kernel), 0.1, options)
    return slots


def rank(slots: Slots) -> int:
    """Return r, the rank of each of the two products."""
    return slots["hada_w1_b"].shape[0]


def shape(slots: Slots) -> tuple[int, ...]:
    """Return the shape of the delta. Raises `AdapterFileError` when the two products do not fit each other."""
    first, second = (_product_shape(slots, index) for index in (1, 2))
    if first is None or first != second:
        shown = ", ".join(f"{name} {tuple(slot.shape)}" for name, slot in slots.items())
        raise AdapterFileError(f"the slots are not two products of one shape: {shown}; the file is damaged")
    return first


def delta(slots: Slots, scale: float, base: Tensor | None = None) -> Tensor:
    """Return scale * (A1 B1) * (A2 B2): (out, in * kernel), with Tucker (out, in, *kernel); `base` is not needed."""
    return scale * _product(slots, 1) * _product(slots, 2)


def forward(
    x: Tensor, base_out: Tensor, slots: Slots, scale: float, layer: nn.Module, rank_dropout: float = 0.0
) -> Tensor:
    """Return base_out plus the layer with the delta as its weight. No channel is of one rank: no rank dropout."""
    return add_weight(x, base_out, delta(slots, scale), layer)


def _product(slots: Slots, index: int) -> Tensor:
    left, right = slots[f"hada_w{index}_a"], slots[f"hada_w{index}_b"]
    core = slots.get(f"hada_t{index}")
    return left @ right if core is None else torch.einsum("ij...,ip,jr->pr...", core, left, right)


def _product_shape(slots: Slots, index: int) -> tuple[int, ...] | None:
    left, right = slots[f"hada_w{index}_a"], slots[f"hada_w{index}_b"]
    core = slots.get(f"hada_t{index}")
    if left.dim() != 2 or right.dim() != 2:
        return None
    if core is None:
        return (left.shape[0], right.shape[1]) if left.shape[1] == right.shape[0] else None
    joined = (left.shape[0], right.shape[0]) == tuple(core.shape[:2])
    return (left.shape[1], right.shape[1], *core.shape[2:]) if joined else None


def _normal(size: tuple[int, ...], std: float, options: InitOptions) -> Tensor:
    return torch.empty(size).normal_(0.0, std, generator=options.generator)


LOHA = Algorithm(
    name="loha",
    slots=TUCKER,
    matches=matches,
    init=init,
    rank=rank,
    shape=shape,
    delta=delta,
    forward=forward,
    flat=True,
)
