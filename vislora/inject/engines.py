"""Which way a layer computes its adapters, by one rule, and why: merged, beside the base, or each image its own.

merged      W0 + the deltas in a second weight: where all strengths on the layer are one number each, and the weight is
            float32 or wider ("auto"), or has at least two bytes (asked for by "merged").
stacked     beside the base: everywhere else; LoRAs of a layer as one product.
per image   beside the base: each row with the matrices of its image, where strengths differ by image alone and no image
            has more than half of the layer's ranks; linear layers only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Literal, get_args

from torch import Tensor, nn

from vislora.errors import ConfigError, nearest
from vislora.inject.layer import LayerState, is_wrapped, state_of, untracked
from vislora.inject.parts import PerImage, parts_of
from vislora.inject.stack import Stack, existing_stack
from vislora.inject.targets import unwrapped

Engine = Literal["auto", "merged", "stacked"]
PLAIN = {base.forward for base in (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)}


def require_engine(name: str) -> None:
    """Raise `ConfigError` when there is no such engine."""
    known = get_args(Engine)
    if name not in known:
        raise ConfigError(f"unknown engine '{name}'{nearest(name, known)}; known: {', '.join(known)}")


def choose_engine(model: nn.Module, engine: str, paths: Iterable[str] | None = None) -> None:
    """Have the adapted layers at `paths` (None: all) compute by `engine` from their next forward on."""
    stack = existing_stack(model)
    if stack is not None:
        _choose(stack, engine, paths, engine != "stacked" and _group_offloaded(model))


def _choose(stack: Stack, engine: str, paths: Iterable[str] | None, away: bool) -> None:
    stack.engine = engine
    for path in stack.adapted() if paths is None else paths:
        layer = stack.at(path)
        state = state_of(layer)
        if state is not None:
            merges = not why_beside(layer, state, engine)
            if merges != state.merges and not (merges and away):
                state.merges = merges
                state.drop()


def merge(model: nn.Module) -> None:
    """Compute W0 + the sum of the active deltas of every layer into a second buffer, in float32 with one rounding.

    The base weight is only read. Layers that compute in a way of their own (quantised ones), whose weight is kept in so
    few bits that a delta would drown in its rounding, or whose weight is away (offloading), stay unmerged. The buffer
    follows a base weight that is loaded or written to later; only what is written through `.data` torch does not tell:
    then merge again.
    """
    stack = existing_stack(model)
    if stack is None or _group_offloaded(model):
        return
    _choose(stack, "merged", None, away=False)
    with untracked():
        pending = []
        for path in stack.adapted():
            layer = stack.at(path)
            state = state_of(layer)
            if state is not None and state.can_merge:
                state.drop()
                pending.append(state.merging(layer.weight))  # type: ignore[arg-type]
        # all of Python's part first: between two layers' products, which fill the caches, it takes twice as long
        for merge_layer in pending:
            merge_layer()


def unmerge(model: nn.Module) -> None:
    """Drop the merged buffers; the adapters compute beside the base again."""
    choose_engine(model, "stacked")


def why_beside(layer: nn.Module, state: LayerState, engine: str) -> str:
    """Return why `layer` cannot have, or was not to have, a merged weight; empty when it gets one."""
    return next((reason for holds, reason in _reasons(layer, state, engine) if holds), "")


def _reasons(layer: nn.Module, state: LayerState, engine: str) -> Iterator[tuple[bool, str]]:
    weight = getattr(layer, "weight", None)
    yield state.room is not None, "reserved for a compiled model"
    yield engine == "stacked", "asked for"
    own = state.base_class.forward not in PLAIN or not isinstance(weight, Tensor)
    yield own, f"{state.base_class.__name__} computes in a way of its own"
    assert isinstance(weight, Tensor)
    yield is_wrapped(weight), f"the weight is kept as {type(weight).__name__}"
    yield weight.is_meta or getattr(layer.__dict__.get("_hf_hook"), "offload", False), "the weight is away (offloading)"
    narrow = not weight.dtype.is_floating_point or weight.dtype.itemsize < 2
    yield narrow, "the weight has too few bits to add to"
    small = engine == "auto" and weight.dtype.itemsize < 4
    yield small, f"{str(weight.dtype).removeprefix('torch.')} would round small changes away"


def explain(component: str, model: nn.Module) -> list[str]:
    """Return a line for every adapter and engine on `model`: how many layers, and why."""
    stack = existing_stack(model)
    if stack is None:
        return []
    away = _group_offloaded(model)
    lines = []
    for name in sorted(stack.strengths):
        found = Counter(_way(stack, path, name, away) for path in stack.paths[name])
        lines += [f"{component}: {name}: {count} layers {way}" for way, count in found.items()]
    return lines


def _way(stack: Stack, path: str, name: str, away: bool) -> str:
    layer = stack.at(path)
    state = state_of(layer)
    if state is None or name not in state.on:
        return "not computed: strength 0"
    varying = sorted(other for other, adapter in state.on.items() if adapter.varies)
    if not varying:
        reason = "weights are offloaded in groups" if away else why_beside(layer, state, stack.engine)
        return f"stacked: {reason}" if reason else "merged: one strength for all images, steps and places"
    if state.room is None and any(isinstance(part, PerImage) for part in parts_of(list(state.on.values()), layer)):
        return "per image: every image has a few of the adapters"
    return f"stacked: the strength of {', '.join(varying)} differs by image, step or place"


def _group_offloaded(model: nn.Module) -> bool:
    """Say whether diffusers may hold weights on the disk: what is in memory between two forwards is then noise."""
    pending = [unwrapped(model)]
    while pending:
        module = pending.pop()
        registry = module.__dict__.get("_diffusers_hook")
        if registry is not None and "group_offloading" in registry.hooks:
            return True
        pending += [child for child in module._modules.values() if child is not None]
    return False
