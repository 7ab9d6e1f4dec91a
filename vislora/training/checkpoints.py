"""Resumable state on disk: one folder per checkpoint, tensors as safetensors, the rest as JSON; nothing is pickled.

A checkpoint is written beside its place and renamed, so that a kill at any moment leaves the last good one intact.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vislora.errors import VisloraError
from vislora.files import replacing

_NAME = re.compile(r"step-(\d{6,})")
_TENSOR, _TUPLE = "__tensor__", "__tuple__"


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `state` as `folder`/step-NNNNNN; keep the last `keep`.

    It is made of dicts, lists and tuples of tensors and JSON values, nested at will.
    """
    path = folder / f"step-{step:06d}"
    tensors: dict[str, torch.Tensor] = {}
    plain = _split(state, "state", tensors)
    with replacing(path) as temporary:
        temporary.mkdir()
        save_file(tensors, temporary / "state.safetensors")
        (temporary / "state.json").write_text(json.dumps(plain))
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Return the whole checkpoints in `folder`, oldest first; leftovers of an interrupted write are not among them."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and (path / "state.json").is_file()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """Return the step of a checkpoint by its name."""
    return int(path.name.removeprefix("step-"))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return the state in `path`. Raises `VisloraError` when it is damaged, naming the next older one to try."""
    try:
        tensors = load_file(path / "state.safetensors")
        state = _join(json.loads((path / "state.json").read_text()), tensors)
        if not isinstance(state, dict):
            raise TypeError("it holds no state")
        return state
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise VisloraError(
            f"checkpoint {path} is damaged ({error}); delete that folder and run again: the one before it is used"
        ) from error


def _split(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Return `value` with every tensor moved to `tensors` and a reference in its place. Keys keep their type."""
    if isinstance(value, torch.Tensor):
        name = f"{len(tensors)} {name}"  # the number tells {"a.b": ...} from {"a": {"b": ...}}
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: name}
    if isinstance(value, dict):
        return {"__dict__": [[key, _split(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_split(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    return value


def _join(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_join(item, tensors) for item in value]
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        if _TUPLE in value:
            return tuple(_join(item, tensors) for item in value[_TUPLE])
        return {key: _join(item, tensors) for key, item in value["__dict__"]}
    return value
