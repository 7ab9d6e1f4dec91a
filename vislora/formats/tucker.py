"""Multiply a Tucker core into the down projection, for formats without a slot for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from vislora.formats.adapter_file import AdapterModule


def fold_tucker(module: AdapterModule) -> AdapterModule:
    """Return `module` with plain down (rank, in, *kernel) and up; one without a core is returned as it is.

    The delta is the same but for one rounding to float32; the core cannot be had back.
    """
    if module.algo != "lora" or "mid" not in module.tensors or module.unsupported:
        return module
    _, down = tucker_product({slot: tensor.to(torch.float64) for slot, tensor in module.tensors.items()})
    tensors = {**module.tensors, "down": down.to(torch.float32)}
    tensors.pop("mid")
    return replace(
        module, tensors=tensors, notes=[*module.notes, f"the Tucker core of '{module.name}' is multiplied out"]
    )


def tucker_product(slots: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return up (out, rank) and down (rank, in, *kernel) with the core `mid` multiplied into down."""
    return slots["up"].flatten(1), torch.einsum("mn...,ni->mi...", slots["mid"], slots["down"].flatten(1))
