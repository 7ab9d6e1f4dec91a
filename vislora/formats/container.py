"""From a path to the safetensors files behind it: a file, or a PEFT folder. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vislora.errors import AdapterFileError
from vislora.formats.header import PICKLE_ADVICE, read_header
from vislora.formats.parsed import Part

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"


def open_parts(path: Path) -> list[Part]:
    """Return the parts of an adapter, one per safetensors file. Raises `AdapterFileError` when there is none."""
    if path.is_dir():
        return _folder_parts(path)
    if not path.exists():
        raise AdapterFileError(f"{path}: there is no such file or folder")
    config = path.with_name(CONFIG)
    if path.name == WEIGHTS and config.is_file():
        return [Part(path, read_header(path), config=read_config(config))]
    return [Part(path, read_header(path))]


def is_peft_folder(path: Path) -> bool:
    """Say whether `path` is a PEFT adapter, or a folder of PEFT adapters, one per component."""
    return path.is_dir() and ((path / CONFIG).is_file() or any(path.glob(f"*/{CONFIG}")))


def read_config(path: Path) -> Mapping[str, Any]:
    """Read adapter_config.json. Raises `AdapterFileError` when it is no JSON object."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterFileError(f"{path}: should be a JSON object")
    return config


def _folder_parts(path: Path) -> list[Part]:
    if (path / CONFIG).is_file():
        return [_peft_part(path, "")]
    folders = sorted(item.parent for item in path.glob(f"*/{CONFIG}"))
    if folders:
        return [_peft_part(folder, folder.name) for folder in folders]
    if (path / DIFFUSERS_WEIGHTS).is_file():
        return [Part(path / DIFFUSERS_WEIGHTS, read_header(path / DIFFUSERS_WEIGHTS))]
    files = sorted(item.name for item in path.glob("*.safetensors"))
    hint = f"; name one of its files: {', '.join(files[:5])}" if files else ""
    raise AdapterFileError(f"{path}: a folder without {CONFIG} or {DIFFUSERS_WEIGHTS}{hint}")


def _peft_part(folder: Path, name: str) -> Part:
    weights = folder / WEIGHTS
    if weights.is_file():
        return Part(weights, read_header(weights), name, read_config(folder / CONFIG))
    pickled = folder / "adapter_model.bin"
    if pickled.exists():
        raise AdapterFileError(f"{pickled}: cannot be opened: {PICKLE_ADVICE}")
    raise AdapterFileError(f"{folder}: has {CONFIG} but no {WEIGHTS}")
