"""The adapters on one model: an index of its layers, built once, and who is on them with which strength."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from vislora.errors import ConfigError, nearest
from vislora.inject.composition import Composition, mixed
from vislora.inject.fused import Watch, require_run, watches
from vislora.inject.layer import put_on, require_removable, set_room, state_of, take_off
from vislora.inject.moment import Moment, varies
from vislora.inject.parts import LayerAdapter
from vislora.inject.reserve import Reserve, Room, is_active
from vislora.inject.strength import Strength, per_image
from vislora.inject.targets import Index, index, unwrapped

STACK = "_vislora_stack"


@dataclass
class Stack:
    """Which adapters are on `model`. Held by the model itself, so two pipelines that share it see one stack.

    `moment`: the strengths, and what they depend on while the model runs. `watches`: the attentions with adapters whose
    layers diffusers may fuse; `hook`: asks them before every forward of the model; `clocks`: begin the moment before
    every forward, while a strength depends on it; `begins_outside`: one of them stands before what `torch.compile`
    returned; `mixer`: runs the model again where a composition asks for it. `paths`, `ranks`: the layers of each
    adapter, and its largest rank; `reserve`: room for them in a compiled model. `engine`: what was asked for, see
    `engines`.
    """

    index: Index
    moment: Moment = field(default_factory=Moment)
    paths: dict[str, list[str]] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    reserve: Reserve | None = None
    engine: str = "stacked"
    frozen: dict[str, list[tuple[nn.Module, str]]] = field(default_factory=dict)
    watches: list[Watch] = field(default_factory=list)
    hook: RemovableHandle | None = None
    clocks: list[RemovableHandle] = field(default_factory=list)
    mixer: RemovableHandle | None = None
    begins_outside: bool = False

    @property
    def strengths(self) -> dict[str, tuple[Strength, ...]]:
        """Return the strength of every adapter, or its strengths, one per image of the batch."""
        return self.moment.strengths

    def layer(self, path: str) -> nn.Module | None:
        """Return the layer, or the norm, at `path`; None when there is none that an adapter works on."""
        found = self.index.layers.get(path)
        return self.index.norms.get(path) if found is None else found

    def at(self, path: str) -> nn.Module:
        """Return the layer or norm at `path`, which is there."""
        return self.index.layers[path] if path in self.index.layers else self.index.norms[path]

    def adapted(self) -> dict[str, None]:
        """Return the paths of all layers with adapters."""
        return dict.fromkeys(path for paths in self.paths.values() for path in paths)

    def add(self, name: str, adapters: Mapping[str, LayerAdapter], strength: Any) -> None:
        """Put the adapter `name` on its layers; on any failure the model is as it was.

        Raises `ConfigError` for a name in use or a strength that is no sensible number, and `AdapterMismatchError`
        for a layer that cannot have an adapter now.
        """
        if name in self.strengths:
            raise ConfigError(f"an adapter named '{name}' is loaded already; eject it first or choose another name")
        strengths = per_image(name, strength)
        require_run(name, adapters, self.index.attentions)
        if self.reserve is not None:
            self.reserve.require_layers(name, adapters, self.index.layers)
            self.reserve.require_room({**self.ranks, name: _rank(adapters)}, {**self.strengths, name: strengths})
        done: list[str] = []
        try:
            for path, adapter in adapters.items():
                adapter.name, adapter.path, adapter.moment = name, path, self.moment
                self._tune(adapter, strengths)
                put_on(self.at(path), path, name, adapter)
                done.append(path)
        except BaseException:
            for path in done:
                take_off(self.at(path), path, name)
            raise
        self.moment.give(name, strengths)
        self.paths[name] = done
        self.ranks[name] = _rank(adapters)
        self._watch()
        self._write(name)

    def set_strength(self, name: str, strength: Any) -> None:
        """Change the strength of `name` on all of its layers: a number, a `Strength`, or one per image of the batch.

        What was made of the old one, such as a merged weight, is dropped.
        """
        self.set_strengths({name: per_image(name, strength)})

    def set_strengths(self, given: Mapping[str, tuple[Strength, ...]]) -> None:
        """Change strengths, all or none."""
        self.require_room(given)
        changed: dict[str, list[str]] = {}
        for name, strengths in given.items():
            for path in self.paths[self._known(name)]:
                changed.setdefault(path, []).append(name)
            self.moment.give(name, strengths)
        for path, names in changed.items():
            state = state_of(self.at(path))
            if state is not None:
                for name in names:
                    self._tune(state.adapters[name], given[name])
                state.change(*names)
        self._write()

    def set_composition(self, composition: Composition | None) -> None:
        """Have the adapters act together by `composition`, None: all at once. Raises `ConfigError` when reserved."""
        if composition is not None and self.reserve is not None:
            raise ConfigError("a reserved model has no composition but 'sum'; vislora.unreserve gives the room up")
        self.moment.composition, self.moment.on_layers = composition, self.adapters
        self.set_strengths(dict(self.strengths))

    def require_room(self, given: Mapping[str, tuple[Strength, ...]]) -> None:
        """Raise `ConfigError` when this model is reserved and has no room for these strengths."""
        for name in given:
            self._known(name)
        if self.reserve is not None:
            self.reserve.require_room(self.ranks, {**self.strengths, **given})

    def make_room(self, max_rank: int, paths: Iterable[str]) -> None:
        """Reserve room for a joint rank of `max_rank` on the layers at `paths`; on any failure nothing is changed."""
        reserve = Reserve(max_rank)
        ranks = {name: _rank(self.adapters(name)) for name in self.strengths}
        reserve.rooms = {path: Room.beside(self.at(path), reserve) for path in paths}
        for name in self.strengths:
            reserve.require_layers(name, self.adapters(name), self.index.layers)
        reserve.require_room(ranks, self.strengths)
        done: list[str] = []
        try:
            for path, room in reserve.rooms.items():
                set_room(self.at(path), path, room)
                done.append(path)
        except BaseException:
            for path in done:
                set_room(self.at(path), path, None)
            raise
        self.reserve, self.ranks = reserve, ranks
        self._watch()
        self._write()

    def drop_room(self) -> None:
        """Give up what was reserved."""
        for path in self.reserve.rooms if self.reserve else ():
            set_room(self.at(path), path, None)
        self.reserve = None
        self._watch()

    def adapters(self, name: str) -> dict[str, LayerAdapter]:
        """Return path -> the adapter `name` on that layer."""
        states = {path: state_of(self.at(path)) for path in self.paths[name]}
        return {path: state.adapters[name] for path, state in states.items() if state is not None}

    def _write(self, changed: str = "") -> None:
        if self.reserve is not None:
            self.reserve.forget(changed)
            on = {name: self.adapters(name) for name, given in self.strengths.items() if is_active(given)}
            self.reserve.write(self.ranks, self.moment, on)

    def _tune(self, adapter: LayerAdapter, strengths: Sequence[Strength]) -> None:
        if len(strengths) == 1 and strengths[0].is_constant:
            adapter.strengths = (strengths[0].on(self.moment.component, adapter.path),)
            adapter.varies = self.moment.composition is not None
            return
        found = tuple(strength.on(self.moment.component, adapter.path) for strength in strengths)
        same = all(one == found[0] for one in found) and all(strength.is_constant for strength in strengths)
        adapter.varies = varies(strengths) and not same
        adapter.strengths = found[:1] if same else found

    def remove(self, name: str) -> None:
        """Take the adapter `name` off its layers; what was frozen for its training is as before."""
        paths = self.paths[self._known(name)]
        for path in paths:
            require_removable(self.at(path), path, name)
        for path in paths:
            take_off(self.at(path), path, name)
        del self.paths[name], self.ranks[name]
        self.moment.give(name, None)
        self._watch()
        self._write(name)
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
        paths = [self.reserve.rooms] if self.reserve else self.paths.values()
        adapted = {path: self.at(path) for found in paths for path in found}
        self.watches = watches(adapted, self.index.attentions)

    def _known(self, name: str) -> str:
        if name not in self.strengths:
            loaded = ", ".join(self.strengths) or "none"
            raise ConfigError(f"no adapter named '{name}'{nearest(name, self.strengths)}; loaded: {loaded}")
        return name


def stack_of(model: nn.Module, component: str | None = None) -> Stack:
    """Return the stack of `model`, made (and its layers indexed) on first use.

    `component`: what the model is in its pipeline, where that is known; else it is taken for a denoiser.
    """
    stack = existing_stack(model)
    if stack is None:
        stack = unwrapped(model).__dict__[STACK] = Stack(index(model), Moment())
    if component is not None:
        stack.moment.component = component
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
    _settle_clocks(model, stack, (stack.moment.is_needed and bool(stack.strengths)) or stack.reserve is not None)
    _settle_mixer(model, stack)
    if not stack.strengths and stack.reserve is None:
        del unwrapped(model).__dict__[STACK]


def _require_run(model: nn.Module, args: object) -> None:
    """Stand before every forward of a model with watches: a layer that is passed over cannot tell so itself."""
    stack = existing_stack(model)
    for watch in stack.watches if stack else ():
        watch.require_run()


def _settle_clocks(model: nn.Module, stack: Stack, timed: bool) -> None:
    """Have the moment begun before every forward: of the model, and outside of the graph that `torch.compile` made."""
    inner = unwrapped(model)
    if timed and not stack.clocks:
        stack.clocks.append(inner.register_forward_pre_hook(_begin, with_kwargs=True))
    if timed and model is not inner and not stack.begins_outside:
        stack.clocks.append(model.register_forward_pre_hook(_begin_outside, with_kwargs=True))
        stack.begins_outside = True
    if not timed:
        for clock in stack.clocks:
            clock.remove()
        stack.clocks.clear()
        stack.begins_outside = False


def _settle_mixer(model: nn.Module, stack: Stack) -> None:
    """Have the model run again after its forward while there is a composition that may ask for it."""
    if stack.moment.composition is not None and stack.mixer is None:
        stack.mixer = unwrapped(model).register_forward_hook(_mix, with_kwargs=True)
    if stack.mixer is not None and (stack.moment.composition is None or not stack.strengths):
        stack.mixer.remove()
        stack.mixer = None


def _mix(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    stack = existing_stack(model)
    return out if stack is None else mixed(model, stack.moment, args, kwargs, out)


def _begin(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Begin the moment, unless that was done outside of the graph that is traced here."""
    stack = existing_stack(model)
    if stack is not None and not (torch.compiler.is_compiling() and stack.begins_outside):
        _begin_now(model, args, kwargs)


def _begin_outside(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if existing_stack(model) is not None:
        _begin_now(model, args, kwargs)


@torch.compiler.disable(reason="compile first, then load adapters or reserve: strengths are set outside of the graph")
def _begin_now(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    stack = existing_stack(model)
    assert stack is not None
    stack.moment.begin(unwrapped(model), args, kwargs)
    if stack.reserve is not None:
        stack.reserve.begin(stack.moment)


def _rank(adapters: Mapping[str, LayerAdapter]) -> int:
    """Return the largest rank on any layer."""
    return max((adapter.algorithm.rank(adapter.slots) for adapter in adapters.values()), default=0)
