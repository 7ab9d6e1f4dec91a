"""What adapters compute beside their base layer: one of any algorithm, several LoRAs as one, or each image its own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vislora.algorithms.base import Algorithm, Conv, add_weight, by_second_axis
from vislora.algorithms.dora import Axis, decomposed, norms, ratio
from vislora.algorithms.lora import CONV, PLAIN
from vislora.inject.moment import Moment

SPARE = 2
"""Each image gets its own matrices where that divides the rank that its tokens see by at least as much."""


@dataclass(frozen=True)
class Dropout:
    """Shares in [0, 1) left out while training: of the input's elements, of the rank's channels, of whole modules."""

    input: float = 0.0
    rank: float = 0.0
    module: float = 0.0


class Part(Protocol):
    """Something that is added to the output of a base layer."""

    def apply(self, x: Tensor, base_out: Tensor, layer: nn.Module) -> Tensor:
        """Return `base_out` plus the effect on `x`, in the dtype of `base_out`."""
        ...


@dataclass
class LayerAdapter:
    """One adapter on one layer. `scale` comes from the file (alpha / rank); strengths are the user's multipliers.

    magnitude, axis: DoRA's, on top of the algorithm. bias: the change of the layer's bias; when there are no slots, it
    is all there is. strengths: what holds in every step and place, one number or one per image of the batch. varies:
    the strength is not one number, see the `moment`. name, path: what it is called there.
    """

    algorithm: Algorithm
    slots: dict[str, Tensor]
    scale: float
    magnitude: Tensor | None = None
    axis: Axis = "out"
    bias: Tensor | None = None
    strengths: tuple[float, ...] = (1.0,)
    varies: bool = False
    moment: Moment = field(default_factory=Moment)
    name: str = ""
    path: str = ""
    dropout: Dropout = field(default_factory=Dropout)
    training: bool = False

    @property
    def is_active(self) -> bool:
        """Say whether this has an effect on any image."""
        return any(strength != 0.0 for strength in self.strengths)

    @property
    def is_plain(self) -> bool:
        """Say whether this is a LoRA of two matrices and nothing else."""
        return self.algorithm.name == "lora" and self.slots.keys() == PLAIN and self.magnitude is self.bias is None

    @property
    def is_constant(self) -> bool:
        """Say whether the strength is one number."""
        return not self.varies

    def strength_on(self, image: int) -> float:
        """Return what holds for one image in every step and place."""
        return self.strengths[image if len(self.strengths) > 1 else 0]

    def apply(self, x: Tensor, base_out: Tensor, layer: nn.Module) -> Tensor:
        """Return `base_out` plus this adapter's effect on `x`, in the dtype of `base_out`."""
        rank_dropout = 0.0
        strength = self.strengths[0] if self.is_constant else 1.0
        if self.training:
            if self.dropout.module:
                if torch.rand(()).item() < self.dropout.module:
                    return base_out
                # like the other two, so that the expected effect is the one that is seen without dropout
                strength /= 1.0 - self.dropout.module
            rank_dropout = self.dropout.rank
            x = F.dropout(x, self.dropout.input) if self.dropout.input and x.is_floating_point() else x
        if self.is_constant:
            return self._changed(x, base_out, strength, layer, rank_dropout)
        effect = self._changed(x, torch.zeros_like(base_out), 1.0, layer, rank_dropout)
        return base_out + effect * _factor([self], [1], base_out, layer)

    def delta(self, base: Tensor) -> Tensor:
        """Return the change of the base weight in float32 (float64 for a float64 base), strength included."""
        dtype = torch.promote_types(base.dtype, torch.float32)
        wide = base.to(dtype)
        still = {name: slot.detach() for name, slot in self.slots.items()}
        slots = self.algorithm.moved(still, base.device, dtype)
        strength = self.strengths[0]
        if not self.slots:
            return torch.zeros_like(wide)
        if self.magnitude is None:
            return self.algorithm.delta(slots, self.scale * strength, wide).reshape(base.shape)
        direction = self.algorithm.delta(slots, self.scale, wide).reshape(base.shape)
        return strength * decomposed(wide, direction, self.magnitude.detach().to(base.device, dtype), self.axis)

    def _changed(self, x: Tensor, base_out: Tensor, strength: float, layer: nn.Module, rank_dropout: float) -> Tensor:
        out = self._added(x, base_out, strength, layer, rank_dropout) if self.slots else base_out
        if self.bias is None:
            return out
        self.bias = self.bias.to(out.device)
        return out + _by_channel((strength * self.bias).to(out.dtype), out, layer)

    def _added(self, x: Tensor, base_out: Tensor, strength: float, layer: nn.Module, rank_dropout: float) -> Tensor:
        slots = self._slots_for(base_out)
        if autocasts(x):
            return self._forward(x, base_out, slots, strength, layer, rank_dropout)
        constants = self.algorithm.constants
        dtype = next(slot.dtype for name, slot in slots.items() if slot.is_floating_point() and name not in constants)
        x = x.to(dtype) if x.is_floating_point() else x
        return self._forward(x, base_out.to(dtype), slots, strength, layer, rank_dropout).to(base_out.dtype)

    def _forward(
        self, x: Tensor, base_out: Tensor, slots: dict[str, Tensor], strength: float, layer: nn.Module, dropped: float
    ) -> Tensor:
        if self.magnitude is None:
            return self.algorithm.forward(x, base_out, slots, self.scale * strength, layer, dropped)
        if self.magnitude.requires_grad:
            return self._decomposed(x, base_out, slots, strength, layer, dropped)
        change = LayerAdapter(self.algorithm, slots, self.scale, self.magnitude, self.axis, strengths=(strength,))
        return add_weight(x, base_out, change.delta(layer.weight).to(x.dtype), layer)  # type: ignore[arg-type]

    def _decomposed(
        self, x: Tensor, base_out: Tensor, slots: dict[str, Tensor], strength: float, layer: nn.Module, dropped: float
    ) -> Tensor:
        """Apply a DoRA per output that is trained: for the gradients its norm is a constant (section 4.3 there)."""
        assert self.magnitude is not None
        base: Tensor = layer.weight  # type: ignore[assignment]
        with torch.no_grad():
            wide = base.to(torch.promote_types(base.dtype, torch.float32))
            norm = norms(wide + self.algorithm.delta(slots, self.scale, wide).reshape(wide.shape))
        factor = ratio(self.magnitude.to(norm), norm)
        bias: Tensor | None = layer.bias  # type: ignore[assignment]
        plain = base_out if bias is None else base_out - _by_channel(bias.to(base_out.dtype), base_out, layer)
        moved = self.algorithm.forward(x, plain, slots, self.scale, layer, dropped)
        out = base_out + strength * (_by_channel(factor, base_out, layer) * moved - plain)
        return out.to(base_out.dtype)  # under autocast the factor is wider

    def _slots_for(self, out: Tensor) -> dict[str, Tensor]:
        """Return the slots on the device of `out`. Frozen slots follow the model for good; trained ones stay put."""
        if all(slot.device == out.device for name, slot in self.slots.items() if name not in self.algorithm.constants):
            return self.slots
        moved = self.algorithm.moved(self.slots, out.device)
        if not any(slot.requires_grad for slot in self.slots.values()):
            self.slots = moved
        return moved


