"""The class that a base layer becomes while adapters are on it: a subclass of the layer's own class, made on demand.

No wrapper module, so paths, `state_dict` and `isinstance` stay as they were; taking the adapters out gives the layer
its class back. Adapter tensors are no parameters of the base layer: they live in a plain attribute of the instance.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vislora.algorithms.base import apply_weight
from vislora.errors import AdapterMismatchError, ConfigError
from vislora.inject.parts import LayerAdapter, Part, merging, parts_of

STATE = "_vislora_layer"
HOOKS = ("accelerate.hooks", "diffusers.hooks.hooks")
"""Where the `forward`s come from that offloading puts into an instance, with a way down to the one they captured."""

Forward = Callable[..., Tensor]


@dataclass
class LayerState:
    """Every adapter on one layer, in the order of their names, so that a sum never depends on loading order.

    `on`: those of the adapters that have an effect; `on_bias`: those of them that change the bias. `merges`: the engine
    is a merged weight, wherever the strengths allow one. `merged`: the base weight with the active deltas in it, as
    `source` (weight, its version) was when it was computed; `spare`: the memory of the last one, for the next. `parts`:
    what is computed beside the base when there is no merged weight. Both are made on first use and dropped by every
    change. `room`: reserved for a compiled model; then it is the one part, always.
    """

    base_class: type[nn.Module]
    adapters: dict[str, LayerAdapter] = field(default_factory=dict)
    on: dict[str, LayerAdapter] = field(default_factory=dict)
    on_bias: list[LayerAdapter] = field(default_factory=list)
    room: Part | None = None
    merges: bool = False
    merged: Tensor | None = None
    spare: Tensor | None = None
    source: tuple[weakref.ref[Tensor], int] | None = None
    parts: list[Part] | None = None

    def change(self, *names: str) -> None:
        """Take note of adapters, new or gone or of a new strength; drop what was made of them as they were."""
        still = [item for item in self.on.items() if item[0] not in names]
        found = [(name, self.adapters[name]) for name in names if name in self.adapters]
        self.on = dict(sorted([*still, *(item for item in found if item[1].is_active)]))
        self.on_bias = [adapter for adapter in self.on.values() if adapter.bias is not None]
        self.drop()

    def drop(self) -> None:
        """Drop what was made of the adapters."""
        if self.merged is not None:
            self.spare = self.merged
        if not self.merges:
            self.spare = None
        self.merged = None
        self.parts = [self.room] if self.room is not None else None

    @property
    def can_merge(self) -> bool:
        """Say whether the active adapters are to be in a merged weight, and their strengths allow it."""
        return self.merges and bool(self.on) and all(adapter.is_constant for adapter in self.on.values())

    def prepare(self, layer: nn.Module) -> None:
        """Make what the engine of this layer needs, once after each change."""
        if self.can_merge and not torch.compiler.is_compiling():
            self.merge(layer.weight)  # type: ignore[arg-type]
        else:
            self.parts = parts_of(list(self.on.values()), layer)

    def merge(self, weight: Tensor) -> None:
        """Compute `merged` from `weight`, in float32 with one rounding."""
        with untracked():
            self.merging(weight)()

    def merging(self, weight: Tensor) -> Callable[[], None]:
        """Return what computes `merged` from `weight`, to be called where nothing is tracked."""
        like = (weight.shape, weight.dtype, weight.device)
        buffer = self.merged if self.merged is not None else self.spare
        if buffer is None or (buffer.shape, buffer.dtype, buffer.device) != like:
            buffer = torch.empty_like(weight)
        compute = merging(weight.detach(), list(self.on.values()), buffer)

        def merge() -> None:
            self.merged, self.spare = compute(), None
            self.source = weakref.ref(weight), _version(weight)

        return merge

    def bias_of(self, layer: nn.Module) -> Tensor | None:
        """Return the bias of `layer` with the changes of the active adapters in it, in float32 with one rounding."""
        bias = getattr(layer, "bias", None)
        if not self.on_bias:
            return bias
        changes = [adapter.strengths[0] * adapter.bias for adapter in self.on_bias if adapter.bias is not None]
        weight: Tensor = layer.weight  # type: ignore[assignment]
        total = torch.zeros((), dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
        for change in ([] if bias is None else [bias]) + changes:
            total = total + change.to(total)
        return total.to(weight.dtype)

    def is_stale(self, weight: Tensor) -> bool:
        """Say whether `weight` is another one than that in `merged`, or was written to since."""
        return self.source is None or self.source[0]() is not weight or self.source[1] != _version(weight)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the source and spare memory out: the weight of a copy is another one."""
        return {**self.__dict__, "source": None, "spare": None}


