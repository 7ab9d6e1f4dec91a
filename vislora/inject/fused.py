"""Attention whose projections diffusers fused: which of its layers run then; no adapter is passed over in silence.

`fuse_qkv_projections()` copies the weights of to_q, to_k and to_v into one new layer, to_qkv, and runs that instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from vislora.errors import AdapterMismatchError

FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_kv": ("add_k_proj", "add_v_proj"),
}
"""A fused layer -> the layers whose weights it has."""
PROJECTIONS = {*FUSED, *(part for parts in FUSED.values() for part in parts)}


def can_fuse(module: nn.Module) -> bool:
    """Say whether `module` is an attention of diffusers, old or new."""
    return callable(getattr(type(module), "fuse_projections", None))


def is_fused(attention: nn.Module) -> bool:
    """Say whether `attention` runs its fused layers now.

    The old class never takes `fused_projections` back, nor the layers: there the processor decides.
    """
    if hasattr(type(attention), "unfuse_projections"):
        return bool(attention.fused_projections)
    return "Fused" in type(getattr(attention, "processor", None)).__name__


def idle_layers(attention: nn.Module) -> set[str]:
    """Return the names of the projections that `attention` has and does not run."""
    fused, children = is_fused(attention), attention._modules
    idle: set[str] = set()
    for name, parts in FUSED.items():
        if children.get(name) is not None and all(children.get(part) is not None for part in parts):
            idle.update(parts if fused else [name])
    return idle


@dataclass(frozen=True)
class Watch:
    """An attention and its projections that have adapters, by name. `fused`: some of them are fused layers."""

    path: str
    attention: nn.Module
    layers: Mapping[str, nn.Module]
    fused: bool

    def require_run(self) -> None:
        """Raise `AdapterMismatchError` when one of the projections is passed over; every step asks every attention."""
        if not self.fused and not is_fused(self.attention):
            return
        idle = idle_layers(self.attention)
        for name, layer in self.layers.items():
            # whoever fuses again gets new layers
            if name in idle or (name in FUSED and self.attention._modules.get(name) is not layer):
                raise AdapterMismatchError(_passed_over(f"{self.path}.{name}", name in FUSED))


def watches(layers: Mapping[str, nn.Module], attentions: Mapping[str, nn.Module]) -> list[Watch]:
    """Return a watch for every attention that has projections among `layers` (path -> layer with adapters)."""
    found: dict[str, dict[str, nn.Module]] = {}
    for path, layer in layers.items():
        parent, _, name = path.rpartition(".")
        if parent in attentions and name in PROJECTIONS:
            found.setdefault(parent, {})[name] = layer
    return [Watch(path, attentions[path], names, not FUSED.keys().isdisjoint(names)) for path, names in found.items()]


def _passed_over(path: str, fused: bool) -> str:
    if fused:
        return (
            f"layer '{path}' has an adapter, and unfuse_qkv_projections() took the layer out of use; eject the "
            "adapter, call fuse_qkv_projections() on the model and load it again"
        )
    return (
        f"layer '{path}' has an adapter, and fuse_qkv_projections() made its attention run a fused layer in its place; "
        "call unfuse_qkv_projections() on the model, or eject the adapter"
    )


def require_run(name: str, paths: Iterable[str], attentions: Mapping[str, nn.Module]) -> None:
    """Raise `AdapterMismatchError` when the adapter `name` is for layers that their attention does not run."""
    idle = {f"{path}.{layer}" for path, attention in attentions.items() for layer in idle_layers(attention)}
    found = [path for path in paths if path in idle]
    if found:
        raise AdapterMismatchError(
            f"adapter '{name}' is for {len(found)} layers that are not run, '{found[0]}' for one: "
            "fuse_qkv_projections() made their attention run a fused layer; call unfuse_qkv_projections() on the "
            "model, then load the adapter"
        )
