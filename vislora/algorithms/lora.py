"""LoRA: W' = W + scale * B A (Hu et al., arXiv 2106.09685, section 4.1), on linear, conv and embedding layers.

A conv is a low-rank decomposition: k x k down to r channels, then 1 x 1 up (LoCon); or Tucker: 1 x 1, k x k, 1 x 1
(Yeh et al., arXiv 2309.14859, section 3). Slots, r = rank:

    linear      down (r, in)                    up (out, r)
    conv        down (r, in / groups, *kernel)  up (out, r, 1, ...)
    Tucker      down (r, in, 1, ...)            up (out, r, 1, ...)     mid (r, r, *kernel)
    embedding   embedding_down (r, entries)     embedding_up (width, r)

LyCORIS' extraction also keeps the largest numbers of what low rank left over. It calls them a bias, but they belong to
the weight, B A + S, where S is sparse and a matrix (out, all the rest):

    any layer   bias_indices (2, count)         bias_values (count,)        bias_size (2,)
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vislora.algorithms.base import Algorithm, Conv, InitOptions, Kind, LayerSpec, Slots, add_weight, drawn
from vislora.errors import AdapterFileError

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
PLAIN = frozenset({"down", "up"})
TUCKER = frozenset({"down", "up", "mid"})
EMBEDDING = frozenset({"embedding_down", "embedding_up"})
SPARSE = frozenset({"bias_indices", "bias_values", "bias_size"})


def matches(names: frozenset[str]) -> bool:
    """Say whether these slot names are LoRA's."""
    return names in (PLAIN, TUCKER, EMBEDDING, PLAIN | SPARSE, TUCKER | SPARSE)


def init(spec: LayerSpec, options: InitOptions) -> dict[str, Tensor]:
    """Draw fresh float32 slots: down Kaiming-uniform (a = sqrt 5) or Gaussian (std 1 / r), up zero."""
    rank = options.rank
    if spec.kind == "embedding":
        entries, width = spec.weight_shape
        return {"embedding_down": drawn((rank, entries), options), "embedding_up": torch.zeros(width, rank)}
    out, fan_in, *kernel = spec.weight_shape
    ones = [1] * len(kernel)
    up = torch.zeros(out, rank, *ones)
    if not (options.tucker and math.prod(kernel) > 1 and spec.groups == 1):
        return {"down": drawn((rank, fan_in, *kernel), options), "up": up}
    mid = drawn((rank, rank, *kernel), options)
    return {"down": drawn((rank, fan_in, *ones), options), "up": up, "mid": mid}


def rank(slots: Slots) -> int:
    """Return r."""
    return slots["embedding_down" if "embedding_down" in slots else "down"].shape[0]


def shape(slots: Slots) -> tuple[int, ...]:
    """Return the shape of the delta. Raises `AdapterFileError` when the slots are not of one rank."""
    _require_one_rank(slots)
    if "embedding_down" in slots:
        return slots["embedding_down"].shape[1], slots["embedding_up"].shape[0]
    kernel = slots["mid" if "mid" in slots else "down"].shape[2:]
    return slots["up"].shape[0], slots["down"].shape[1], *kernel


def kinds(slots: Slots) -> frozenset[Kind]:
    """Return the kinds of layers that these slots can be put on."""
    return frozenset({"embedding"}) if "embedding_down" in slots else frozenset({"linear", "conv"})


def delta(slots: Slots, scale: float, base: Tensor | None = None) -> Tensor:
    """Return scale * B A in the shape of the base weight; `base` is not needed."""
    if "embedding_down" in slots:
        return scale * (slots["embedding_up"] @ slots["embedding_down"]).T
    up, down = slots["up"].flatten(1), slots["down"]
    if "mid" in slots:
        # LyCORIS' order of the core: mid[m, n] joins up's column m with down's row n
        product = torch.einsum("mn...,om,ni->oi...", slots["mid"], up, down.flatten(1))
    else:
        product = (up @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])
    return scale * (product + _sparse(slots).reshape(product.shape) if slots.keys() >= SPARSE else product)


def _sparse(slots: Slots) -> Tensor:
    """Return the sparse rest S as a matrix (out, all the rest). Raises `AdapterFileError` when it is of another."""
    rows, columns = (int(size) for size in _unsigned(slots["bias_size"]))
    place, values = _unsigned(slots["bias_indices"]), slots["bias_values"]
    out, *others = shape(slots)
    inside = not place.numel() or bool((place[0] < rows).all() and (place[1] < columns).all())
    if (rows, columns) != (out, math.prod(others)) or not inside:
        raise AdapterFileError(f"its sparse rest is of {rows} x {columns}, its delta of {out} x {math.prod(others)}")
    return values.new_zeros(rows * columns).index_add(0, place[0] * columns + place[1], values).reshape(rows, columns)