def untracked() -> AbstractContextManager[Any]:
    """Return a context without gradients and inference mode, whose tensors later passes with gradients could not use.

    Where it is so already it costs nothing: going in and out took 20 us a layer on a CPU, a small merge 25.
    """
    if not torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        return nullcontext()
    stack = ExitStack()
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.no_grad())
    return stack


def _version(tensor: Tensor) -> int:
    """Return torch's count of the writes to `tensor`; tensors of inference mode have none."""
    return -1 if tensor.is_inference() else tensor._version


class AdapterLayer:
    """Mixed in before the base layer's class. Its state is `LayerState` in the instance's `__dict__`."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the base layer, then add every active adapter; or use the merged weight when there is one.

        The first argument has the name that torch's layers give it, for callers that pass it by name.
        """
        state: LayerState = self.__dict__[STATE]
        if state.merged is None and state.parts is None:
            state.prepare(self)  # type: ignore[arg-type]
        if state.merged is not None:
            return apply_weight(self, input, _merged(self, state, input), state.bias_of(self))  # type: ignore[arg-type]
        out = super().forward(input, *args, **kwargs)  # type: ignore[misc]
        for part in state.parts or ():
            out = part.apply(input, out, self)  # type: ignore[arg-type]
        return out

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Load, then merge anew at once: what `torch.compile` made of this layer cannot tell that its weight is new."""
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]
        state: LayerState = self.__dict__[STATE]
        weight: Tensor = self.weight  # type: ignore[attr-defined]
        if state.merged is not None and not weight.is_meta and state.is_stale(weight):
            state.merge(weight)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copy and pickle by the base class: a class made on demand has no importable name."""
        return _rebuilt, (self.__dict__[STATE].base_class,), self.__getstate__()


def _merged(layer: nn.Module, state: LayerState, input: Tensor) -> Tensor:
    """Return the merged weight for a forward of `layer`, computed anew when the base weight is not what it was.

    Versions cannot be read while a graph is traced.
    """
    weight: Tensor = layer.weight  # type: ignore[assignment]
    if not torch.compiler.is_compiling() and state.is_stale(weight):
        state.merge(weight)
    assert state.merged is not None
    # the model may have moved, or changed its dtype, since
    state.merged = state.merged.to(input.device, weight.dtype)
    return state.merged


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


def is_wrapped(weight: Tensor) -> bool:
    """Say whether a weight only looks like one tensor: quantised by torchao, or shared out among devices."""
    return is_traceable_wrapper_subclass(weight)


def state_of(layer: nn.Module) -> LayerState | None:
    """Return the adapters on `layer`, or None."""
    return layer.__dict__.get(STATE)


def put_on(layer: nn.Module, path: str, name: str, adapter: LayerAdapter) -> None:
    """Add `adapter` to `layer`, changing the layer's class when it is the first.

    Raises `AdapterMismatchError` when something replaced the layer's `forward`, so that the adapter would be bypassed,
    and `ConfigError` when the layer has an adapter of this name already.
    """
    state = _adapted_state(layer, path)
    if name in state.adapters:
        raise ConfigError(
            f"layer '{path}' has an adapter named '{name}' already, put there through another model that shares the "
            "layer; choose another name"
        )
    state.adapters[name] = adapter
    state.change(name)


def take_off(layer: nn.Module, path: str, name: str) -> None:
    """Remove the adapter `name`; with the last one the layer gets its own class back."""
    require_removable(layer, path, name)
    state = state_of(layer)
    if state is None or name not in state.adapters:
        return
    del state.adapters[name]
    state.change(name)
    _release(layer, state)


