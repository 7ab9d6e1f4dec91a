"""Puts adapters into any `nn.Module` and takes them out again: fresh ones to train, or the modules of a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vislora.algorithms.base import Algorithm, Init, InitOptions, LayerSpec, Rule, fits, require_kind
from vislora.algorithms.dora import Axis, norms
from vislora.errors import AdapterFileError, AdapterMismatchError, ConfigError, listed
from vislora.globs import matches
from vislora.inject.layer import is_wrapped, state_of
from vislora.inject.moment import Moment
from vislora.inject.parts import Dropout, LayerAdapter, takes_lora
from vislora.inject.stack import Stack, existing_stack, settle, stack_of
from vislora.inject.targets import PRESETS, Target, unwrapped
from vislora.registry import ALGORITHMS, TRAINED

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
    with _changing(model) as stack:
        layers, trained = {}, {}
        for path, target in chosen.items():
            try:
                layers[path], trained[path] = _fresh(stack.index.layers[path], target, options, generator)
            except ConfigError as error:
                raise ConfigError(f"layer '{path}': {error}") from None
        stack.add(name, layers, 1.0)
        stack.freeze(model, name)
    return AdapterSet(layers, trained)


@dataclass(frozen=True)
class FileModule:
    """One module of an adapter file as injection needs it.

    path: the file's own dotted path. magnitude, axis: DoRA's, on top. bias: the change of the layer's bias; when there
    are no slots, it is all there is.
    """

    path: str
    algorithm: str
    slots: Mapping[str, Tensor]
    scale: float
    magnitude: Tensor | None = None
    axis: Axis = "out"
    bias: Tensor | None = None


def inject_modules(
    model: nn.Module,
    name: str,
    modules: list[FileModule],
    strength: Any = 1.0,
    allow_partial: bool = False,
    component: str | None = None,
) -> list[str]:
    """Put the modules of a file on `model`; return what did not fit, as "path: reason" (empty unless `allow_partial`).

    Slots are cast to the layer's device and, when it is a floating one, dtype. The model is untouched on any error.
    `strength`: a number, a `Strength`, or a sequence of them, one per image. `component`: what the model is in its
    pipeline, for the strengths.
    Raises `AdapterMismatchError` when a module has no layer or another shape, or nothing fits.
    """
    with _changing(model, component) as stack:
        layers, misfits = _fitted(stack, modules)
        if not layers or (misfits and not allow_partial):
            fit = f"{len(layers)} of {len(modules)} modules of adapter '{name}' fit {type(unwrapped(model)).__name__}"
            raise AdapterMismatchError(listed(f"{fit}; those that do not:", misfits, limit=5))
        stack.add(name, layers, strength)
    return misfits


def find_misfits(model: nn.Module, modules: list[FileModule]) -> list[str]:
    """Return what of a file would not fit `model`, as "path: reason"; nothing is injected."""
    with _changing(model) as stack:
        return _fitted(stack, modules)[1]


def eject(model: nn.Module, name: str) -> None:
    """Take the adapter `name` out of `model`: classes, module tree and weights are as before, bit for bit."""
    with _changing(model) as stack:
        stack.remove(name)


def reserve_room(
    model: nn.Module, max_rank: int, layers: str | Sequence[str] = "all", component: str | None = None
) -> None:
    """Reserve room for adapters on the layers of a preset or of patterns; see `jobs.pipelines.reserve`."""
    with _changing(model, component) as stack:
        if stack.reserve is not None:
            raise ConfigError("this model is reserved already; unreserve it first")
        patterns = PRESETS.get(layers, (layers,)) if isinstance(layers, str) else layers
        paths = [
            path
            for path, layer in stack.index.layers.items()
            if any(matches(pattern, path) for pattern in patterns) and takes_lora(layer)
        ]
        if not paths:
            raise ConfigError(f"layers {layers!r} are no layers of {type(unwrapped(model)).__name__} for LoRAs")
        stack.make_room(max_rank, paths)


def release_room(model: nn.Module) -> None:
    """Give up the room that was reserved, if any."""
    if existing_stack(model) is not None:
        with _changing(model) as stack:
            stack.drop_room()


def resolve(stack: Stack, path: str) -> str:
    """Return the model's own path for a file's: CLIP text encoders are with or without the level `text_model`."""
    other = path.removeprefix("text_model.") if path.startswith("text_model.") else f"text_model.{path}"
    for candidate in (path, other):
        found = stack.index.aliases.get(candidate, candidate)
        if stack.layer(found) is not None:
            return found
    return path


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


@contextmanager
def _changing(model: nn.Module, component: str | None = None) -> Iterator[Stack]:
    """Give the stack of `model`; see `settle` for what is done afterwards, errors included."""
    try:
        yield stack_of(model, component)
    finally:
        settle(model)


def _wide(dtype: torch.dtype) -> bool:
    """Say whether numbers of this type are worth casting slots, or rounding a merged weight, to."""
    return dtype.is_floating_point and dtype.itemsize > 1


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
    problem = _unreadable(layer, spec, algorithm.name) if algorithm.needs_base else None
    if problem:
        raise ConfigError(problem)
    if options.dora:
        fresh.magnitude = _fresh_magnitude(layer, spec)
    own = algorithm.own_rule(slots) in ("none", "constraint")
    return fresh, Trained(algorithm.name, None if own else alpha, options.rule, target.learning_rate)


def _fresh_magnitude(layer: nn.Module, spec: LayerSpec) -> nn.Parameter:
    """Return the norms of the layer's weight. Raises `ConfigError` for a layer whose weight has none per output."""
    require_kind("dora", spec, frozenset({"linear", "conv"}))
    problem = _unreadable(layer, spec, "dora")
    if problem:
        raise ConfigError(problem)
    return nn.Parameter(norms(layer.weight.detach().float()).flatten())  # type: ignore[operator]


