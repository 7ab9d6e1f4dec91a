"""Puts adapters into any `nn.Module` and takes them out again: fresh ones to train, or the modules of a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vislora.algorithms.base import Algorithm, InitOptions, LayerSpec, Rule, scale_of
from vislora.errors import AdapterMismatchError, listed
from vislora.inject.layer import Dropout, LayerAdapter, state_of
from vislora.inject.stack import Stack, drop_if_empty, existing_stack, stack_of
from vislora.inject.targets import Target
from vislora.registry import ALGORITHMS


@dataclass(frozen=True)
class Trained:
    """What the file of a fresh layer needs beside its slots."""

    algorithm: str
    alpha: float
    rule: Rule


class AdapterSet(nn.Module):
    """The one home of an adapter's parameters while it trains: outside the base, whose `state_dict` stays as it was.

    A parameter is called `path/with/slashes:slot`. `train()` turns the dropouts on, `eval()` off.
    """

    def __init__(self, layers: Mapping[str, LayerAdapter], trained: Mapping[str, Trained]) -> None:
        super().__init__()
        self._layers = dict(layers)
        self.trained = dict(trained)
        for path, layer in self._layers.items():
            for slot, tensor in layer.slots.items():
                self.register_parameter(f"{path.replace('.', '/')}:{slot}", tensor)  # type: ignore[arg-type]
        self.train(True)

    def train(self, mode: bool = True) -> AdapterSet:
        """Turn dropouts on or off."""
        for layer in self._layers.values():
            layer.training = mode
        return super().train(mode)

    def modules_with_slots(self) -> Iterator[tuple[str, Trained, dict[str, Tensor]]]:
        """Yield (path, what the file needs, slots as detached CPU copies) per layer."""
        for path, layer in self._layers.items():
            slots = {name: slot.detach().cpu().clone() for name, slot in layer.slots.items()}
            yield path, self.trained[path], slots


@dataclass(frozen=True)
class FreshOptions:
    """How fresh layers are made. `seed` fixes the draw of every layer, whatever else the process drew before."""

    tucker: bool = False
    init: str = "kaiming"
    rule: Rule = "alpha/r"
    dropout: Dropout = field(default_factory=Dropout)
    seed: int = 0


def inject_fresh(model: nn.Module, name: str, chosen: Mapping[str, Target], options: FreshOptions) -> AdapterSet:
    """Freeze `model`, put a fresh zero-effect adapter on the chosen layers and return its trainable parameters."""
    generator = torch.Generator().manual_seed(options.seed)
    stack = stack_of(model)
    layers, trained = {}, {}
    for path, target in chosen.items():
        spec = LayerSpec.of(stack.layers[path])
        assert spec is not None
        rank = target.rank
        alpha = float(rank if target.alpha is None else target.alpha)
        algorithm: Algorithm = ALGORITHMS[target.algorithm]
        draw = InitOptions(rank, options.tucker, options.init, generator)  # type: ignore[arg-type]
        slots: dict[str, Tensor] = {key: nn.Parameter(slot) for key, slot in algorithm.init(spec, draw).items()}
        layers[path] = LayerAdapter(algorithm, slots, scale_of(alpha, rank, options.rule), dropout=options.dropout)
        trained[path] = Trained(target.algorithm, alpha, options.rule)
    stack.freeze(model)
    stack.add(name, layers, 1.0)
    return AdapterSet(layers, trained)


@dataclass(frozen=True)
class FileModule:
    """One module of an adapter file as injection needs it. `path` is the file's own dotted path."""

    path: str
    algorithm: str
    slots: Mapping[str, Tensor]
    scale: float


def inject_modules(
    model: nn.Module, name: str, modules: list[FileModule], strength: float = 1.0, allow_partial: bool = False
) -> list[str]:
    """Put the modules of a file on `model`; return the paths that did not fit (empty unless `allow_partial`).

    Slots are cast to the layer's device and, when it is a floating one, dtype. The model is untouched on any error.
    Raises `AdapterMismatchError` when a module has no layer or another shape, or nothing fits.
    """
    stack = stack_of(model)
    layers: dict[str, LayerAdapter] = {}
    misfits: list[str] = []
    for module in modules:
        path = resolve(stack, module.path)
        problem = _misfit(stack.layers.get(path), module)
        if problem:
            misfits.append(f"{module.path}: {problem}")
        else:
            layers[path] = _layer_adapter(stack.layers[path], module)
    if misfits and (not allow_partial or not layers):
        drop_if_empty(model)
        fit = f"{len(layers)} of {len(modules)} modules of adapter '{name}' fit {type(model).__name__}"
        raise AdapterMismatchError(listed(f"{fit}; those that do not:", misfits, limit=5))
    stack.add(name, layers, strength)
    return misfits


def eject(model: nn.Module, name: str) -> None:
    """Take the adapter `name` out of `model`: classes, module tree and weights are as before, bit for bit."""
    stack_of(model).remove(name)
    drop_if_empty(model)


def merge(model: nn.Module) -> None:
    """Compute W0 + the sum of the active deltas of every layer into a second buffer, in float32 with one rounding.

    The base weight is only read. Layers that compute in a way of their own (quantised ones) stay unmerged.
    """
    stack = existing_stack(model)
    for layer in stack.layers.values() if stack else ():
        state = state_of(layer)
        if state is None or not _plain(state.base_class) or layer.weight.is_meta:
            continue
        base: Tensor = layer.weight.detach()  # type: ignore[assignment, operator]
        active = state.active()
        if active:
            total = base.to(torch.promote_types(base.dtype, torch.float32))
            for adapter in active:
                total = total + adapter.delta(base)
            state.merged = total.to(base.dtype)


def unmerge(model: nn.Module) -> None:
    """Drop the merged buffers; the adapters compute beside the base again."""
    stack = existing_stack(model)
    for layer in stack.layers.values() if stack else ():
        state = state_of(layer)
        if state is not None:
            state.merged = None


def resolve(stack: Stack, path: str) -> str:
    """Return the model's own path for a file's: CLIP text encoders are with or without the level `text_model`."""
    if path in stack.layers:
        return path
    other = path.removeprefix("text_model.") if path.startswith("text_model.") else f"text_model.{path}"
    return other if other in stack.layers else path


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


def _plain(cls: type[nn.Module]) -> bool:
    return cls.forward in {base.forward for base in (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)}


def _misfit(layer: nn.Module | None, module: FileModule) -> str | None:
    if layer is None:
        return "the model has no such layer"
    spec = LayerSpec.of(layer)
    shape = ALGORITHMS[module.algorithm].shape(module.slots)
    if spec is None or _without_ones(shape) != _without_ones(spec.weight_shape):
        wanted = tuple(spec.weight_shape) if spec else type(layer).__name__
        return f"the adapter's delta is {tuple(shape)}, the layer's weight {wanted}"
    return None


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Drop the kernel of a 1 x 1 conv: files store such layers as linear ones too."""
    return shape[:2] if all(size == 1 for size in shape[2:]) else shape


def _layer_adapter(layer: nn.Module, module: FileModule) -> LayerAdapter:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    device = weight.device if not weight.is_meta else torch.device("cpu")
    dtype = weight.dtype if weight.dtype.is_floating_point and weight.dtype.itemsize > 1 else None
    slots = {name: slot.to(device, dtype or slot.dtype) for name, slot in module.slots.items()}
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        ones = [1] * len(layer.kernel_size)
        slots = {name: slot.view(*slot.shape, *ones) if slot.dim() == 2 else slot for name, slot in slots.items()}
    return LayerAdapter(ALGORITHMS[module.algorithm], slots, module.scale)
