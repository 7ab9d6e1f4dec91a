"""Save an adapter in any known format, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from vislora.errors import AdapterFileError, listed
from vislora.files import replacing
from vislora.formats.adapter_file import AdapterFile, AdapterModule, same_storage
from vislora.formats.container import CONFIG, WEIGHTS, is_peft_folder
from vislora.formats.contract import Format, Packed, Place, Stored
from vislora.formats.detect import family_in_metadata
from vislora.formats.fusing import fuse, stored
from vislora.formats.hashes import training_hashes
from vislora.formats.kohya import has_two_rows_per_input
from vislora.formats.names import family_of_paths
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
    form: Format = FORMATS[format]
    path = Path(path)
    losses = unwritable(adapter_file, format)
    if losses:
        raise AdapterFileError(listed(f"{path}: a {format} adapter cannot hold all of this:", map(str, losses)))
    if not adapter_file.modules:
        raise AdapterFileError(f"{path}: the adapter has no modules to write")
    _check_destination(path, form)
    family = family_for_writing(adapter_file)
    metadata = {key: value for key, value in adapter_file.metadata.items() if key not in STALE_WHEN_REWRITTEN}
    packed = form.pack(lay_out(adapter_file.modules, form, family), family, metadata)
    with replacing(path) as temporary:
        if form.container == "file":
            _write_file(packed[0], temporary)
        else:
            for item in packed:
                _write_folder(item, temporary / item.folder)


def unwritable(adapter_file: AdapterFile, format: str) -> list[Loss]:
    """Return everything of an adapter that `format` cannot hold, grouped by reason."""
    form: Format = FORMATS[format]
    family = family_for_writing(adapter_file)
    reasons: dict[str, list[str]] = {}
    for module in adapter_file.modules:
        reason = why_unwritable(module, form, family)
        if reason:
            reasons.setdefault(reason, []).append(module.name)
    if form.magnitudes != "any":
        for module in _bare_among_dora(adapter_file.modules):
            reasons.setdefault(
                f"{{}} modules without DoRA: {form.name} has it on all modules of a component or on none", []
            ).append(module.name)
    if adapter_file.embeddings:
        reasons[f"{{}} embeddings, which have no place in a {format} adapter yet"] = list(adapter_file.embeddings)
    if adapter_file.extras:
        reasons["{} tensors that belong to no module"] = list(adapter_file.extras)
    return [Loss(reason, tuple(names)) for reason, names in reasons.items()]


def _bare_among_dora(modules: list[AdapterModule]) -> list[AdapterModule]:
    """Return the modules without a magnitude in a component where others have one."""
    dora = {module.component for module in modules if module.magnitude is not None}
    return [module for module in modules if module.component in dora and module.magnitude is None]


def why_unwritable(module: AdapterModule, form: Format, family: str | None) -> str:
    """Return why `form` cannot hold `module`, with `{}` for the number of such modules, or '' when it can."""
    if module.unsupported:
        return f"not supported yet: {{}} modules {module.unsupported}"
    if module.path is None:
        return "{} modules whose names no model family has"
    nowhere = _why_no_place(module, form, form.place(module.component, module.path, family), family)
    if nowhere:
        return nowhere
    if module.alpha == 0.0 and form.zero_alpha == "rank":
        return f"{{}} modules with alpha 0, which means alpha = rank in {form.name} files"
    if form.magnitudes != "any" and module.magnitude is not None and module.magnitude_axis == "in":
        return f"{{}} modules with DoRA per input, which {form.name} files do not have"
    slots = sorted(set(module.tensors) - set(form.suffixes))
    return f"{{}} modules with {' and '.join(slots)}, for which {form.name} files have no slot" if slots else ""


def _why_no_place(module: AdapterModule, form: Format, place: Place | None, family: str | None) -> str:
    if place is None:
        model = f"family '{family}'" if family else "an unknown family (name it with the setting `family`)"
        return f"{{}} modules without a {form.name} name in {model}"
    if "up" not in module.tensors and (place.part is not None or place.swap != "never"):
        return f"{{}} modules of kind {module.algo} on layers that {form.name} files fuse or reorder"
    return ""


def family_for_writing(adapter_file: AdapterFile) -> str | None:
    """Return the adapter's family; when it has none, that of its layers' names, then that in its metadata."""
    paths = [item.path for item in adapter_file.modules if item.component == "denoiser" and item.path]
    return adapter_file.family or family_of_paths(paths) or family_in_metadata(adapter_file.metadata)


def lay_out(modules: Iterable[AdapterModule], form: Format, family: str | None) -> list[Stored]:
    """Rename modules as `form` has them, fusing and swapping rows where its names stand for other layers."""
    singles: dict[str, Stored] = {}
    fused: dict[str, list[AdapterModule | None]] = {}
    order: dict[str, None] = {}
    for module in modules:
        place = form.place(module.component, module.path or "", family)
        if place is None:
            raise AdapterFileError(f"{form.name} has no name for '{module.name}'")
        index, count = place.part or (0, 1)
        taken = fused.setdefault(place.name, [None] * count)
        if taken[index] is not None:
            raise AdapterFileError(f"several modules would be written as '{place.name}'")
        taken[index] = module
        order[place.name] = None
        if place.part is None:
            singles[place.name] = stored(place.name, module, _swapped(module, place))
    return [singles[name] if name in singles else fuse(name, fused[name]) for name in order]


def _swapped(module: AdapterModule, place: Place) -> bool:
    return place.swap == "always" or (place.swap != "never" and has_two_rows_per_input(module.tensors))


def _check_destination(path: Path, form: Format) -> None:
    if form.container == "file" and path.is_dir():
        raise AdapterFileError(f"{path}: is a folder; a {form.name} adapter is a .safetensors file")
    if form.container == "folder" and path.is_file():
        raise AdapterFileError(f"{path}: is a file; a {form.name} adapter is a folder")
    if form.container == "folder" and path.is_dir() and any(path.iterdir()) and not is_peft_folder(path):
        raise AdapterFileError(f"{path}: the folder holds something else than a PEFT adapter, and is left as it is")


def _write_file(packed: Packed, path: Path) -> None:
    tensors = _plain(packed.tensors)
    metadata = dict(packed.metadata)
    if "sshs_model_hash" in metadata or "sshs_legacy_hash" in metadata:
        metadata.update(training_hashes(tensors, metadata))
    safetensors.torch.save_file(tensors, path, metadata)
    _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """Put the metadata in order of its keys: safetensors writes it in another order every time."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
        entries["__metadata__"] = dict(sorted(entries.get("__metadata__", {}).items()))
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))


def _write_folder(packed: Packed, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(packed.config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _write_file(packed, folder / WEIGHTS)


def _plain(entries: dict[str, Tensor | float]) -> dict[str, Tensor]:
    """Return what safetensors takes: on the CPU, contiguous, no memory shared; a float becomes a float32 scalar."""
    tensors = {key: _tensor(key, value) for key, value in entries.items()}
    shared = same_storage(tensors)
    return {key: tensor.clone() if key in shared else tensor for key, tensor in tensors.items()}


def _tensor(key: str, value: Tensor | float) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().cpu().contiguous()
    if not abs(value) <= torch.finfo(torch.float32).max:
        raise AdapterFileError(f"'{key}' is {value}, which float32 cannot hold")
    return torch.tensor(value, dtype=torch.float32)
