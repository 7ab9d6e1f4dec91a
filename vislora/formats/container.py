"""From a path to the files behind it: a safetensors file, a PEFT folder, and pickles when allowed. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vislora.errors import AdapterFileError
from vislora.formats.header import is_pickle, read_header
from vislora.formats.names import FOLDERS
from vislora.formats.parsed import Part
from vislora.formats.pickles import siblings, unpickled

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
PICKLED_DIFFUSERS_WEIGHTS = "pytorch_lora_weights.bin"


def open_parts(path: Path, allow_pickle: bool = False) -> list[Part]:
    """Return the parts of an adapter, one per file. Raises `AdapterFileError` when there is none.

    `allow_pickle`: read the tensors of pickles too, in a process of their own.
    """
    if path.is_dir():
        return _folder_parts(path, allow_pickle)
    if not path.exists():
        raise AdapterFileError(f"{path}: there is no such file or folder")
    config = path.with_name(CONFIG)
    if path.name in (WEIGHTS, PICKLED_WEIGHTS) and config.is_file():
        return [_part(path, allow_pickle, config=read_config(config))]
    first = _part(path, allow_pickle)
    others = siblings(path) if first.copy and any(key.startswith("unet:") for key in first.header.tensors) else []
    return [first, *(_part(other, allow_pickle) for other in others)]


def is_peft_folder(path: Path) -> bool:
    """Say whether `path` is a PEFT adapter, or a folder of PEFT adapters, one per component."""
    return path.is_dir() and ((path / CONFIG).is_file() or any(path.glob(f"*/{CONFIG}")))


def is_one_adapter(path: Path) -> bool:
    """Say whether a folder is one adapter, and not a folder of several: PEFT's, one per component, or diffusers'.

    A folder of folders is one adapter when one of them has a component's name (unet, text_encoder, ...).
    """
    configs = (path / name / CONFIG for name in ("", *FOLDERS))
    return (path / DIFFUSERS_WEIGHTS).is_file() or any(config.is_file() for config in configs)


def read_config(path: Path) -> Mapping[str, Any]:
    """Read adapter_config.json. Raises `AdapterFileError` when it is no JSON object."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterFileError(f"{path}: should be a JSON object")
    return config


def _part(path: Path, allow_pickle: bool, folder: str = "", config: Mapping[str, Any] | None = None) -> Part:
    if allow_pickle and is_pickle(path):
        copy = unpickled(path)
        return Part(path, read_header(copy.path), folder, config, copy)
    return Part(path, read_header(path), folder, config)


def _folder_parts(path: Path, allow_pickle: bool) -> list[Part]:
    if (path / CONFIG).is_file():
        return [_peft_part(path, "", allow_pickle)]
    folders = sorted(item.parent for item in path.glob(f"*/{CONFIG}"))
    if folders:
        return [_peft_part(folder, folder.name, allow_pickle) for folder in folders]
    for name in (DIFFUSERS_WEIGHTS, PICKLED_DIFFUSERS_WEIGHTS):
        if (path / name).is_file():
            return [_part(path / name, allow_pickle)]
    files = sorted(item.name for item in path.glob("*.safetensors"))
    hint = f"; name one of its files: {', '.join(files[:5])}" if files else ""
    raise AdapterFileError(f"{path}: a folder without {CONFIG} or {DIFFUSERS_WEIGHTS}{hint}")


def _peft_part(folder: Path, name: str, allow_pickle: bool) -> Part:
    config = read_config(folder / CONFIG)
    for weights in (WEIGHTS, PICKLED_WEIGHTS):
        if (folder / weights).is_file():
            return _part(folder / weights, allow_pickle, name, config)
    raise AdapterFileError(f"{folder}: has {CONFIG} but no {WEIGHTS}")
