"""Adapters that are trained: fresh ones, or one of a file that is gone on from; the one home of their parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vislora.algorithms.base import Algorithm, Init, InitOptions, LayerSpec, Rule, require_kind
from vislora.algorithms.dora import norms
from vislora.errors import ConfigError
from vislora.inject.injection import FileModule, changing, fitted, require_fit, unreadable
from vislora.inject.parts import Dropout, LayerAdapter
from vislora.inject.targets import Target
from vislora.registry import TRAINED

MAGNITUDE = "magnitude"
"""What DoRA's is called among the slots of a fresh layer."""


@dataclass(frozen=True)
class Trained:
    """What the file of a fresh layer needs beside its slots. `alpha`: None where the scale is not made of it.

    learning_rate: its own peak, if it has one.
    """

    algorithm: str
    alpha: float | None
    rule: Rule
    learning_rate: float | None = None


class AdapterSet(nn.Module):
    """The one home of an adapter's parameters while it trains: outside the base, whose `state_dict` stays as it was.

    A parameter is called `path/with/slashes:slot`, DoRA's `path/with/slashes:magnitude`. `train()` turns the dropouts
    on, `eval()` off.
    """

    def __init__(self, layers: Mapping[str, LayerAdapter], trained: Mapping[str, Trained]) -> None:
        super().__init__()
        self._layers = dict(layers)
        self.trained = dict(trained)
        for path, layer in self._layers.items():
            own = layer.slots if layer.magnitude is None else {**layer.slots, MAGNITUDE: layer.magnitude}
            for slot, tensor in own.items():
                if isinstance(tensor, nn.Parameter):
                    self.register_parameter(f"{path.replace('.', '/')}:{slot}", tensor)
        self._ups = [parameter for parameter in self.slots() if not parameter.any()]
        self.train(True)

    def train(self, mode: bool = True) -> AdapterSet:
        """Turn dropouts on or off."""
        for layer in self._layers.values():
            layer.training = mode
        return super().train(mode)

    def resting(self) -> AbstractContextManager[None]:
        """Have the adapter do nothing for a while: the base alone computes."""
        return self.at(0.0)

    @contextmanager
    def at(self, strength: float) -> Iterator[None]:
        """Have the adapter act with this strength for a while."""
        for layer in self._layers.values():
            layer.strengths = (strength,)
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer.strengths = (1.0,)

    def by_layer(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """Yield (path, slot or "magnitude", parameter) for all of them."""
        for name, parameter in self.named_parameters():
            path, _, slot = name.rpartition(":")
            yield path.replace("/", "."), slot, parameter

    def slots(self) -> list[nn.Parameter]:
        """Return all parameters but the magnitudes."""
        return [parameter for _, slot, parameter in self.by_layer() if slot != MAGNITUDE]

    def ups(self) -> list[nn.Parameter]:
        """Return the slots that were zero when they were fresh: the up projection, and its like in other algorithms."""
        return self._ups

    def magnitudes(self) -> list[nn.Parameter]:
        """Return DoRA's magnitudes: zero is not where they have no effect, so weight decay is not for them."""
        return [parameter for _, slot, parameter in self.by_layer() if slot == MAGNITUDE]

    def modules_with_slots(self) -> Iterator[tuple[str, Trained, dict[str, Tensor], Tensor | None]]:
        """Yield (path, what the file needs, slots, DoRA's magnitude) per layer, tensors as detached CPU copies."""
        for path, layer in self._layers.items():
            slots = {name: slot.detach().cpu().clone() for name, slot in layer.slots.items()}
            magnitude = None if layer.magnitude is None else layer.magnitude.detach().cpu().clone()
            yield path, self.trained[path], slots, magnitude


@dataclass(frozen=True)
class FreshOptions:
    """How fresh layers are made. `seed` fixes the draw of every layer, whatever else the process drew before.

    dora: with a magnitude per output, which is that of the layer's weight at first.
    """

    tucker: bool = False
    init: Init = "kaiming"
    rule: Rule = "alpha/r"
    dropout: Dropout = field(default_factory=Dropout)
    dora: bool = False
    seed: int = 0


def inject_fresh(model: nn.Module, name: str, chosen: Mapping[str, Target], options: FreshOptions) -> AdapterSet:
    """Freeze `model`, put a fresh zero-effect adapter on the chosen layers and return its trainable parameters.

    Raises `ConfigError` for a layer that its algorithm, or a magnitude on top of it, does not fit.
    """
    generator = torch.Generator().manual_seed(options.seed)
    with changing(model) as stack:
        layers, trained = {}, {}
        for path, target in chosen.items():
            try:
                layers[path], trained[path] = _fresh(stack.index.layers[path], target, options, generator)
            except ConfigError as error:
                raise ConfigError(f"layer '{path}': {error}") from None
        stack.add(name, layers, 1.0)
        stack.freeze(model, name)
    return AdapterSet(layers, trained)


def inject_begun(model: nn.Module, name: str, modules: Sequence[FileModule], options: FreshOptions) -> AdapterSet:
    """Freeze `model`, put the modules of a file on it to go on from, in float32; return their parameters.

    Of `options` only the dropouts count. Raises `AdapterMismatchError` for a module that does not fit, and
    `ConfigError` for one that cannot be trained.
    """
    with changing(model) as stack:
        layers, misfits = fitted(stack, modules, torch.float32)
        require_fit(model, name, modules, misfits)
        trained = {path: _begun(layer, path, options.dropout) for path, layer in layers.items()}
        stack.add(name, layers, 1.0)
        stack.freeze(model, name)
    return AdapterSet(layers, trained)


Begin = Mapping[str, Target] | Sequence[FileModule]
"""What training begins with on a model: targets, which get fresh slots, or the modules of a file."""


def inject_trained(model: nn.Module, name: str, begin: Begin, options: FreshOptions) -> AdapterSet:
    """Do as `inject_fresh` or `inject_begun`."""
    if isinstance(begin, Mapping):
        return inject_fresh(model, name, begin, options)
    return inject_begun(model, name, begin, options)


def summary(components: Mapping[str, nn.Module], sets: Mapping[str, AdapterSet]) -> list[str]:
    """Return one line per component: adapter layers, trainable parameters, and their share of the base's."""
    lines = []
    for name, adapters in sets.items():
        base = sum(parameter.numel() for parameter in components[name].parameters())
        trainable = sum(parameter.numel() for parameter in adapters.parameters())
        lines.append(
            f"{name}: {len(adapters.trained)} layers, {trainable:,} trainable parameters "
            f"({100 * trainable / max(1, base):.2f} % of {base:,})"
        )
    return lines


def _fresh(
    layer: nn.Module, target: Target, options: FreshOptions, generator: torch.Generator
) -> tuple[LayerAdapter, Trained]:
    algorithm: Algorithm = TRAINED[target.algorithm]
    spec = LayerSpec.of(layer)
    assert spec is not None  # the index of the stack holds only such layers
    drawn = algorithm.init(spec, InitOptions(target.rank, options.tucker, options.init, generator))
    constants = algorithm.constants
    slots = {name: slot if name in constants else nn.Parameter(slot) for name, slot in drawn.items()}
    alpha = float(target.rank if target.alpha is None else target.alpha)
    fresh = LayerAdapter(algorithm, slots, algorithm.scale(slots, alpha, options.rule), dropout=options.dropout)
    if algorithm.needs_base:
        _require_readable(layer, spec, algorithm.name)
    if options.dora:
        fresh.magnitude = _fresh_magnitude(layer, spec)
    return fresh, Trained(algorithm.name, _counted(fresh, alpha), options.rule, target.learning_rate)


def _counted(layer: LayerAdapter, alpha: float) -> float | None:
    """Return `alpha`, or None where the scale of these slots is not made of one."""
    return None if layer.algorithm.own_rule(layer.slots) in ("none", "constraint") else alpha


def _require_readable(layer: nn.Module, spec: LayerSpec, name: str) -> None:
    problem = unreadable(layer, spec, name)
    if problem:
        raise ConfigError(problem)


def _fresh_magnitude(layer: nn.Module, spec: LayerSpec) -> nn.Parameter:
    """Return the norms of the layer's weight. Raises `ConfigError` for a layer whose weight has none per output."""
    require_kind("dora", spec, frozenset({"linear", "conv"}))
    _require_readable(layer, spec, "dora")
    return nn.Parameter(norms(layer.weight.detach().float()).flatten())  # type: ignore[operator]


def _begun(layer: LayerAdapter, path: str, dropout: Dropout) -> Trained:
    """Make what a file holds for a layer parameters; return what the next file needs beside them."""
    algorithm = layer.algorithm
    untrained = {
        "a change of the layer's bias": layer.bias is not None,
        "a magnitude per input (DoRA)": layer.magnitude is not None and layer.axis == "in",
        f"a module of kind '{algorithm.name}'": algorithm.name not in TRAINED,
    }
    for what, is_there in untrained.items():
        if is_there:
            raise ConfigError(f"layer '{path}': {what} cannot be trained")
    fixed = {name for name, slot in layer.slots.items() if name in algorithm.constants or not slot.is_floating_point()}
    layer.slots = {
        name: slot if name in fixed else nn.Parameter(slot.detach().clone()) for name, slot in layer.slots.items()
    }
    if layer.magnitude is not None:
        layer.magnitude = nn.Parameter(layer.magnitude.detach().float().flatten().clone())
    layer.dropout = dropout
    return Trained(algorithm.name, _counted(layer, layer.scale * algorithm.rank(layer.slots)), "alpha/r")
