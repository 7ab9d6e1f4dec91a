"""Adapters on a pipeline or model that somebody made: load, set_strengths, eject."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from vislora import formats
from vislora.errors import AdapterFileError, AdapterMismatchError, ConfigError, listed, nearest
from vislora.formats.adapter_file import AdapterFile, AdapterModule
from vislora.inject.composition import make_composition
from vislora.inject.engines import choose_engine, require_engine
from vislora.inject.engines import explain as explain_model
from vislora.inject.injection import FileModule, find_misfits, inject_modules, release_room, reserve_room
from vislora.inject.injection import eject as eject_from
from vislora.inject.progress import Loop
from vislora.inject.stack import Stack, existing_stack, settle
from vislora.inject.strength import Strength, per_image
from vislora.inject.targets import index, is_compiled
from vislora.models.base import components_of
from vislora.models.words import forget, teach, teachers

Given = float | Strength | Sequence[float | Strength | None]


def load(
    pipeline: Any,
    path: str | Path,
    strength: Given = 1.0,
    name: str | None = None,
    *,
    allow_partial: bool = False,
    allow_pickle: bool = False,
) -> list[str]:
    """Put the adapter file at `path` on `pipeline` (a diffusers pipeline, or any module) and return what did not fit.

    `strength` multiplies the trained effect; see `set_strengths`. `name` is what `set_strengths` and `eject` call it;
    default: the file's stem. The returned list is empty unless `allow_partial`, but for words (textual inversion
    embeddings in the file) that the base cannot learn. `allow_pickle` is that of `formats.load`. On any error the
    pipeline is as it was.
    Raises `AdapterFileError`, `AdapterMismatchError`, or `ConfigError` for a name in use.
    """
    return attach(pipeline, formats.load(path, allow_pickle), name or Path(path).stem, strength, allow_partial)


def attach(
    pipeline: Any, adapter_file: AdapterFile, name: str, strength: Given = 1.0, allow_partial: bool = False
) -> list[str]:
    """Put an adapter that is in memory on `pipeline`; see `load`."""
    family, components = components_of(pipeline)
    strengths = per_image(name, strength)
    _require_fitting({**_set(_stacks(pipeline)), name: strengths}, components)
    found = by_component(adapter_file, components, isinstance(pipeline, nn.Module))
    missing = [component for component in found if component not in components]
    misfits = [f"{component}: this pipeline has no such component" for component in missing]
    if missing and (not allow_partial or len(missing) == len(found)):
        for component in found.keys() & components.keys():
            lines = find_misfits(components[component], found[component])
            misfits += [f"{component}.{line}" for line in lines]
        title = f"adapter '{name}' does not fit:{_looks(adapter_file, family)}"
        raise AdapterMismatchError(listed(title, misfits, limit=len(missing) + 5))
    done: list[nn.Module] = []
    try:
        for component in (item for item in found if item not in missing):
            model, modules = components[component], found[component]
            fits, lines = _inject_what_fits(model, component, name, modules, strengths, allow_partial)
            done += [model] if fits else []
            misfits += [f"{component}.{line}" for line in lines]
        if not done:
            raise AdapterMismatchError(listed(f"nothing of adapter '{name}' fits:", misfits, limit=5))
        misfits += _taught(pipeline, name, adapter_file)
    except AdapterMismatchError as error:
        _undo(done, name)
        raise AdapterMismatchError(f"{error}{_looks(adapter_file, family)}") from None
    except BaseException:
        _undo(done, name)
        raise
    for model in done:
        _choose_engine(model, name)
    _follow(pipeline, components)
    return misfits


def _taught(pipeline: Any, name: str, adapter_file: AdapterFile) -> list[str]:
    """Teach the words that the adapter's file carries; return why not, where the base cannot learn them."""
    if not adapter_file.embeddings:
        return []
    try:
        teach(pipeline, name, adapter_file.embeddings)
        return []
    except AdapterMismatchError as error:
        return [f"{len(adapter_file.embeddings)} words: {error}"]


def load_embedding(
    pipeline: Any, path: str | Path, name: str | None = None, *, allow_pickle: bool = False
) -> list[str]:
    """Teach the text encoders of `pipeline` the words of a textual inversion file; return these, to use in prompts.

    They are the tokens that the file names, else its stem. `name` is what `eject` calls them; default: the stem.
    Raises `AdapterFileError` for a file that is none, `AdapterMismatchError` for another base's, and `ConfigError` for
    a name in use.
    """
    words = formats.load_embedding(path, allow_pickle)
    owner = name or Path(path).stem
    if owner in {*teachers(pipeline), *loaded_strengths(pipeline)}:
        raise ConfigError(f"something named '{owner}' is loaded already; choose another name or eject it first")
    teach(pipeline, owner, words)
    return list(words)


