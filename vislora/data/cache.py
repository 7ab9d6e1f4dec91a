"""Tensors on disk under hashes: one checked safetensors file each, and the fingerprint of what made them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vislora import files

Tensors = dict[str, Tensor]
_DIGEST = "sha256"


class Cache:
    """Tensors on disk by key: one safetensors file each, written whole or not at all, and checked when read.

    What was read or written stays in memory up to `memory_bytes`; the tensors that `get` returns must not be changed.
    Several processes may use one folder.
    """

    def __init__(self, folder: str | Path, memory_bytes: int = 1 << 30) -> None:
        self.folder = Path(folder).expanduser()
        self._room = memory_bytes
        self._held: dict[str, Tensors] = {}

    def path(self, key: str) -> Path:
        """Return the file of `key`: `ab/abcdef....safetensors`."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def get(self, key: str) -> Tensors | None:
        """Return the tensors of `key`, or None when there are none or the file is damaged: then make them again."""
        if key in self._held:
            return self._held[key]
        try:
            with safe_open(self.path(key), framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
                digest = (file.metadata() or {}).get(_DIGEST)
        except (OSError, SafetensorError, ValueError):
            return None
        if digest != _digest(tensors):
            return None
        self._hold(key, tensors)
        return tensors

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep `tensors` under `key`, dtypes and shapes untouched. Raises `VisloraError` when the disk refuses."""
        plain = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in sorted(tensors.items())}
        with files.replacing(self.path(key)) as temporary:
            save_file(plain, temporary, metadata={_DIGEST: _digest(plain)})
        self._hold(key, plain)

    def size(self) -> tuple[int, int]:
        """Return the number of files and their bytes."""
        sizes = [path.stat().st_size for path in self.folder.glob("??/*.safetensors")]
        return len(sizes), sum(sizes)

    def prune(self, keep: Iterable[str]) -> int:
        """Delete every file whose key is not in `keep`, and return how many those were."""
        wanted = {self.path(key) for key in keep}
        surplus = [path for path in self.folder.glob("??/*.safetensors") if path not in wanted]
        for path in surplus:
            path.unlink(missing_ok=True)
            self._room += _size(self._held.pop(path.stem, {}))
        return len(surplus)

    def _hold(self, key: str, tensors: Tensors) -> None:
        if key in self._held:
            self._room += _size(self._held.pop(key))
        if _size(tensors) <= self._room:
            self._held[key] = tensors
            self._room -= _size(tensors)


def key_of(*parts: object) -> str:
    """Return the key of what `parts`, JSON values, made: a SHA-256."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=True).encode("ascii")).hexdigest()


def weights_fingerprint(module: nn.Module, config: object = None) -> str:
    """Return a SHA-256 over a module's class, `config` (as its repr shows it) and every weight, bit for bit."""
    digest = hashlib.sha256(f"{type(module).__qualname__} {config!r}".encode())
    state = module.state_dict()
    for name in sorted(state):
        _add(digest, name, state[name])
    return digest.hexdigest()


def _size(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _digest(tensors: Tensors) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        _add(digest, name, tensors[name])
    return digest.hexdigest()


def _add(digest: hashlib._Hash, name: str, value: object) -> None:
    if not isinstance(value, Tensor):  # a module's extra state
        digest.update(f"{name} {value!r}".encode())
        return
    digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
    data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)  # bytes: numpy knows no bfloat16
    digest.update(data.numpy().data)