@dataclass
class Joined:
    """Several LoRAs on one layer as one: A = [A1; A2; ...] and B = [B1, B2, ...], in the order of their names.

    With constant strengths B holds them and the scales, multiplied in float32; else B holds the scales, and what A
    makes of x is multiplied by the strengths of the moment. fresh: what the base gives is a new tensor.
    """

    adapters: list[LayerAdapter]
    ranks: list[int]
    down: Tensor
    up: Tensor
    constant: bool
    fresh: bool

    @staticmethod
    def of(adapters: list[LayerAdapter], layer: nn.Module) -> Joined:
        """Copy the slots of `adapters`, which fit `layer`, into two matrices."""
        constant = all(adapter.is_constant for adapter in adapters)
        factors = [adapter.scale * (adapter.strengths[0] if constant else 1.0) for adapter in adapters]
        ups = [scaled(_up(adapter), factor) for adapter, factor in zip(adapters, factors, strict=True)]
        kernel = layer.weight.shape[2:] if isinstance(layer, Conv) else ()
        down = torch.cat([adapter.slots["down"].flatten(1) for adapter in adapters])
        up = torch.cat(ups, 1)
        return Joined(
            adapters,
            [_rank(adapter) for adapter in adapters],
            down.reshape(down.shape[0], -1, *kernel),
            up.reshape(*up.shape, *[1] * len(kernel)),
            constant,
            _gives_fresh(layer),
        )

    def apply(self, x: Tensor, base_out: Tensor, layer: nn.Module) -> Tensor:
        """Return `base_out` plus the effects on `x`, in the dtype of `base_out`."""
        if self.down.device != base_out.device:
            self.down, self.up = self.down.to(base_out.device), self.up.to(base_out.device)
        if autocasts(x):
            return self._added(x, base_out, layer)
        return self._added(x.to(self.down.dtype), base_out.to(self.up.dtype), layer).to(base_out.dtype)

    def _added(self, x: Tensor, base_out: Tensor, layer: nn.Module) -> Tensor:
        if isinstance(layer, Conv):
            hidden = self._weighted(layer._conv_forward(x, self.down, None), layer)
            return base_out + CONV[len(layer.kernel_size)](hidden, self.up)
        hidden = self._weighted(F.linear(x, self.down), layer)
        rows = base_out.reshape(-1, base_out.shape[-1])
        add = torch.Tensor.addmm_ if self.fresh and _in_place(x) else torch.addmm
        return add(rows, hidden.reshape(-1, hidden.shape[-1]), self.up.T).reshape(base_out.shape)

    def _weighted(self, hidden: Tensor, layer: nn.Module) -> Tensor:
        return hidden if self.constant else hidden * _factor(self.adapters, self.ranks, hidden, layer)


