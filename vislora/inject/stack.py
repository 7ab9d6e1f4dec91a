"""The adapters on one model: an index of its layers, built once, and who is on them with which strength."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn
from torch.utils.hooks import RemovableHandle

from vislora.errors import ConfigError, nearest
from vislora.inject.fused import Watch, can_fuse, require_run, watches
from vislora.inject.layer import LayerAdapter, put_on, require_removable, state_of, take_off
from vislora.inject.targets import adaptable, aliases, plain_path, unwrapped

STACK = "_vislora_stack"


@dataclass
class Stack:
    """Which adapters are on `model`. Held by the model itself, so two pipelines that share it see one stack.

    `attentions`: path -> module whose layers diffusers may fuse; `watches`: those of them with adapters; `hook`: asks
    them before every forward of the model.
    """

    layers: dict[str, nn.Module]
    aliases: dict[str, str] = field(default_factory=dict)
    attentions: dict[str, nn.Module] = field(default_factory=dict)
    strengths: dict[str, float] = field(default_factory=dict)
    paths: dict[str, list[str]] = field(default_factory=dict)
    frozen: dict[str, list[tuple[nn.Module, str]]] = field(default_factory=dict)
    watches: list[Watch] = field(default_factory=list)
    hook: RemovableHandle | None = None

    def add(self, name: str, adapters: Mapping[str, LayerAdapter], strength: float) -> None:
        """Put the adapter `name` on its layers; on any failure the model is as it was.

        Raises `ConfigError` for a name in use or a strength that is no sensible number, and `AdapterMismatchError`
        for a layer that cannot have an adapter now.
        """
        if name in self.strengths:
            raise ConfigError(f"an adapter named '{name}' is loaded already; eject it first or choose another name")
        checked = strength_in_range(name, strength)
        require_run(name, adapters, self.attentions)
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
        self._watch()

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
        """Take the adapter `name` off its layers; what was frozen for its training is as before."""
        paths = self.paths[self._known(name)]
        for path in paths:
            require_removable(self.layers[path], path, name)
        for path in paths:
            take_off(self.layers[path], path, name)
        del self.paths[name], self.strengths[name]
        self._watch()
        self._thaw(name)

    def freeze(self, model: nn.Module, name: str) -> None:
        """Freeze every parameter of `model` while the adapter `name` trains; remember which ones were not frozen."""
        # by module and key: offload hooks replace the parameter objects
        self.frozen[name] = [
            (module, key)
            for module in model.modules()
            for key, parameter in module._parameters.items()
            if parameter is not None and parameter.requires_grad
        ]
        model.requires_grad_(False)

    def _thaw(self, name: str) -> None:
        """Undo `freeze`; while another adapter trains, that is left to its own removal."""
        parameters = self.frozen.pop(name, [])
        if self.frozen:
            next(iter(self.frozen.values())).extend(parameters)
            return
        for module, key in parameters:
            parameter = module._parameters.get(key)
            if parameter is not None:
                parameter.requires_grad_(True)

    def _watch(self) -> None:
        adapted = {path: self.layers[path] for paths in self.paths.values() for path in paths}
        self.watches = watches(adapted, self.attentions)

    def _known(self, name: str) -> str:
        if name not in self.strengths:
            loaded = ", ".join(self.strengths) or "none"
            raise ConfigError(f"no adapter named '{name}'{nearest(name, self.strengths)}; loaded: {loaded}")
        return name


def stack_of(model: nn.Module) -> Stack:
    """Return the stack of `model`, made (and its layers indexed) on first use."""
    stack = existing_stack(model)
    if stack is None:
        layers = adaptable(model)
        attentions = {plain_path(path): module for path, module in unwrapped(model).named_modules() if can_fuse(module)}
        stack = unwrapped(model).__dict__[STACK] = Stack(layers, aliases(model, layers), attentions)
    return stack


def existing_stack(model: nn.Module) -> Stack | None:
    """Return the stack of `model` when it has adapters or had some, else None."""
    return unwrapped(model).__dict__.get(STACK)


def settle(model: nn.Module) -> None:
    """Have the adapters of `model` watched while there are some to watch; without any, leave nothing behind."""
    stack = existing_stack(model)
    if stack is None:
        return
    if stack.watches and stack.hook is None:
        stack.hook = unwrapped(model).register_forward_pre_hook(_require_run)
    if not stack.watches and stack.hook is not None:
        stack.hook.remove()
        stack.hook = None
    if not stack.strengths:
        del unwrapped(model).__dict__[STACK]


def _require_run(model: nn.Module, args: object) -> None:
    """Stand before every forward of a model with watches: a layer that is passed over cannot tell so itself."""
    stack = existing_stack(model)
    for watch in stack.watches if stack else ():
        watch.require_run()


def strength_in_range(name: str, strength: float) -> float:
    """Return `strength` as a float. Raises `ConfigError` when it is not a finite number of sensible size."""
    try:
        value = float(strength)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value) or abs(value) > 100.0:
        raise ConfigError(f"strength of '{name}' is {strength!r}: give a finite number between -100 and 100")
    return value
