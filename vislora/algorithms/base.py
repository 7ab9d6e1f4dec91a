"""The contract of an algorithm, and the kinds of layers that adapters can be put on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vislora.errors import ConfigError

Slots = Mapping[str, Tensor]
Rule = Literal["alpha/r", "alpha/sqrt(r)", "scale", "none", "constraint", "ignored"]
Init = Literal["kaiming", "gaussian"]
Kind = Literal["linear", "conv", "embedding", "norm"]
Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
KINDS: frozenset[Kind] = frozenset({"linear", "conv", "embedding"})
"""Those that fresh adapters are put on; a norm only takes what a file holds for it."""
RMS_NORMS = ("RMSNorm", "T5LayerNorm")
"""How the names of their classes end: torch, diffusers and transformers each have their own."""
ANY = -1
"""In the shape of a delta: a size that the slots do not tell."""


@dataclass(frozen=True)
class LayerSpec:
    """What an algorithm has to know of a base layer.

    `weight_shape`: linear (out, in); conv (out, in / groups, *kernel); embedding (entries, width); norm (channels,).
    """

    kind: Kind
    weight_shape: tuple[int, ...]
    groups: int = 1

    @staticmethod
    def of(layer: nn.Module) -> LayerSpec | None:
        """Describe `layer`, or return None when no algorithm can be put on its class.

        An embedding with `max_norm` rescales its own weight while it runs, so no change of it means one thing.
        """
        if isinstance(layer, nn.Linear):
            return LayerSpec("linear", (layer.out_features, layer.in_features))
        if isinstance(layer, nn.Embedding) and layer.max_norm is None:
            return LayerSpec("embedding", (layer.num_embeddings, layer.embedding_dim))
        if isinstance(layer, Conv):
            shape = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
            return LayerSpec("conv", shape, layer.groups)
        return None

    @staticmethod
    def of_norm(layer: nn.Module) -> LayerSpec | None:
        """Describe `layer` when it is a LayerNorm, GroupNorm or RMSNorm with a weight per channel, else return None."""
        if isinstance(layer, (nn.LayerNorm, nn.GroupNorm)) or type(layer).__name__.endswith(RMS_NORMS):
            weight = getattr(layer, "weight", None)
            if isinstance(weight, Tensor) and weight.dim() == 1:
                return LayerSpec("norm", tuple(weight.shape))
        return None


@dataclass(frozen=True)
class InitOptions:
    """How fresh slots are drawn. `tucker`: k x k convs become 1x1, k x k, 1x1. `init`: of the down projection."""

    rank: int
    tucker: bool = False
    init: Init = "kaiming"
    generator: torch.Generator | None = None


def every_kind(slots: Slots) -> frozenset[Kind]:
    """Return all kinds of layers. A named function, as `no_rule` is, so that an adapted model can be pickled."""
    return KINDS


def no_rule(slots: Slots) -> Rule | None:
    """Return None: the file decides on the rule of the scale."""
    return None


@dataclass(frozen=True)
class Algorithm:
    """One adapter algorithm as plain functions over named slots (tensors go in and come out under the same names).

    slots: every slot name that the algorithm may have. matches(names): are these slots (alpha left out) its own?
    init(spec, options): fresh slots, zero effect; raises `ConfigError` for a layer that this algorithm does not fit.
    rank(slots): the rank, 1 where there is no such thing. shape(slots): that of the delta, `ANY` for unknown sizes.
    kinds(slots): the kinds of layers that these slots can be put on.
    delta(slots, scale, base): the change of the base weight, of the base weight's shape, in the slots' dtype. It is
    linear in the scale for every algorithm: a strength multiplies the trained effect, also of a rotation.
    forward(x, base_out, slots, scale, layer, rank_dropout): `base_out` plus the change.
    flat: slots may not tell the kernel; then shape and delta are a matrix, (out, all the rest).
    own_rule(slots): the rule of the scale that these slots have whatever the file says, None when there is no such.
    needs_base: the change depends on the base weight, so that delta cannot do without `base`.
    constants: slots that are settings, a number each, which Python reads: not learned, and always on the CPU.
    """

    name: str
    slots: frozenset[str]
    matches: Callable[[frozenset[str]], bool]
    init: Callable[[LayerSpec, InitOptions], dict[str, Tensor]]
    rank: Callable[[Slots], int]
    shape: Callable[[Slots], tuple[int, ...]]
    delta: Callable[[Slots, float, Tensor | None], Tensor]
    forward: Callable[[Tensor, Tensor, Slots, float, nn.Module, float], Tensor]
    kinds: Callable[[Slots], frozenset[Kind]] = every_kind
    flat: bool = False
    own_rule: Callable[[Slots], Rule | None] = no_rule
    needs_base: bool = False
    constants: frozenset[str] = frozenset()

    def moved(self, slots: Slots, device: torch.device, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Return `slots` on a device, those of floating numbers in `dtype` if given; constants stay as they are."""
        return {
            name: slot
            if name in self.constants
            else slot.to(device, dtype if dtype is not None and slot.is_floating_point() else slot.dtype)
            for name, slot in slots.items()
        }

    def scale(self, slots: Slots, alpha: float | None, rule: Rule) -> float:
        """Return the factor on the product of `slots`, by their own rule unless `alpha` is said to be the factor."""
        return scale_of(alpha, self.rank(slots), rule if rule == "scale" else self.own_rule(slots) or rule)


