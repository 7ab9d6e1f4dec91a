"""The class that a base layer becomes while adapters are on it: a subclass of the layer's own class, made on demand.

No wrapper module, so paths, `state_dict` and `isinstance` stay as they were; taking the adapters out gives the layer
its class back. Adapter tensors are no parameters of the base layer: they live in a plain attribute of the instance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vislora.algorithms.base import Algorithm, apply_weight
from vislora.errors import AdapterMismatchError

STATE = "_vislora_layer"
Forward = Callable[..., Tensor]


@dataclass(frozen=True)
class Dropout:
    """Shares in [0, 1) left out while training: of the input's elements, of the rank's channels, of whole modules."""

    input: float = 0.0
    rank: float = 0.0
    module: float = 0.0


@dataclass
class LayerAdapter:
    """One adapter on one layer. `scale` comes from the file (alpha / rank); `strength` is the user's multiplier."""

    algorithm: Algorithm
    slots: dict[str, Tensor]
    scale: float
    strength: float = 1.0
    dropout: Dropout = field(default_factory=Dropout)
    training: bool = False

    def apply(self, x: Tensor, base_out: Tensor, layer: nn.Module) -> Tensor:
        """Return `base_out` plus this adapter's effect on `x`, in the dtype of `base_out`."""
        rank_dropout = 0.0
        if self.training:
            if self.dropout.module and torch.rand(()).item() < self.dropout.module:
                return base_out
            rank_dropout = self.dropout.rank
            x = F.dropout(x, self.dropout.input) if self.dropout.input and x.is_floating_point() else x
        slots = self._slots_for(base_out)
        factor = self.scale * self.strength
        if torch.is_autocast_enabled(x.device.type):
            return self.algorithm.forward(x, base_out, slots, factor, layer, rank_dropout)
        dtype = next(iter(slots.values())).dtype
        x = x.to(dtype) if x.is_floating_point() else x
        return self.algorithm.forward(x, base_out.to(dtype), slots, factor, layer, rank_dropout).to(base_out.dtype)

    def delta(self, base: Tensor) -> Tensor:
        """Return the change of the base weight in float32 (float64 for a float64 base), strength included."""
        dtype = torch.promote_types(base.dtype, torch.float32)
        slots = {name: slot.detach().to(base.device, dtype) for name, slot in self.slots.items()}
        return self.algorithm.delta(slots, self.scale * self.strength, base.to(dtype)).view(base.shape)

    def _slots_for(self, out: Tensor) -> dict[str, Tensor]:
        """Return the slots on the device of `out`. Frozen slots follow the model for good; trained ones stay put."""
        if all(slot.device == out.device for slot in self.slots.values()):
            return self.slots
        moved = {name: slot.to(out.device) for name, slot in self.slots.items()}
        if not any(slot.requires_grad for slot in self.slots.values()):
            self.slots = moved
        return moved


@dataclass
class LayerState:
    """Every adapter on one layer, in the order of their names, so that a sum never depends on loading order."""

    base_class: type[nn.Module]
    adapters: dict[str, LayerAdapter] = field(default_factory=dict)
    merged: Tensor | None = None

    def add(self, name: str, adapter: LayerAdapter) -> None:
        """Add an adapter; a merged weight becomes stale and is dropped."""
        self.adapters[name] = adapter
        self.adapters = dict(sorted(self.adapters.items()))
        self.merged = None

    def active(self) -> list[LayerAdapter]:
        """Return the adapters whose strength is not zero."""
        return [adapter for adapter in self.adapters.values() if adapter.strength != 0.0]


class AdapterLayer:
    """Mixed in before the base layer's class. Its state is `LayerState` in the instance's `__dict__`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the base layer, then add every active adapter; or use the merged weight when there is one."""
        state: LayerState = self.__dict__[STATE]
        if state.merged is not None:
            if state.merged.device != x.device:
                state.merged = state.merged.to(x.device)
            return apply_weight(self, x, state.merged, getattr(self, "bias", None))  # type: ignore[arg-type]
        out = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        for adapter in state.active():
            out = adapter.apply(x, out, self)  # type: ignore[arg-type]
        return out

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copy and pickle by the base class: a class made on demand has no importable name."""
        return _rebuilt, (self.__dict__[STATE].base_class,), self.__dict__


_adapted: dict[type[nn.Module], type[nn.Module]] = {}


def adapted_class(base_class: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of `base_class` that applies adapters; always the same one."""
    if base_class not in _adapted:
        body = {"__module__": base_class.__module__}
        _adapted[base_class] = type(f"Adapted{base_class.__name__}", (AdapterLayer, base_class), body)
    return _adapted[base_class]


def _rebuilt(base_class: type[nn.Module]) -> nn.Module:
    cls = adapted_class(base_class)
    return cls.__new__(cls)


def state_of(layer: nn.Module) -> LayerState | None:
    """Return the adapters on `layer`, or None."""
    return layer.__dict__.get(STATE)


def put_on(layer: nn.Module, path: str, name: str, adapter: LayerAdapter) -> None:
    """Add `adapter` to `layer`, changing the layer's class when it is the first.

    Raises `AdapterMismatchError` when something replaced the layer's `forward`, so that the adapter would be bypassed.
    """
    state = state_of(layer)
    if state is None:
        base_class = type(layer)
        _rebind_forward(layer, path, adapted_class(base_class))
        state = LayerState(base_class)
        layer.__dict__[STATE] = state
        layer.__class__ = adapted_class(base_class)
    state.add(name, adapter)


def take_off(layer: nn.Module, path: str, name: str) -> None:
    """Remove the adapter `name`; with the last one the layer gets its own class back."""
    state = state_of(layer)
    if state is None or name not in state.adapters:
        return
    del state.adapters[name]
    state.merged = None
    if not state.adapters:
        _rebind_forward(layer, path, state.base_class)
        layer.__class__ = state.base_class
        del layer.__dict__[STATE]


def _rebind_forward(layer: nn.Module, path: str, cls: type[nn.Module]) -> None:
    """Point every `forward` that offload hooks captured from `layer` at the one of `cls`.

    accelerate keeps the captured method in `_old_forward`, diffusers in the function references of `_diffusers_hook`;
    both shadow the class's `forward` with one in the instance, which a change of class alone would not reach.
    """
    found = False
    for holder, key in _captured(layer):
        value = holder.get(key)
        if isinstance(value, MethodType) and value.__self__ is layer:
            holder[key] = MethodType(cls.forward, layer)
            found = True
    if "forward" in layer.__dict__ and not found:
        owner = getattr(layer.__dict__["forward"], "__module__", None) or "unknown code"
        raise AdapterMismatchError(
            f"layer '{path}' has a forward of its own (set by {owner}) that would bypass an adapter; "
            "load the adapter before that hook is installed"
        )


def _captured(layer: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    yield layer.__dict__, "forward"
    yield layer.__dict__, "_old_forward"
    hooks = layer.__dict__.get("_diffusers_hook")
    for reference in getattr(hooks, "_fn_refs", ()):
        yield vars(reference), "forward"
        yield vars(reference), "original_forward"