def _fitted(stack: Stack, modules: list[FileModule]) -> tuple[dict[str, LayerAdapter], list[str]]:
    layers: dict[str, LayerAdapter] = {}
    misfits: list[str] = []
    for module in modules:
        path = resolve(stack, module.path)
        taken = f"another module of the file is for the same layer, '{path}'" if path in layers else None
        layer = stack.layer(path)
        problem = taken or _misfit(layer, module)
        if problem or layer is None:
            misfits.append(f"{module.path}: {problem}")
        else:
            layers[path] = _layer_adapter(layer, module, stack.moment)
    return layers, misfits


def _misfit(layer: nn.Module | None, module: FileModule) -> str | None:
    if not module.slots:
        return "the model has no such layer" if layer is None else _unlike_bias(layer, module)
    algorithm: Algorithm = ALGORITHMS[module.algorithm]
    try:
        shape = algorithm.shape(module.slots)
    except AdapterFileError as error:
        return str(error)
    if layer is None:
        return f"the model has no such layer (the adapter's delta is {tuple(shape)})"
    return _unlike(layer, algorithm, module, shape) or _unlike_bias(layer, module)


def _unlike(layer: nn.Module, algorithm: Algorithm, module: FileModule, shape: tuple[int, ...]) -> str | None:
    """Return what sets the layer apart from those that this module is for, None when nothing does."""
    spec = LayerSpec.of(layer) or LayerSpec.of_norm(layer)
    assert spec is not None  # the indices of the stack hold only such layers
    kinds = algorithm.kinds(module.slots)
    if not fits(shape, spec.weight_shape, algorithm.flat):
        return f"the adapter's delta is {tuple(shape)}, the layer's weight {tuple(spec.weight_shape)}"
    if spec.kind not in kinds:
        return (
            f"the adapter is for layers of the kind {' or '.join(sorted(kinds))}, the layer is of the kind {spec.kind}"
        )
    if algorithm.needs_base or module.magnitude is not None:
        return _unreadable(layer, spec, algorithm.name if module.magnitude is None else "dora")
    return None


def _unreadable(layer: nn.Module, spec: LayerSpec, name: str) -> str | None:
    """Return why what is called `name` cannot be on a layer whose weight it depends on, None when it can."""
    if is_readable(layer, spec):
        return None
    return f"'{name}' depends on the base weight, which a {_class_name(layer)} does not keep as it is"


def _unlike_bias(layer: nn.Module, module: FileModule) -> str | None:
    if module.bias is None:
        return None
    spec = LayerSpec.of(layer) or LayerSpec.of_norm(layer)
    assert spec is not None  # the indices of the stack hold only such layers
    outputs = spec.weight_shape[0]
    if module.bias.numel() == outputs:
        return None
    return f"the adapter's change of the bias is {tuple(module.bias.shape)}, the layer has {outputs} outputs"


def _class_name(layer: nn.Module) -> str:
    """Return what `layer` is without the adapters on it."""
    state = state_of(layer)
    return (type(layer) if state is None else state.base_class).__name__


def is_readable(layer: nn.Module, spec: LayerSpec) -> bool:
    """Say whether the weight of `layer` is plain numbers, and not those of a quantised layer."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return tuple(weight.shape) == spec.weight_shape and weight.dtype.is_floating_point and not is_wrapped(weight)


def _layer_adapter(layer: nn.Module, module: FileModule, moment: Moment) -> LayerAdapter:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    device = weight.device if not weight.is_meta else torch.device("cpu")
    dtype = weight.dtype if _wide(weight.dtype) else None
    algorithm: Algorithm = ALGORITHMS[module.algorithm]
    slots = algorithm.moved({name: slot.detach() for name, slot in module.slots.items()}, device, dtype)
    more = [None if tensor is None else tensor.detach().to(device) for tensor in (module.magnitude, module.bias)]
    return LayerAdapter(algorithm, slots, module.scale, more[0], module.axis, more[1], moment=moment)
