"""Multiply a Tucker core into the down projection, for formats without a slot for it."""

from __future__ import annotations

from dataclasses import replace

import torch

from vislora.formats.adapter_file import AdapterModule


def fold_tucker(module: AdapterModule) -> AdapterModule:
    """Return `module` with plain down (rank, in, *kernel) and up; one without a core is returned as it is.

    The delta is the same but for one rounding to float32; the core cannot be had back.
    """
    if module.algo != "lora" or "mid" not in module.tensors or module.unsupported:
        return module
    exact = {slot: tensor.to(torch.float64) for slot, tensor in module.tensors.items()}
    down = torch.einsum("mn...,ni->mi...", exact["mid"], exact["down"].flatten(1))
    tensors = {"down": down.to(torch.float32), "up": module.tensors["up"]}
    return replace(
        module, tensors=tensors, notes=[*module.notes, f"the Tucker core of '{module.name}' is multiplied out"]
    )
