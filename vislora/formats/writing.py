"""Save an adapter in any known format, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vislora.errors import AdapterFileError, ConfigError, listed
from vislora.files import replacing
from vislora.formats.adapter_file import AdapterFile, AdapterModule
from vislora.formats.container import CONFIG, WEIGHTS, is_peft_folder
from vislora.formats.contract import Format, Packed, Place, Stored
from vislora.formats.embeddings import bundle_key
from vislora.formats.fusing import fuse, halves_exchanged, stored, why_unfusable
from vislora.formats.names import DENOISERS, Share
from vislora.formats.names.hints import family_of
from vislora.formats.parsed import inputs_of
from vislora.formats.rows import NotByRowsError, instead, is_swapped
from vislora.formats.slots import KINDS
from vislora.formats.tensor_file import write_tensors
from vislora.registry import FORMATS

STALE_WHEN_REWRITTEN = ("modelspec.hash_sha256",)


@dataclass(frozen=True)
class Loss:
    """Something that a format cannot hold. `reason`: why, with `{}` for how many; `names`: of modules or tensors."""

    reason: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.reason.format(len(self.names))} (first: {self.names[0]})"


def save(adapter_file: AdapterFile, path: str | Path, format: str) -> None:
    """Write `adapter_file` to `path`, a .safetensors file or (for `peft`) a folder, replacing what is there.

    Dtypes and shapes stay as they are, alpha is written exactly or as float32, metadata verbatim. Raises
    `AdapterFileError`, and writes nothing, when the format cannot hold all of it.
    """
    packed = pack(adapter_file, path, format)
    with replacing(path) as temporary:
        write(packed, temporary)


def pack(adapter_file: AdapterFile, path: str | Path, format: str) -> list[Packed]:
    """Return the files that `save` writes. Raises `AdapterFileError` as it does; `path` is looked at, not touched."""
    losses = unwritable(adapter_file, format)
    if losses:
        name = writable(format).name
        raise AdapterFileError(listed(f"{path}: a {name} adapter cannot hold all of this:", map(str, losses)))
    return pack_whole(adapter_file, path, format)


def pack_whole(adapter_file: AdapterFile, path: str | Path, format: str) -> list[Packed]:
    """Do as `pack`, for an adapter of which nothing is `unwritable`."""
    form = writable(format)
    if not adapter_file.modules:
        raise AdapterFileError(f"{path}: the adapter has no modules to write")
    _check_destination(Path(path), form)
    family = family_for_writing(adapter_file)
    metadata = {key: value for key, value in adapter_file.metadata.items() if key not in STALE_WHEN_REWRITTEN}
    assert form.pack is not None
    packed = form.pack(lay_out(adapter_file.modules, form, family), family, metadata)
    packed[0].tensors.update(_bundle(adapter_file))
    return packed


def write(packed: list[Packed], path: Path) -> None:
    """Write these files to `path`, where nothing is: whoever calls this puts them in place, or takes them away."""
    for item in packed:
        if item.config is None:
            _write_file(item, path)
        else:
            _write_folder(item, path / item.folder)


def writable(format: str) -> Format:
    """Return the format of this name. Raises `ConfigError` when it is unknown, or only read."""
    form: Format = FORMATS[format]
    if not form.writable:
        known = ", ".join(name for name in FORMATS if FORMATS[name].writable)
        raise ConfigError(f"'{format}' files are only read, not written; formats to write: {known}")
    return form


def unwritable(adapter_file: AdapterFile, format: str) -> list[Loss]:
    """Return everything of an adapter that `format` cannot hold, grouped by reason."""
    form = writable(format)
    family = family_for_writing(adapter_file)
    reasons: dict[str, list[str]] = {}
    good = []
    for module in adapter_file.modules:
        reason = why_unwritable(module, form, family)
        if reason:
            reasons.setdefault(reason, []).append(module.name)
        else:
            good.append(module)
    for reason, names in [*_unfusable(good, form, family).items(), *_conflicts(good, form, family).items()]:
        reasons.setdefault(reason, []).extend(names)
    if form.magnitudes != "any":
        for module in _bare_among_dora(adapter_file.modules):
            reasons.setdefault(
                f"{{}} modules without DoRA: {form.name} has it on all modules of a component or on none", []
            ).append(module.name)
    if adapter_file.embeddings and not form.embeddings:
        reasons[f"{{}} embeddings, which have no place in a {format} adapter"] = list(adapter_file.embeddings)
    if adapter_file.extras:
        reasons["{} tensors that belong to no module"] = list(adapter_file.extras)
    return [Loss(reason, tuple(names)) for reason, names in reasons.items()]


def _conflicts(modules: list[AdapterModule], form: Format, family: str | None) -> dict[str, list[str]]:
    """Return the names of modules that cannot stand beside the others, by reason."""
    if not form.scales_all:
        return {}
    placed = {_place(module, form, family).name: module for module in modules}
    reasons: dict[str, list[str]] = {}
    for reason, names in form.conflicts(lay_out(modules, form, family)).items():
        for module in (placed[name] for name in names):
            reasons.setdefault(reason + instead(module.algo, module.tensors), []).append(module.name)
    return reasons


def _bare_among_dora(modules: list[AdapterModule]) -> list[AdapterModule]:
    """Return the modules without a magnitude in a component where others have one."""
    dora = {module.component for module in modules if module.magnitude is not None}
    return [module for module in modules if module.component in dora and module.magnitude is None]


def why_unwritable(module: AdapterModule, form: Format, family: str | None) -> str:
    """Return why `form` cannot hold `module`, with `{}` for the number of such modules, or '' when it can."""
    if module.unsupported:
        return f"not supported yet: {{}} modules {module.unsupported}"
    nowhere = _why_no_place(module, form, family)
    if nowhere:
        return nowhere
    slots = sorted({*module.tensors, *(() if module.bias is None else ("bias",))} - set(form.suffixes))
    if slots and not (form.foreign and module.algo not in KINDS):
        advice = instead(module.algo, module.tensors)
        return f"{{}} modules with {' and '.join(slots)}, for which {form.name} files have no slot{advice}"
    return _why_not_meant(module, form)


def _why_not_meant(module: AdapterModule, form: Format) -> str:
    """Return why readers of `form` would take the module for another, or ''."""
    if module.alpha == 0.0 and form.zero_alpha == "rank":
        return f"{{}} modules with alpha 0, which means alpha = rank in {form.name} files"
    if form.magnitudes != "any" and module.magnitude is not None and module.magnitude_axis == "in":
        return f"{{}} modules with DoRA per input, which {form.name} files do not have"
    if module.only_bias and form.scales_all:
        return f"{{}} modules with a bias and nothing else, for which {form.name} files have no place"
    if module.bias is not None and form.scales_all and module.scale == 0.0:
        return f"{{}} modules with a bias and the scale 0, by which readers of {form.name} files multiply it"
    return ""


def _why_no_place(module: AdapterModule, form: Format, family: str | None) -> str:
    model = f"family '{family}'" if family else "an unknown family (name it with the setting `family`)"
    if module.path is None and not module.uncut:
        return "{} modules whose names no model family has"
    if module.path is None:
        if form.whole(module.component, module.group or "", family) is not None:
            return ""
        return f"{{}} modules of whole layers, of which {form.name} files store parts or another order: {module.uncut}"
    place = form.place(module.component, module.path, family)
    if place is None:
        return f"{{}} modules without a {form.name} name in {model}"
    try:
        if _swapped(module, place):
            halves_exchanged(module)
    except NotByRowsError as problem:
        return f"{{}} modules whose layer {form.name} files reorder: {problem}"
    return ""


def _unfusable(modules: list[AdapterModule], form: Format, family: str | None) -> dict[str, list[str]]:
    """Return reason -> names of modules that are parts of one layer in this format and cannot be fused."""
    layers: dict[str, list[AdapterModule | None]] = {}
    sizes: dict[str, tuple[int, ...]] = {}
    for module in modules:
        place = form.place(module.component, module.path, family) if module.path else None
        if place is not None and place.part is not None:
            sizes[place.name] = place.part.sizes
            layers.setdefault(place.name, [None] * len(place.part.sizes))[place.part.index] = module
    reasons: dict[str, list[str]] = {}
    for name, members in layers.items():
        problem = why_unfusable(members, sizes[name])
        if problem:
            reason = f"{{}} modules that {form.name} files fuse into one: {problem}"
            reasons.setdefault(reason, []).extend(member.name for member in members if member is not None)
    return reasons


def family_for_writing(adapter_file: AdapterFile) -> str | None:
    """Return the adapter's family; when it has none, that of its layers' names, else that in its metadata."""
    denoiser = [module for module in adapter_file.modules if module.component in DENOISERS]
    paths = {module.tree_name: inputs_of(module.tensors) for module in denoiser if module.tree_name}
    components = {module.component for module in adapter_file.modules} - set(DENOISERS)
    return adapter_file.family or family_of(paths, adapter_file.metadata, components)


def lay_out(modules: Iterable[AdapterModule], form: Format, family: str | None) -> list[Stored]:
    """Rename modules as `form` has them, fusing and swapping rows where its names stand for other layers."""
    singles: dict[str, Stored] = {}
    fused: dict[str, list[AdapterModule | None]] = {}
    sizes: dict[str, tuple[int, ...]] = {}
    for module in modules:
        place = _place(module, form, family)
        part = place.part or Share(0, (1,))
        sizes[place.name] = part.sizes
        taken = fused.setdefault(place.name, [None] * len(part.sizes))
        if len(taken) != len(part.sizes) or taken[part.index] is not None:
            raise AdapterFileError(f"several modules would be written as '{place.name}'")
        taken[part.index] = module
        if place.part is None:
            singles[place.name] = stored(place.name, module, _swapped(module, place), form.scales_all)
    return [singles[name] if name in singles else fuse(name, fused[name], sizes[name]) for name in sizes]


def _place(module: AdapterModule, form: Format, family: str | None) -> Place:
    """Return where a module is stored: one that stays whole under its layer's original name, as it is."""
    if module.path is None and module.uncut:
        name = form.whole(module.component, module.group or "", family)
        place = Place(name) if name else None
    else:
        place = form.place(module.component, module.path or "", family)
    if place is None:
        raise AdapterFileError(f"{form.name} has no name for '{module.name}'")
    return place