@dataclass
class PerImage:
    """LoRAs of which every image of the batch has its own few: one small product per row, with its image's A and B."""

    adapters: list[LayerAdapter]
    moment: Moment
    fresh: bool
    _made: tuple[Any, Tensor, Tensor] | None = None

    def apply(self, x: Tensor, base_out: Tensor, layer: nn.Module) -> Tensor:
        """Return `base_out` plus each row's effect on `x`, in the dtype of `base_out`."""
        down, up = self._matrices(x.shape[0], base_out.device)
        hidden = torch.bmm(x.reshape(x.shape[0], -1, x.shape[-1]).to(down.dtype), down)
        rows = base_out.reshape(x.shape[0], -1, base_out.shape[-1]).to(up.dtype)
        add = torch.Tensor.baddbmm_ if self.fresh and _in_place(x) else torch.baddbmm
        return add(rows, hidden, up).to(base_out.dtype).reshape(base_out.shape)

    def _matrices(self, here: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return A (rows, in, rank) and B (rows, rank, out), the strengths in B, zero beyond an image's own ranks."""
        key = self.moment.rows, here, device
        if self._made is None or self._made[0] != key:
            path = self.adapters[0].path
            index = self.moment.image_rows(here, path)
            for adapter in self.adapters:
                self.moment.require_agreement(adapter.name, torch.tensor(adapter.strengths).unbind(), path)
            images = [self._of_image(image) for image in range(max(index) + 1)]
            rank = max(down.shape[0] for down, _ in images)
            downs = torch.stack([F.pad(down, (0, 0, 0, rank - down.shape[0])) for down, _ in images])
            ups = torch.stack([F.pad(up, (0, rank - up.shape[1])) for _, up in images])
            rows = torch.tensor(index, device=downs.device)
            self._made = key, downs[rows].mT.to(device), ups[rows].mT.to(device)
        return self._made[1], self._made[2]

    def _of_image(self, image: int) -> tuple[Tensor, Tensor]:
        first = self.adapters[0]
        downs, ups = [first.slots["down"].flatten(1)[:0]], [_up(first)[:, :0]]
        for adapter in self.adapters:
            strength = adapter.strength_on(image)
            if strength != 0.0:
                downs.append(adapter.slots["down"].flatten(1))
                ups.append(scaled(_up(adapter), adapter.scale * strength))
        return torch.cat(downs), torch.cat(ups, 1)


def merging(weight: Tensor, adapters: Sequence[LayerAdapter], out: Tensor) -> Callable[[], Tensor]:
    """Return what writes `weight` plus the deltas of `adapters` into `out`, its like, and returns it.

    The sum is made in float32 (float64 for float64) and rounded once: of plain LoRAs in one product, then of the
    others, each in the order given.
    """
    plain = [adapter for adapter in adapters if adapter.is_plain]
    if weight.dtype.itemsize >= 4 and len(plain) == len(adapters) and out.is_contiguous():
        write = _product_added(plain, out.flatten(1))
        return lambda: write(weight.flatten(1)).view(out.shape)
    return lambda: _merged_apart(weight, plain, adapters, out)


def _merged_apart(
    weight: Tensor, plain: Sequence[LayerAdapter], adapters: Sequence[LayerAdapter], out: Tensor
) -> Tensor:
    total = weight.to(torch.promote_types(weight.dtype, torch.float32)).flatten(1)
    total = _product_added(plain, None)(total) if plain else total
    for adapter in adapters:
        if not adapter.is_plain:
            total = total + adapter.delta(weight).flatten(1)
    return out.copy_(total.reshape(out.shape))


def _product_added(adapters: Sequence[LayerAdapter], out: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Return what adds the deltas of plain LoRAs to a matrix, in its type, in `out` if given.

    A product and a sum take less time than one addmm, which copies first; so does a factor that all have in common,
    when it is left to the sum.
    """
    factors = [adapter.scale * adapter.strengths[0] for adapter in adapters]
    common = factors[0] if len(set(factors)) == 1 else None
    ups = [_up(adapter) for adapter in adapters]
    downs = [adapter.slots["down"].flatten(1) for adapter in adapters]

    def added(weight: Tensor) -> Tensor:
        wide = [up.to(weight) for up in ups]
        if common is None:
            wide = [up * factor for up, factor in zip(wide, factors, strict=True)]
        product = torch.mm(torch.cat(wide, 1), torch.cat([down.to(weight) for down in downs]), out=out)
        return torch.add(weight, product, alpha=1.0 if common is None else common, out=out)

    return added


def parts_of(adapters: Sequence[LayerAdapter], layer: nn.Module) -> list[Part]:
    """Return what computes the effects of `adapters` on `layer`: LoRAs joined, the others each for itself."""
    joinable: dict[int, list[LayerAdapter]] = defaultdict(list)
    parts: list[Part] = []
    for adapter in adapters:
        if can_join(adapter, layer):
            joinable[id(adapter.moment)].append(adapter)
        else:
            parts.append(adapter)
    return [*(_joined(found, layer) for found in joinable.values()), *parts]


def _joined(adapters: list[LayerAdapter], layer: nn.Module) -> Part:
    if len(adapters) == 1 and adapters[0].is_constant:
        return adapters[0]
    if isinstance(layer, nn.Linear) and _mostly_apart(adapters):
        return PerImage(adapters, adapters[0].moment, _gives_fresh(layer))
    return Joined.of(adapters, layer)


def can_join(adapter: LayerAdapter, layer: nn.Module) -> bool:
    """Say whether `adapter` is a plain frozen LoRA, on a layer where several can be computed as one."""
    frozen = not adapter.training and not any(slot.requires_grad for slot in adapter.slots.values())
    return adapter.is_plain and frozen and takes_lora(layer)


def takes_lora(layer: nn.Module) -> bool:
    """Say whether `layer` is of a kind whose LoRAs can be joined."""
    return isinstance(layer, nn.Linear) or (isinstance(layer, Conv) and layer.groups == 1)


def _mostly_apart(adapters: Sequence[LayerAdapter]) -> bool:
    """Say whether strengths depend on the image alone, and an image has a small part of the ranks."""
    moment = adapters[0].moment
    if moment.composition is not None or not all(
        strength.is_constant for adapter in adapters for strength in moment.strengths[adapter.name]
    ):
        return False
    ranks = [_rank(adapter) for adapter in adapters]
    own = [
        sum(rank for rank, adapter in zip(ranks, adapters, strict=True) if adapter.strength_on(image) != 0.0)
        for image in range(moment.images)
    ]
    return SPARE * max(own) <= sum(ranks)


def autocasts(x: Tensor) -> bool:
    """Say whether autocast chooses types where `x` is; it never does for tensors without memory."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def _in_place(x: Tensor) -> bool:
    """Say whether tensors may be written to: nothing needs them for gradients, and autocast leaves types alone."""
    return not torch.is_grad_enabled() and not autocasts(x)


def _gives_fresh(layer: nn.Module) -> bool:
    """Say whether what the base of `layer` computes is a new tensor, which an effect may be added to in place."""
    owners = [kind for kind in type(layer).__mro__ if "forward" in vars(kind)]
    return owners[1:2] == [nn.Linear]  # the first is the adapted class


def _factor(adapters: Sequence[LayerAdapter], widths: Sequence[int], out: Tensor, layer: nn.Module) -> Tensor:
    shares = [(adapter.name, adapter.strengths, width) for adapter, width in zip(adapters, widths, strict=True)]
    return adapters[0].moment.factor(shares, out, 1 if by_second_axis(layer) else -1, adapters[0].path)


def _by_channel(numbers: Tensor, out: Tensor, layer: nn.Module) -> Tensor:
    """Give one number per channel the shape that they need beside `out`, which `layer` gave."""
    ones = [1] * (len(layer.kernel_size) if isinstance(layer, Conv) else out.dim() - 2)
    return numbers.reshape((-1, *ones) if by_second_axis(layer) else (-1,))


def _rank(adapter: LayerAdapter) -> int:
    return adapter.slots["down"].shape[0]


def _up(adapter: LayerAdapter) -> Tensor:
    return adapter.slots["up"].flatten(1)


def scaled(tensor: Tensor, factor: float) -> Tensor:
    """Multiply in float32 (a float64 tensor: in that) and round once."""
    return (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * factor).to(tensor.dtype)
