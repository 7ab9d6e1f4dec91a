"""Puts the modules of adapter files into any `nn.Module`, and takes adapters out again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vislora.algorithms.base import Algorithm, LayerSpec, fits
from vislora.algorithms.dora import Axis
from vislora.errors import AdapterFileError, AdapterMismatchError, ConfigError, listed
from vislora.globs import matches
from vislora.inject.layer import is_wrapped, state_of
from vislora.inject.moment import Moment
from vislora.inject.parts import LayerAdapter, takes_lora
from vislora.inject.stack import Stack, existing_stack, settle, stack_of
from vislora.inject.targets import PRESETS, unwrapped
from vislora.registry import ALGORITHMS


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
    with changing(model, component) as stack:
        layers, misfits = fitted(stack, modules)
        if not layers or not allow_partial:
            require_fit(model, name, modules, misfits)
        stack.add(name, layers, strength)
    return misfits


def require_fit(model: nn.Module, name: str, modules: Sequence[FileModule], misfits: Sequence[str]) -> None:
    """Raise `AdapterMismatchError` with what of the modules does not fit, if anything."""
    if misfits or not modules:
        count = len(modules) - len(misfits)
        fit = f"{count} of {len(modules)} modules of adapter '{name}' fit {type(unwrapped(model)).__name__}"
        raise AdapterMismatchError(listed(f"{fit}; those that do not:", misfits, limit=5))


def find_misfits(model: nn.Module, modules: list[FileModule]) -> list[str]:
    """Return what of a file would not fit `model`, as "path: reason"; nothing is injected."""
    with changing(model) as stack:
        return fitted(stack, modules)[1]


def eject(model: nn.Module, name: str) -> None:
    """Take the adapter `name` out of `model`: classes, module tree and weights are as before, bit for bit."""
    with changing(model) as stack:
        stack.remove(name)


def reserve_room(
    model: nn.Module, max_rank: int, layers: str | Sequence[str] = "all", component: str | None = None
) -> None:
    """Reserve room for adapters on the layers of a preset or of patterns; see `jobs.pipelines.reserve`."""
    with changing(model, component) as stack:
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
        with changing(model) as stack:
            stack.drop_room()


def resolve(stack: Stack, path: str) -> str:
    """Return the model's own path for a file's: CLIP text encoders are with or without the level `text_model`."""
    other = path.removeprefix("text_model.") if path.startswith("text_model.") else f"text_model.{path}"
    for candidate in (path, other):
        found = stack.index.aliases.get(candidate, candidate)
        if stack.layer(found) is not None:
            return found
    return path


@contextmanager
def changing(model: nn.Module, component: str | None = None) -> Iterator[Stack]:
    """Give the stack of `model`; see `settle` for what is done afterwards, errors included."""
    try:
        yield stack_of(model, component)
    finally:
        settle(model)


def _wide(dtype: torch.dtype) -> bool:
    """Say whether numbers of this type are worth casting slots, or rounding a merged weight, to."""
    return dtype.is_floating_point and dtype.itemsize > 1


def fitted(
    stack: Stack, modules: Sequence[FileModule], dtype: torch.dtype | None = None
) -> tuple[dict[str, LayerAdapter], list[str]]:
    """Return what the modules are on their layers, by path, and what does not fit.

    `dtype`: of the slots; None: that of each layer.
    """
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
            layers[path] = _layer_adapter(layer, module, stack.moment, dtype)
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
        return unreadable(layer, spec, algorithm.name if module.magnitude is None else "dora")
    return None


def unreadable(layer: nn.Module, spec: LayerSpec, name: str) -> str | None:
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


def _layer_adapter(layer: nn.Module, module: FileModule, moment: Moment, dtype: torch.dtype | None) -> LayerAdapter:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    device = weight.device if not weight.is_meta else torch.device("cpu")
    dtype = dtype or (weight.dtype if _wide(weight.dtype) else None)
    algorithm: Algorithm = ALGORITHMS[module.algorithm]
    slots = algorithm.moved({name: slot.detach() for name, slot in module.slots.items()}, device, dtype)
    more = [None if tensor is None else tensor.detach().to(device) for tensor in (module.magnitude, module.bias)]
    return LayerAdapter(algorithm, slots, module.scale, more[0], module.axis, more[1], moment=moment)
