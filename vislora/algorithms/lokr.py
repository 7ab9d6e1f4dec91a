"""LoKr: W' = W + scale * kron(W1, W2), a small full factor times a large one, which is a low-rank product.

LyCORIS (Yeh et al., arXiv 2309.14859, section 3), after KronA (Edalati et al., arXiv 2212.10650). With out = l * k and
in = m * n; either factor is full or a product:

    W1 (l, m)             lokr_w1 (l, m)             or lokr_w1_a (l, r)   lokr_w1_b (r, m)
    W2 (k, n, *kernel)    lokr_w2 (k, n, *kernel)    or lokr_w2_a (k, r)   lokr_w2_b (r, n * kernel)
    W2 with Tucker        lokr_w2_a (r, k)   lokr_w2_b (r, n)   lokr_t2 (r, r, *kernel)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vislora.algorithms.base import Algorithm, InitOptions, LayerSpec, Rule, Slots, add_weight, drawn
from vislora.errors import AdapterFileError

FIRST = (frozenset({"lokr_w1"}), frozenset({"lokr_w1_a", "lokr_w1_b"}))
SECOND = (
    frozenset({"lokr_w2"}),
    frozenset({"lokr_w2_a", "lokr_w2_b"}),
    frozenset({"lokr_w2_a", "lokr_w2_b", "lokr_t2"}),
)
FORMS = frozenset(first | second for first in FIRST for second in SECOND)


def matches(names: frozenset[str]) -> bool:
    """Say whether these slot names are LoKr's."""
    return names in FORMS


def init(spec: LayerSpec, options: InitOptions) -> dict[str, Tensor]:
    """Draw fresh float32 slots: W1 full and as near to square as the layer's sizes allow, W2 zero.

    W2 is a product of `options.rank` when that saves numbers (rank below half of its longer side), else full.
    """
    rank = options.rank
    out, fan_in, *kernel = spec.weight_shape
    (rows, big_rows), (columns, big_columns) = factors(out), factors(fan_in)
    slots = {"lokr_w1": drawn((rows, columns), options)}
    if 2 * rank >= max(big_rows, big_columns):
        return {**slots, "lokr_w2": torch.zeros(big_rows, big_columns, *kernel)}
    if options.tucker and math.prod(kernel) > 1:
        slots["lokr_t2"] = drawn((rank, rank, *kernel), options)
        return {**slots, "lokr_w2_a": drawn((rank, big_rows), options), "lokr_w2_b": torch.zeros(rank, big_columns)}
    right = torch.zeros(rank, big_columns * math.prod(kernel))
    return {**slots, "lokr_w2_a": drawn((big_rows, rank), options), "lokr_w2_b": right}


def factors(size: int) -> tuple[int, int]:
    """Return the two factors of `size` that are nearest to each other, the smaller one first."""
    small = next(number for number in range(math.isqrt(size), 0, -1) if size % number == 0)
    return small, size // small


def rank(slots: Slots) -> int:
    """Return r: of W2 if that is a product, else of W1; 1 when both are full, where no alpha counts."""
    found = next((slots[name] for name in ("lokr_w2_b", "lokr_w1_b") if name in slots), None)
    return 1 if found is None else found.shape[0]


def own_rule(slots: Slots) -> Rule | None:
    """Return "ignored" when both factors are full: LyCORIS then takes 1 as the scale, whatever alpha is stored."""
    return "ignored" if "lokr_w1" in slots and "lokr_w2" in slots else None


def shape(slots: Slots) -> tuple[int, ...]:
    """Return the shape of the delta. Raises `AdapterFileError` when the slots do not fit each other."""
    first = _product_shape(slots, "lokr_w1")
    second = _product_shape(slots, "lokr_w2")
    if first is None or second is None or len(first) != 2:
        shown = ", ".join(f"{name} {tuple(slot.shape)}" for name, slot in slots.items())
        raise AdapterFileError(f"the slots are not the factors of one product: {shown}; the file is damaged")
    return first[0] * second[0], first[1] * second[1], *second[2:]


def delta(slots: Slots, scale: float, base: Tensor | None = None) -> Tensor:
    """Return scale * kron(W1, W2): (out, in, *kernel), (out, in * kernel) when W2 is a plain product."""
    first, second = _factor(slots, "lokr_w1"), _factor(slots, "lokr_w2")
    flat = torch.kron(first, second.flatten(1))
    return scale * flat.reshape(flat.shape[0], first.shape[1] * second.shape[1], *second.shape[2:])


def forward(
    x: Tensor, base_out: Tensor, slots: Slots, scale: float, layer: nn.Module, rank_dropout: float = 0.0
) -> Tensor:
    """Return base_out plus the layer with the delta as its weight. No channel is of one rank: no rank dropout."""
    return add_weight(x, base_out, delta(slots, scale), layer)


def _factor(slots: Slots, name: str) -> Tensor:
    if name in slots:
        return slots[name]
    left, right = slots[f"{name}_a"], slots[f"{name}_b"]
    core = slots.get("lokr_t2") if name == "lokr_w2" else None
    return left @ right if core is None else torch.einsum("ij...,ip,jr->pr...", core, left, right)


def _product_shape(slots: Slots, name: str) -> tuple[int, ...] | None:
    if name in slots:
        return tuple(slots[name].shape) if slots[name].dim() >= 2 else None
    left, right = slots[f"{name}_a"], slots[f"{name}_b"]
    core = slots.get("lokr_t2") if name == "lokr_w2" else None
    if left.dim() != 2 or right.dim() != 2:
        return None
    if core is None:
        return (left.shape[0], right.shape[1]) if left.shape[1] == right.shape[0] else None
    joined = (left.shape[0], right.shape[0]) == tuple(core.shape[:2])
    return (left.shape[1], right.shape[1], *core.shape[2:]) if joined else None


LOKR = Algorithm(
    name="lokr",
    slots=frozenset().union(*FORMS),
    matches=matches,
    init=init,
    rank=rank,
    shape=shape,
    delta=delta,
    forward=forward,
    flat=True,
    own_rule=own_rule,
)