def _unsigned(numbers: Tensor) -> Tensor:
    """Return whole numbers that were forced into int16, as LyCORIS does even where they are too large for it."""
    return numbers.to(torch.int64) & 0xFFFF if numbers.dtype == torch.int16 else numbers.to(torch.int64)


def forward(
    x: Tensor, base_out: Tensor, slots: Slots, scale: float, layer: nn.Module, rank_dropout: float = 0.0
) -> Tensor:
    """Return base_out + scale * B(A(x)); `rank_dropout` is the share of the r channels left out, per sample."""
    if "embedding_down" in slots:
        hidden = _dropped(F.embedding(x, slots["embedding_down"].T), rank_dropout, -1)
        return torch.add(base_out, F.linear(hidden, slots["embedding_up"]), alpha=scale)
    if slots.keys() >= SPARSE:
        base_out = add_weight(x, base_out, scale * _sparse(slots), layer)
    if isinstance(layer, nn.Linear):
        return _linear(x, base_out, slots, scale, rank_dropout)
    if isinstance(layer, Conv):
        return _conv(x, base_out, slots, scale, layer, rank_dropout)
    raise TypeError(f"no LoRA on {type(layer).__name__}")


def _linear(x: Tensor, base_out: Tensor, slots: Slots, scale: float, rank_dropout: float) -> Tensor:
    hidden = _dropped(F.linear(x, slots["down"].flatten(1)), rank_dropout, -1)
    rows = base_out.reshape(-1, base_out.shape[-1])
    added = torch.addmm(rows, hidden.reshape(-1, hidden.shape[-1]), slots["up"].flatten(1).T, alpha=scale)
    return added.reshape(base_out.shape)


def _conv(x: Tensor, base_out: Tensor, slots: Slots, scale: float, layer: Conv, rank_dropout: float) -> Tensor:
    """Apply A with the base layer's own stride, padding and dilation, then B; the hidden channels are r * groups."""
    axes, groups = len(layer.kernel_size), layer.groups
    conv = CONV[axes]
    core, up = _as_conv(slots["down"], axes), _as_conv(slots["up"], axes)
    if "mid" in slots:
        x = conv(x, _repeated(core, groups), groups=groups)
        core = slots["mid"]
    hidden = layer._conv_forward(x, _repeated(core, groups), None)
    hidden = _dropped(hidden, rank_dropout, -1 - axes)
    return torch.add(base_out, conv(hidden, up, groups=groups), alpha=scale)


def _as_conv(slot: Tensor, axes: int) -> Tensor:
    """Give a linear slot (rows, columns) the kernel of a 1 x 1 conv: files store such layers either way."""
    return slot.reshape(*slot.shape, *[1] * axes) if slot.dim() == 2 else slot


def _repeated(weight: Tensor, groups: int) -> Tensor:
    """Let every group see the same A, so that the sum equals a conv with the delta."""
    return weight.repeat(groups, *[1] * (weight.dim() - 1)) if groups > 1 else weight


def _dropped(hidden: Tensor, p: float, axis: int) -> Tensor:
    """Zero whole rank channels, each sample its own, and scale the rest by 1 / (1 - p)."""
    if p == 0.0:
        return hidden
    mask_shape = [1] * hidden.dim()
    mask_shape[0], mask_shape[axis] = hidden.shape[0], hidden.shape[axis]
    keep = torch.rand(mask_shape, device=hidden.device) >= p
    return hidden * keep.to(hidden.dtype) / (1.0 - p)


def _require_one_rank(slots: Slots) -> None:
    if "embedding_down" in slots:
        ranks = {slots["embedding_down"].shape[0], slots["embedding_up"].shape[1]}
    else:
        ranks = {slots["down"].shape[0], slots["up"].shape[1], *(slots["mid"].shape[:2] if "mid" in slots else ())}
    if len(ranks) > 1:
        shapes = ", ".join(f"{name} {tuple(slot.shape)}" for name, slot in slots.items())
        raise AdapterFileError(f"the slots are not of one rank: {shapes}; the file is damaged or of another algorithm")


LORA = Algorithm(
    name="lora",
    slots=TUCKER | EMBEDDING | SPARSE,
    matches=matches,
    init=init,
    rank=rank,
    shape=shape,
    kinds=kinds,
    delta=delta,
    forward=forward,
)
