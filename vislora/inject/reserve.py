"""Room for adapters in a model that `torch.compile` has compiled: changing them changes numbers, never the graph.

Every reserved layer has A (max_rank, in, *kernel) and B (out, max_rank) of its own, and all of them share the strengths
(rows, max_rank). The active adapters are written there side by side, in the order of their names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vislora.algorithms.base import Conv, LayerSpec
from vislora.algorithms.lora import CONV
from vislora.errors import AdapterMismatchError, ConfigError, listed
from vislora.inject.moment import Moment
from vislora.inject.parts import LayerAdapter, autocasts, can_join, scaled
from vislora.inject.strength import Strength


@dataclass
class Room:
    """The reserved A and B of one layer; `reserve` has the strengths of the forward."""

    reserve: Reserve
    down: Tensor
    up: Tensor

    @staticmethod
    def beside(layer: nn.Module, reserve: Reserve) -> Room:
        """Return empty room beside `layer`, of the dtype of its weight (float32 where that has one byte)."""
        weight: Tensor = layer.weight  # type: ignore[assignment]
        spec = LayerSpec.of(layer)
        assert spec is not None  # the index of the stack holds only such layers
        out, fan_in, *kernel = spec.weight_shape
        dtype = weight.dtype if weight.dtype.is_floating_point and weight.dtype.itemsize > 1 else torch.float32
        device = torch.device("cpu") if weight.is_meta else weight.device
        down = torch.zeros(reserve.max_rank, fan_in, *kernel, dtype=dtype, device=device)
        up = torch.zeros(out, reserve.max_rank, *[1] * len(kernel), dtype=dtype, device=device)
        return Room(reserve, down, up)

    def apply(self, x: Tensor, base_out: Tensor, layer: nn.Module) -> Tensor:
        """Return `base_out` plus the effects on `x`, in the dtype of `base_out`."""
        if self.down.device != base_out.device:
            self.down, self.up = self.down.to(base_out.device), self.up.to(base_out.device)
        if not autocasts(x):
            x = x.to(self.down.dtype)
        if isinstance(layer, Conv):
            hidden = layer._conv_forward(x, self.down, None)
            weights = self._weights(hidden)
            hidden = hidden * weights.reshape(*weights.shape, *[1] * (hidden.dim() - 2))
            return (base_out + CONV[len(layer.kernel_size)](hidden, self.up)).to(base_out.dtype)
        hidden = F.linear(x, self.down)
        weights = self._weights(hidden)
        hidden = hidden * weights.reshape(-1, *[1] * (hidden.dim() - 2), weights.shape[-1])
        return (base_out + F.linear(hidden, self.up)).to(base_out.dtype)

    def fill(self, adapters: Sequence[tuple[LayerAdapter | None, int, float]]) -> None:
        """Write (adapter on this layer or None, its columns, factor) side by side; the columns behind do nothing."""
        self.up.zero_()
        start = 0
        for adapter, width, factor in adapters:
            if adapter is not None:
                down, up = adapter.slots["down"], scaled(adapter.slots["up"], adapter.scale * factor)
                columns = slice(start, start + down.shape[0])
                self.down[columns].copy_(down.reshape(-1, *self.down.shape[1:]))
                self.up[:, columns].copy_(up.reshape(up.shape[0], -1, *self.up.shape[2:]))
            start += width

    def _weights(self, hidden: Tensor) -> Tensor:
        """Return the strengths for the rows of `hidden`: (rows, max_rank) or (1, max_rank)."""
        weights = self.reserve.weights.to(hidden.device, hidden.dtype)  # nothing to do, but on parts elsewhere
        rows, given = hidden.shape[0] if hidden.dim() > 1 else 1, weights.shape[0]
        if rows == given:
            return weights
        if rows % given == 0:
            return weights.repeat_interleave(rows // given, 0)
        if self.reserve.per_image:
            raise AdapterMismatchError("a layer runs once for all images: their strengths cannot differ there")
        return weights[:1]


@dataclass
class Reserve:
    """The room in one model. weights: the strengths of the columns, (rows of the model, max_rank).

    columns: the active adapters, in the order of their names, and how many columns each has.
    """

    max_rank: int
    rooms: dict[str, Room] = field(default_factory=dict)
    weights: Tensor = field(init=False)
    columns: dict[str, int] = field(default_factory=dict)
    per_image: bool = False
    _written: Any = None
    _begun: Any = None

    def __post_init__(self) -> None:
        self.weights = torch.zeros(1, self.max_rank)

    def require_layers(self, name: str, adapters: Mapping[str, LayerAdapter], layers: Mapping[str, nn.Module]) -> None:
        """Raise `AdapterMismatchError` when an adapter cannot be written into the rooms at all."""
        outside = [path for path in adapters if path not in self.rooms]
        other = [f"{path}: {one.algorithm.name}" for path, one in adapters.items() if not can_join(one, layers[path])]
        if outside:
            title = (
                f"adapter '{name}' has {len(outside)} layers that are not reserved; reserve with layers='every-layer':"
            )
            raise AdapterMismatchError(listed(title, outside, limit=5))
        if other:
            title = (
                f"adapter '{name}' is not of plain LoRA on {len(other)} layers, and a reserved model runs no other; "
                "convert it (--as lora), or do not reserve:"
            )
            raise AdapterMismatchError(listed(title, other, limit=5))

    def require_room(self, ranks: Mapping[str, int], strengths: Mapping[str, Sequence[Strength]]) -> None:
        """Raise `ConfigError` when the active ones of `strengths` do not fit together, or cannot be said by columns."""
        active = {name: ranks[name] for name, given in strengths.items() if is_active(given)}
        if sum(active.values()) > self.max_rank:
            shown = ", ".join(f"'{name}' {rank}" for name, rank in active.items())
            raise ConfigError(
                f"the active adapters have rank {sum(active.values())} together ({shown}), and the model is reserved "
                f"for max_rank={self.max_rank}; set some to 0, or reserve more"
            )
        for name in active:
            given = strengths[name]
            if any(one.region is not None for one in given):
                raise ConfigError(f"'{name}' has a region, which a reserved model cannot apply: do not reserve it")
            if any((one.components, one.layers) != (given[0].components, given[0].layers) for one in given):
                raise ConfigError(
                    f"'{name}' differs by component or layer from image to image, which a reserved model cannot apply; "
                    "give all images the same, or do not reserve"
                )

    def write(self, ranks: Mapping[str, int], moment: Moment, on: Mapping[str, Mapping[str, LayerAdapter]]) -> None:
        """Write the active adapters into the rooms; `on`: active adapter -> path -> its layer."""
        names = sorted(on)
        self.columns = {name: ranks[name] for name in names}
        factors = {name: _unit(moment.strengths[name][0]) for name in names}
        written = [(name, factors[name].components, factors[name].layers) for name in names]
        if written == self._written:
            return
        self._written = written
        with torch.inference_mode(False), torch.no_grad():
            for path, room in self.rooms.items():
                room.fill(
                    [(on[name].get(path), ranks[name], factors[name].on(moment.component, path)) for name in names]
                )

    def forget(self, name: str) -> None:
        """Have everything written again when `name`, which is written now, goes or comes back."""
        if name in self.columns:
            self._written = None

    def begin(self, moment: Moment) -> None:
        """Set the strengths for a forward, in place: a graph, also one that CUDA replays, reads them from there."""
        rows = moment.rows or 1
        values = [moment.values(name) for name in self.columns]
        if (rows, values) == self._begun and self.weights.shape[0] == rows:
            return
        self._begun = rows, values
        columns = [
            torch.tensor(value)[:, None].expand(rows, width)
            for value, width in zip(values, self.columns.values(), strict=True)
        ]
        rest = torch.zeros(rows, self.max_rank - sum(self.columns.values()))
        found = torch.cat([*columns, rest], 1)
        self.per_image = bool((found != found[:1]).any())
        with torch.inference_mode(False), torch.no_grad():
            down = next(iter(self.rooms.values())).down
            if (self.weights.shape[0], self.weights.device, self.weights.dtype) != (rows, down.device, down.dtype):
                self.weights = torch.zeros(rows, self.max_rank, dtype=down.dtype, device=down.device)
            self.weights.copy_(found)


def is_active(strengths: Iterable[Strength]) -> bool:
    """Say whether an adapter acts on any image."""
    return any(strength.value != 0.0 for strength in strengths)


def _unit(strength: Strength) -> Strength:
    """Return the part of a strength that differs by layer."""
    return Strength(1.0, strength.components, strength.layers)
