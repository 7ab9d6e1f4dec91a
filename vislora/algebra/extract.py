"""An adapter out of the difference of two weights: the nearest LoRA within limits (Eckart and Young, 1936)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vislora.algebra.low_rank import Limits, as_stored, nearest_product, relative
from vislora.formats.adapter_file import AdapterModule


@dataclass(frozen=True)
class Extracted:
    """What became of one layer. norm: of its change; apart: of what the adapter does not hold of it."""

    name: str
    rank: int
    norm: float
    apart: float

    @property
    def error(self) -> float:
        """The relative residual."""
        return relative(self.apart, self.norm)


def extract_layer(
    component: str, path: str, change: Tensor, limits: Limits, dtype: torch.dtype
) -> tuple[AdapterModule, Extracted]:
    """Return the nearest LoRA to `change` (out, in, *kernel), and what is missing of it. The scale is 1."""
    matrix = change.to(torch.float32).flatten(1)
    up, down = nearest_product(matrix, limits)
    tensors = {"down": down.to(dtype), "up": up.to(dtype)}
    apart = float((tensors["up"].float() @ tensors["down"].float() - matrix).norm())
    if change.dim() > 2:
        kernel = change.shape[2:]
        tensors["down"] = tensors["down"].reshape(-1, change.shape[1], *kernel)
        tensors["up"] = tensors["up"].reshape(change.shape[0], -1, *[1] * len(kernel))
    rank = up.shape[1]
    module = AdapterModule(component=component, path=path, algo="lora", tensors=tensors, alpha=as_stored(rank))
    return module, Extracted(module.name, rank, float(matrix.norm()), apart)


def whole_layer(component: str, path: str, slot: str, change: Tensor, dtype: torch.dtype) -> AdapterModule:
    """Return a change of a norm's weight or of a bias, whole."""
    kept = change.to(dtype)
    if slot == "bias":
        return AdapterModule(component=component, path=path, algo="full", tensors={}, bias=kept)
    return AdapterModule(component=component, path=path, algo="norm", tensors={"w_norm": kept})
