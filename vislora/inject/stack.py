"""The adapters on one model: an index of its layers, built once, and who is on them with which strength."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from vislora.errors import ConfigError, nearest
from vislora.inject.layer import LayerAdapter, put_on, state_of, take_off
from vislora.inject.targets import adaptable

STACK = "_vislora_stack"


@dataclass
class Stack:
    """Which adapters are on `model`. Held by the model itself, so two pipelines that share it see one stack."""

    layers: dict[str, nn.Module]
    strengths: dict[str, float] = field(default_factory=dict)
    paths: dict[str, list[str]] = field(default_factory=dict)
    thawed: list[nn.Parameter] = field(default_factory=list)

    def add(self, name: str, adapters: Mapping[str, LayerAdapter], strength: float) -> None:
        """Put the adapter `name` on its layers; on any failure the model is as it was.

        Raises `ConfigError` for a name in use or a strength that is no sensible number.
        """
        if name in self.strengths:
            raise ConfigError(f"an adapter named '{name}' is loaded already; eject it first or choose another name")
        checked = strength_in_range(name, strength)
        done: list[str] = []
        try:
            for path, adapter in adapters.items():
                adapter.strength = checked
                put_on(self.layers[path], path, name, adapter)
                done.append(path)
        except BaseException:
            for path in done:
                take_off(self.layers[path], path, name)
            raise
        self.strengths[name] = checked
        self.paths[name] = done

    def set_strength(self, name: str, strength: float) -> None:
        """Change the strength of `name` on all of its layers. A merged weight is dropped: it holds the old strength."""
        checked = strength_in_range(name, strength)
        for path in self.paths[self._known(name)]:
            state = state_of(self.layers[path])
            if state is not None:
                state.adapters[name].strength = checked
                state.merged = None
        self.strengths[name] = checked

    def remove(self, name: str) -> None:
        """Take the adapter `name` off its layers."""
        for path in self.paths.pop(self._known(name)):
            take_off(self.layers[path], path, name)
        del self.strengths[name]

    def freeze(self, model: nn.Module) -> None:
        """Freeze every parameter of `model`, and remember which ones were not frozen."""
        self.thawed += [parameter for parameter in model.parameters() if parameter.requires_grad]
        model.requires_grad_(False)

    def _known(self, name: str) -> str:
        if name not in self.strengths:
            loaded = ", ".join(self.strengths) or "none"
            raise ConfigError(f"no adapter named '{name}'{nearest(name, self.strengths)}; loaded: {loaded}")
        return name


def stack_of(model: nn.Module) -> Stack:
    """Return the stack of `model`, made (and its layers indexed) on first use."""
    stack = model.__dict__.get(STACK)
    if stack is None:
        stack = Stack(adaptable(model))
        model.__dict__[STACK] = stack
    return stack


def existing_stack(model: nn.Module) -> Stack | None:
    """Return the stack of `model` when it has adapters or had some, else None."""
    return model.__dict__.get(STACK)


def drop_if_empty(model: nn.Module) -> None:
    """Forget the index of a model that has no adapters left, and thaw what was frozen: nothing stays behind."""
    stack = existing_stack(model)
    if stack is not None and not stack.strengths:
        for parameter in stack.thawed:
            parameter.requires_grad_(True)
        del model.__dict__[STACK]


def strength_in_range(name: str, strength: float) -> float:
    """Return `strength` as a float. Raises `ConfigError` when it is not a finite number of sensible size."""
    value = float(strength)
    if not math.isfinite(value) or abs(value) > 100.0:
        raise ConfigError(f"strength of '{name}' is {value}: give a finite number between -100 and 100")
    return value