def _swapped(module: AdapterModule, place: Place) -> bool:
    return place.swap != "never" and is_swapped(place.swap, module.algo, module.tensors)


def _bundle(adapter_file: AdapterFile) -> dict[str, Tensor]:
    embeddings = adapter_file.embeddings.items()
    return {bundle_key(name, slot): tensor for name, slots in embeddings for slot, tensor in slots.items()}


def _check_destination(path: Path, form: Format) -> None:
    if form.container == "file" and path.is_dir():
        raise AdapterFileError(f"{path}: is a folder; a {form.name} adapter is a .safetensors file")
    if form.container == "folder" and path.is_file():
        raise AdapterFileError(f"{path}: is a file; a {form.name} adapter is a folder")
    if form.container == "folder" and path.is_dir() and any(path.iterdir()) and not is_peft_folder(path):
        raise AdapterFileError(f"{path}: the folder holds something else than a PEFT adapter, and is left as it is")


def _write_file(packed: Packed, path: Path) -> None:
    write_tensors(path, {key: _tensor(key, value) for key, value in packed.tensors.items()}, packed.metadata)


def _write_folder(packed: Packed, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(packed.config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _write_file(packed, folder / WEIGHTS)


def _tensor(key: str, value: Tensor | float) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if not abs(value) <= torch.finfo(torch.float32).max:
        raise AdapterFileError(f"'{key}' is {value}, which float32 cannot hold")
    return torch.tensor(value, dtype=torch.float32)
