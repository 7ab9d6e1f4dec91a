"""OFT: W' = s * R^T W, where R turns blocks of output rows and is made orthogonal by Cayley's map of a skew matrix.

R = (I + Q) (I - Q)^-1 per block, Q = blocks - blocks^T (Qiu et al., arXiv 2306.07280), as LyCORIS' diag-OFT
(lycoris/modules/diag_oft.py) and sd-scripts' networks/oft.py have it; both agree. Slots:

    oft_blocks (blocks, n, n)   rescale (out, 1, ...), optional: s, a factor per output
    alpha (), optional, but LyCORIS wants one: no scale but a constraint. The norm of all of Q is at most alpha * out;
    0 or none: no limit
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
    block_size,
    require_kind,
)

SLOTS = frozenset({"oft_blocks", "rescale", "alpha"})
CONSTANTS = frozenset({"alpha"})
LAYERS: frozenset[Kind] = frozenset({"linear", "conv"})


def matches(names: frozenset[str]) -> bool:
    """Say whether these slot names are OFT's."""
    return "oft_blocks" in names and names <= SLOTS


def init(spec: LayerSpec, options: InitOptions) -> dict[str, Tensor]:
    """Return zero blocks, R = I, without a limit; the side is the smallest divisor of `out` from `options.rank` on."""
    require_kind("oft", spec, LAYERS)
    side = block_size(spec.weight_shape[0], options.rank)
    return {"oft_blocks": torch.zeros(spec.weight_shape[0] // side, side, side), "alpha": torch.tensor(0.0)}


def kinds(slots: Slots) -> frozenset[Kind]:
    """Return the kinds of layers that these slots can be put on."""
    return LAYERS


def rank(slots: Slots) -> int:
    """Return 1: a rotation has no rank."""
    return 1


def own_rule(slots: Slots) -> Rule:
    """Return "constraint": alpha is no scale."""
    return "constraint"


def shape(slots: Slots) -> tuple[int, ...]:
    """Return the shape of the delta as a matrix, of which only the outputs are known."""
    blocks, side, _ = slots["oft_blocks"].shape
    return blocks * side, ANY


def delta(slots: Slots, scale: float, base: Tensor | None = None) -> Tensor:
    """Return scale * (s * R^T W - W) in the shape of `base`, which is W."""
    if base is None:
        raise ValueError("OFT depends on the base weight")
    blocks = slots["oft_blocks"]
    count, side, _ = blocks.shape
    turn = rotation(skew(blocks, slots.get("alpha"), count * side))
    turned = (turn.mT @ base.reshape(count, side, -1)).reshape(base.shape)
    return scale * rescaled(turned, base, slots)


def forward(
    x: Tensor, base_out: Tensor, slots: Slots, scale: float, layer: nn.Module, rank_dropout: float = 0.0
) -> Tensor:
    """Return base_out plus the layer with the delta as its weight: the bias is not turned. No rank dropout."""
    return add_weight(x, base_out, delta(slots, scale, base_weight(layer, slots["oft_blocks"])), layer)


def skew(blocks: Tensor, alpha: Tensor | None, out: int) -> Tensor:
    """Return Q = blocks - blocks^T, all of it shrunk so that its norm is at most alpha * out."""
    matrices = blocks - blocks.mT
    limit = 0.0 if alpha is None else float(alpha) * out
    if limit <= 0.0:
        return matrices
    return matrices * (limit / torch.linalg.vector_norm(matrices)).clamp(max=1.0)


def rotation(matrices: Tensor) -> Tensor:
    """Return R - I = 2 Q (I - Q)^-1, exactly zero for Q = 0. Half precision is computed in float32."""
    wide = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
    identity = torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device).expand_as(wide)
    return torch.linalg.solve(identity - wide, 2.0 * wide, left=False).to(matrices.dtype)


def rescaled(change: Tensor, base: Tensor, slots: Slots) -> Tensor:
    """Return s * (base + change) - base: `change` as it is where there is no rescale."""
    if "rescale" not in slots:
        return change
    factor = slots["rescale"].reshape(-1, *[1] * (base.dim() - 1))
    return factor * change + (factor - 1.0) * base


OFT = Algorithm(
    name="oft",
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
