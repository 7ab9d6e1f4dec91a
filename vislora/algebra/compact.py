"""Drop what a LoRA does not use of its rank: what remains does the same, bit for bit, and is smaller.

A fused layer whose parts were trained apart is block-diagonal. Cut, every part has the whole rank, 3 r for q, k and v,
but zeros in all columns of its `up` that are the others'.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from vislora.formats.adapter_file import AdapterFile, AdapterModule


@dataclass(frozen=True)
class Compacted:
    """A module that needs less than its rank."""

    name: str
    before: int
    after: int


def compact(adapter: AdapterFile) -> tuple[AdapterFile, list[Compacted]]:
    """Return `adapter` without the ranks that add only zeros, and which modules those were.

    A module whose scale would not stay the same number exactly is left as it is.
    """
    modules = [_compacted(module) for module in adapter.modules]
    pairs = zip(adapter.modules, modules, strict=True)
    told = [Compacted(old.name, old.rank, new.rank) for old, new in pairs if new is not old]
    return replace(adapter, modules=modules), told


def _compacted(module: AdapterModule) -> AdapterModule:
    if module.unsupported or module.tensors.keys() != {"down", "up"}:
        return module
    down, up = module.tensors["down"], module.tensors["up"]
    used = (down != 0).flatten(1).any(1) & (up != 0).transpose(0, 1).flatten(1).any(1)
    kept = torch.nonzero(used).flatten() if bool(used.any()) else torch.zeros(1, dtype=torch.int64)
    count = len(kept)
    alpha = module.scale * count
    if count == module.rank or alpha / count != module.scale:
        return module
    tensors = {"down": down[kept], "up": up[:, kept]}
    return replace(module, tensors=tensors, alpha=alpha, rule="alpha/r", notes=list(module.notes))