def _choose_engine(model: nn.Module, name: str) -> None:
    """Give the layers of an adapter the engine of their model; of the first adapter, by the rule."""
    stack = existing_stack(model)
    assert stack is not None
    choose_engine(model, "auto" if len(stack.strengths) == 1 else stack.engine, stack.paths[name])


def _inject_what_fits(
    model: nn.Module,
    component: str,
    name: str,
    modules: list[FileModule],
    strengths: Sequence[Strength],
    allow_partial: bool,
) -> tuple[bool, list[str]]:
    """Inject a component and return what did not fit; one of which nothing fits is left out when that is allowed."""
    try:
        return True, inject_modules(model, name, modules, strengths, allow_partial, component)
    except AdapterMismatchError:
        if not allow_partial:
            raise
        return False, [f"{module.path}: no module of this component fits" for module in modules]


def set_strengths(pipeline: Any, strengths: Mapping[str, Given], engine: str | None = None) -> None:
    """Set the strength of loaded adapters by name; those not named keep theirs. All or none are changed.

    A strength is a number, a `Strength` (components, layers, steps, region), or a sequence of them, one per image that
    a call of the pipeline makes, where None is 0. Sequences are of one length; adapters without one act on all images.
    `engine`: auto, merged or stacked (see docs/stacks.md); None leaves it as it is.
    Raises `ConfigError` for an unknown name or a strength that is no sensible number or names what is not there.
    """
    if engine is not None:
        require_engine(engine)
    stacks = _stacks(pipeline)
    _, components = components_of(pipeline)
    for name in strengths:
        _require_loaded(stacks, name)
    checked = {name: per_image(name, given) for name, given in strengths.items()}
    _require_fitting({**_set(stacks), **checked}, components)
    changes = {
        component: {name: given for name, given in checked.items() if name in stack.strengths}
        for component, stack in stacks.items()
    }
    for component, stack in stacks.items():
        stack.require_room(changes[component])
    for component, stack in stacks.items():
        stack.set_strengths(changes[component])
    if engine is not None:
        for model in components.values():
            choose_engine(model, engine)
    _follow(pipeline, components)


def set_composition(pipeline: Any, method: str, **settings: Any) -> None:
    """Choose how the loaded adapters act together in the denoiser of `pipeline`: see docs/composition.md.

    `sum`: all at once. `switch` (every, shares), `composite` (shares), `klora` (content, style, alpha, beta). It stays
    until another is set or the last adapter is ejected. Raises `ConfigError` for an unknown method, setting or adapter,
    and for a compiled or reserved model; then nothing is changed.
    """
    made = make_composition(method, settings)
    stacks = _stacks(pipeline)
    if made is None and not stacks:
        return
    for name in composed_names(settings):
        _require_loaded(stacks, name)
    _, components = components_of(pipeline)
    chosen = {name: stack for name, stack in stacks.items() if not name.startswith("te:")}
    if not chosen:
        raise ConfigError(f"composition '{method}' is of loaded adapters: load some on the denoiser first")
    compiled = [name for name in chosen if made is not None and is_compiled(components[name])]
    if compiled:
        raise ConfigError(
            f"composition '{method}' changes from step to step, which compiled models do not: {compiled[0]}"
        )
    for stack in chosen.values():
        stack.set_composition(made)
    _follow(pipeline, components)


def composed_names(settings: Mapping[str, Any]) -> list[str]:
    """Return the adapters that the settings of a composition name."""
    return [*settings.get("shares", {}), *(settings[key] for key in ("content", "style") if key in settings)]


def explain(pipeline: Any) -> list[str]:
    """Return a line per component, adapter and engine: how many layers compute in which way, and why."""
    components = components_of(pipeline)[1]
    return [line for component, model in components.items() for line in explain_model(component, model)]


def reserve(pipeline: Any, max_rank: int, layers: str | Sequence[str] = "all") -> None:
    """Reserve room for LoRAs in every component, so that no change of adapters recompiles what `torch.compile` made.

    `max_rank`: what the ranks of the active adapters may come to, on every layer; any number may be loaded. `layers`: a
    preset (attention, attention-ff, all, every-layer) or patterns; adapters with other layers are then refused, and so
    are algorithms other than plain LoRA. Call it after `torch.compile`, once; it costs what a LoRA of `max_rank` does.
    Raises `ConfigError` or `AdapterMismatchError`; then nothing is changed.
    """
    if isinstance(max_rank, bool) or not isinstance(max_rank, int) or max_rank < 1:
        raise ConfigError(f"max_rank is {max_rank!r}: give a whole number of at least 1")
    _, components = components_of(pipeline)
    done: list[nn.Module] = []
    try:
        for component, model in components.items():
            reserve_room(model, max_rank, layers, component)
            done.append(model)
    except BaseException:
        for model in done:
            release_room(model)
        raise
    _follow(pipeline, components)