def set_room(layer: nn.Module, path: str, room: Part | None) -> None:
    """Give `layer` room that is reserved for adapters, with or without any on it, or take the room away."""
    state = _adapted_state(layer, path)
    state.room = room
    state.drop()
    _release(layer, state)


def _adapted_state(layer: nn.Module, path: str) -> LayerState:
    _require_reachable(layer, path, "load")
    state = state_of(layer)
    if state is None:
        base_class = type(layer)
        _change_class(layer, adapted_class(base_class))
        state = layer.__dict__[STATE] = LayerState(base_class)
    return state


def _release(layer: nn.Module, state: LayerState) -> None:
    """Give the layer its own class back when nothing is left on it."""
    if not state.adapters and state.room is None:
        _change_class(layer, state.base_class)
        del layer.__dict__[STATE]


def require_removable(layer: nn.Module, path: str, name: str) -> None:
    """Raise `AdapterMismatchError` when `layer` was changed on top of its last adapter, so that it cannot leave."""
    state = state_of(layer)
    if state is None or list(state.adapters) != [name] or state.room is not None:
        return
    if type(layer) is not adapted_class(state.base_class):
        raise AdapterMismatchError(
            f"layer '{path}' became a {type(layer).__name__} while adapters were on it; undo that "
            "(torch.nn.utils.parametrize.remove_parametrizations, for one) before ejecting"
        )
    _require_reachable(layer, path, "eject")


def _change_class(layer: nn.Module, cls: type[nn.Module]) -> None:
    """Change the class, and point every `forward` that offload hooks captured from `layer` at the new one.

    Such hooks shadow the class's `forward` with one in the instance, which a change of class alone would not reach.
    """
    for holder, key in list(_captured(layer)) if "forward" in layer.__dict__ else ():
        if _is_own_forward(layer, holder.get(key)):
            holder[key] = MethodType(cls.forward, layer)
    object.__setattr__(layer, "__class__", cls)  # past nn.Module's own, which looks for parameters


def _require_reachable(layer: nn.Module, path: str, action: str) -> None:
    """Raise `AdapterMismatchError` when the instance's `forward` leads anywhere but to the class's own."""
    for holder, key in _captured(layer) if "forward" in layer.__dict__ else ():
        value = holder.get(key)
        replaced = key == "forward" and holder.get("original_forward") is not None  # by a hook that calls the original
        if value is None or replaced or _is_own_forward(layer, value) or _hook_module(value) in HOOKS:
            continue
        owner = getattr(getattr(value, "__func__", value), "__module__", None) or "unknown code"
        raise AdapterMismatchError(
            f"layer '{path}' has a forward of its own (from {owner}) that would bypass an adapter; "
            f"remove it, {action} the adapter, then install it again"
        )


def _captured(layer: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield every place, as a dict and its key, where the hooks on `layer` keep a `forward`: from outside to inside."""
    pending: list[tuple[dict[str, Any], str]] = [(layer.__dict__, "forward")]
    seen = set()
    while pending:
        holder, key = pending.pop()
        if (id(holder), key) in seen:
            continue
        seen.add((id(holder), key))
        yield holder, key
        pending += _behind(layer, holder.get(key))


def _behind(layer: nn.Module, link: Any) -> list[tuple[dict[str, Any], str]]:
    """Return where the hook `link` keeps what it calls: accelerate in the layer, diffusers in a closure."""
    origin = _hook_module(link)
    if origin not in HOOKS:
        return []
    places = [(vars(link), "__wrapped__")]
    if origin == "accelerate.hooks":
        return [*places, (layer.__dict__, "_old_forward")]
    reference = vars(inspect.getclosurevars(link.func).nonlocals["function_reference"])
    return [*places, (reference, "forward"), (reference, "original_forward")]


def _hook_module(link: Any) -> str | None:
    return link.func.__module__ if isinstance(link, partial) else None


def _is_own_forward(layer: nn.Module, value: Any) -> bool:
    return isinstance(value, MethodType) and value.__self__ is layer and value.__func__ is type(layer).forward