def scale_of(alpha: float | None, rank: int, rule: Rule = "alpha/r") -> float:
    """Return the factor on a module's product: the only place where alpha and rank become one number.

    A missing alpha means alpha = rank. Rank-stabilised scale: alpha / sqrt(rank) (Kalajdzievski, arXiv 2312.03732).
    Rule "scale": alpha is the factor itself.
    """
    if rule in ("none", "constraint", "ignored"):
        return 1.0
    if rule == "scale":
        return 1.0 if alpha is None else alpha
    alpha = float(rank) if alpha is None else alpha
    return alpha / (math.sqrt(rank) if rule == "alpha/sqrt(r)" else rank)


def drawn(size: tuple[int, ...], options: InitOptions) -> Tensor:
    """Draw a projection as `options.init` says: Kaiming-uniform (a = sqrt 5) or Gaussian (std 1 / rank)."""
    tensor = torch.empty(size)
    if options.init == "gaussian":
        return tensor.normal_(0.0, 1.0 / options.rank, generator=options.generator)
    if options.init == "kaiming":
        return nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=options.generator)
    raise ConfigError(f"unknown init '{options.init}'; known: kaiming, gaussian")


def fits(shape: tuple[int, ...], weight: tuple[int, ...], flat: bool) -> bool:
    """Say whether a delta of `shape` is one for a weight of this shape; `flat` as in `Algorithm`."""
    if flat and len(shape) == 2:
        weight = weight[0], math.prod(weight[1:])
    if len(shape) != len(weight):
        shape, weight = _without_ones(shape), _without_ones(weight)
    return len(shape) == len(weight) and all(size in (ANY, side) for size, side in zip(shape, weight, strict=True))


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Drop the kernel of a 1 x 1 conv: files store such layers as linear ones too."""
    return shape[:2] if all(size in (1, ANY) for size in shape[2:]) else shape


def require_kind(name: str, spec: LayerSpec, kinds: frozenset[Kind]) -> None:
    """Raise `ConfigError` when the algorithm `name` fits no layer like `spec`."""
    if spec.kind not in kinds:
        known = " or ".join(sorted(kinds)) or "none that adapters are put on"
        raise ConfigError(f"algorithm '{name}' fits layers of the kind {known}, this one is of the kind {spec.kind}")


def base_weight(layer: nn.Module, slot: Tensor) -> Tensor:
    """Return the weight of `layer` on the device and in the dtype of `slot`, for a change that depends on it."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.to(slot.device, slot.dtype)


def block_size(size: int, rank: int) -> int:
    """Return the smallest divisor of `size` that is at least `rank`: the side of the blocks of a rotation."""
    return next((number for number in range(max(rank, 2), size) if size % number == 0), size)


def add_weight(x: Tensor, base_out: Tensor, delta: Tensor, layer: nn.Module) -> Tensor:
    """Return `base_out` plus what `layer` computes with `delta` as its weight; a flat delta gets the weight's shape."""
    spec = LayerSpec.of(layer) or LayerSpec.of_norm(layer)
    if spec is not None and spec.kind == "norm":
        return base_out + _normalised(x, layer) * delta.reshape(
            -1, *[1] * (x.dim() - 2 if by_second_axis(layer) else 0)
        )
    if spec is None:
        raise TypeError(f"no adapters on {type(layer).__name__}")
    weight = delta.reshape(spec.weight_shape)
    # without the layer's padding_idx, which would keep gradients from that entry's delta
    return base_out + (F.embedding(x, weight) if spec.kind == "embedding" else apply_weight(layer, x, weight, None))


def by_second_axis(layer: nn.Module) -> bool:
    """Say whether the channels of what `layer` gives are its axis 1, and not the last one."""
    return isinstance(layer, (*CONVS, nn.GroupNorm))


def _normalised(x: Tensor, layer: nn.Module) -> Tensor:
    """Return what a norm multiplies its weight with."""
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(x, layer.num_groups, eps=layer.eps)
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(x, layer.normalized_shape, eps=layer.eps)
    return F.rms_norm(x, x.shape[-1:], eps=getattr(layer, "eps", getattr(layer, "variance_epsilon", None)))


def apply_weight(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute what `layer` computes, with another weight and bias; stride, padding, groups and so on are its own."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    if isinstance(layer, nn.Embedding):
        return F.embedding(x, weight, layer.padding_idx)
    if isinstance(layer, Conv):
        return layer._conv_forward(x, weight, bias)
    raise TypeError(f"no adapters on {type(layer).__name__}")