def unreserve(pipeline: Any) -> None:
    """Give up the room that `reserve` made; the adapters stay."""
    for model in components_of(pipeline)[1].values():
        release_room(model)


def _require_fitting(strengths: Mapping[str, Sequence[Strength]], components: Mapping[str, nn.Module]) -> None:
    """Raise `ConfigError` for strengths that name what is not there, or are for several numbers of images."""
    counts = {name: len(given) for name, given in strengths.items() if len(given) > 1}
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"'{name}' for {count}" for name, count in counts.items())
        raise ConfigError(f"strengths are given for several numbers of images: {shown}; give one per image, or one")
    naming = [(name, one) for name, given in strengths.items() for one in given if one.components or one.layers]
    paths = {component: _paths(model) for component, model in components.items()} if naming else {}
    for name, one in naming:
        one.require_known(name, paths)


def _paths(model: nn.Module) -> Iterable[str]:
    stack = existing_stack(model)
    known = stack.index if stack else index(model)
    return [*known.layers, *known.norms]


def _follow(pipeline: Any, components: Mapping[str, nn.Module]) -> None:
    """Have strengths that depend on the moment told how far the loop of `pipeline` is."""
    for model in components.values():
        stack = existing_stack(model)
        if stack is not None:
            stack.moment.loop = None if isinstance(pipeline, nn.Module) else Loop.of(pipeline)
            settle(model)


def eject(pipeline: Any, name: str | None = None) -> None:
    """Take the adapter or embedding `name` (None: all) out; modules and weights are as before it, bit for bit."""
    stacks, words = _stacks(pipeline), teachers(pipeline)
    if name is not None and name not in words:
        _require_loaded(stacks, name)
    for owner in words:
        if name in (None, owner):
            forget(pipeline, owner)
    _, components = components_of(pipeline)
    for component, stack in stacks.items():
        for loaded in list(stack.strengths):
            if name in (None, loaded):
                eject_from(components[component], loaded)


def loaded_strengths(pipeline: Any) -> dict[str, Given]:
    """Return the strength of every adapter on `pipeline`, by name: a number where it is no more than that."""
    return {name: _shown(given) for name, given in _set(_stacks(pipeline)).items()}


def _set(stacks: Mapping[str, Stack]) -> dict[str, tuple[Strength, ...]]:
    return {name: given for stack in stacks.values() for name, given in stack.strengths.items()}


def _shown(given: Sequence[Strength]) -> Given:
    found: list[float | Strength] = [one.value if one.is_plain else one for one in given]
    return found[0] if len(found) == 1 else found


def by_component(
    adapter_file: AdapterFile, components: Mapping[str, nn.Module], bare: bool = False
) -> dict[str, list[FileModule]]:
    """Sort the file's modules by component; a bare module takes the only one that the file has."""
    found: dict[str, list[FileModule]] = defaultdict(list)
    for module in adapter_file.modules:
        found[module.component].append(_file_module(module))
    if not found:
        raise AdapterFileError("the adapter has no modules")
    if bare and len(found) == 1 and not found.keys() & components.keys():
        return {"denoiser": next(iter(found.values()))}
    return found


def _file_module(module: AdapterModule) -> FileModule:
    if module.uncut:
        raise AdapterFileError(f"'{module.name}' is of a layer that the model has in parts: {module.uncut}")
    bias = module.bias_delta()
    name = "full" if module.only_bias else module.direction_algorithm.name  # raises for a kind that cannot be run
    return FileModule(
        module.path or module.raw_name,
        name,
        module.tensors,
        module.scale,
        module.magnitude,
        module.magnitude_axis or "out",
        None if bias is None else bias.float(),
    )


def _looks(adapter_file: AdapterFile, family: str | None) -> str:
    if adapter_file.family is None or adapter_file.family == family:
        return ""
    return f"\nit looks like an adapter for '{adapter_file.family}'" + (f", this is '{family}'" if family else "")


def _undo(models: list[nn.Module], name: str) -> None:
    for model in models:
        eject_from(model, name)


def _stacks(pipeline: Any) -> dict[str, Stack]:
    _, components = components_of(pipeline)
    found = {component: existing_stack(module) for component, module in components.items()}
    return {component: stack for component, stack in found.items() if stack is not None}


def _require_loaded(stacks: Mapping[str, Stack], name: str) -> None:
    loaded = {known for stack in stacks.values() for known in stack.strengths}
    if name not in loaded:
        shown = ", ".join(sorted(loaded)) or "none"
        raise ConfigError(f"no adapter named '{name}'{nearest(name, loaded)}; loaded: {shown}")
