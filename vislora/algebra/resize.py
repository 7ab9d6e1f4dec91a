"""A smaller adapter that does nearly the same: every change becomes the nearest LoRA within limits.

A product of thin matrices is reduced by the small core between their orthogonal bases (Eckart and Young, 1936; the
bases by QR), so that no full matrix is made: an SDXL adapter takes seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vislora.algebra.low_rank import Limits, as_stored, nearest_product, nearest_to_product, product_norm, relative
from vislora.algebra.to_lora import exact_product, kernel_of, metadata_of, stored, tree_of, with_kernel
from vislora.formats.adapter_file import AdapterFile, AdapterModule


@dataclass(frozen=True)
class Resized:
    """What became of a module. norm: of its change, before any magnitude (DoRA); apart: of what is missing of it."""

    name: str
    before: int
    after: int
    norm: float
    apart: float

    @property
    def error(self) -> float:
        """The relative error."""
        return relative(self.apart, self.norm)


@dataclass(frozen=True)
class Left:
    """A module that stays as it is. `reason`: why it has no rank to reduce."""

    name: str
    reason: str


def resize(
    adapter: AdapterFile, limits: Limits, dtype: torch.dtype | None = None
) -> tuple[AdapterFile, list[Resized | Left]]:
    """Return `adapter` within `limits`, and what became of each module.

    dtype: of the new tensors; None: the module's own. The scale of a module stays what it was, so alpha follows the
    rank. Modules that are within the limits already keep their bits; a magnitude (DoRA) and a bias stay on top.
    """
    tree = tree_of(adapter.modules, adapter.family)
    modules, told = [], []
    for module in adapter.modules:
        reason = _why_left(module)
        made, line = (module, Left(module.name, reason)) if reason else _resized(module, limits, dtype, tree)
        modules.append(made)
        told.append(line)
    return replace(adapter, modules=modules, metadata=metadata_of(modules, adapter.metadata, adapter.family)), told


def _why_left(module: AdapterModule) -> str:
    if module.unsupported or module.only_bias or module.for_embedding:
        return module.unsupported or ("a bias" if module.only_bias else "of an embedding")
    if module.algo in ("lora", "loha", "lokr") or (module.algo == "full" and module.tensors["diff"].dim() > 1):
        return "of whole layers that only some formats have" if module.uncut else ""
    return f"of kind {module.algo}"


def _resized(
    module: AdapterModule, limits: Limits, dtype: torch.dtype | None, tree: str | None
) -> tuple[AdapterModule, Resized]:
    product = exact_product(module)
    if product is None:
        return _of_matrix(module, limits, dtype, tree)
    up, down = product[0], product[1].flatten(1)
    norm = product_norm(up, down) * abs(module.scale)
    small = nearest_to_product(up, down, limits)
    if small[0].shape[1] >= up.shape[1] and module.tensors.keys() == {"down", "up"}:
        return module, Resized(module.name, up.shape[1], up.shape[1], norm, 0.0)
    tensors = stored(*small, [], dtype or _own(module))
    difference = torch.cat([up, -tensors["up"].double()], 1), torch.cat([down, tensors["down"].double()])
    kernel = kernel_of([module], down.shape[1], tree)
    made = _module(module, with_kernel(tensors, down.shape[1], kernel), module.scale)
    return made, Resized(module.name, module.rank, made.rank, norm, product_norm(*difference) * abs(module.scale))


def _of_matrix(
    module: AdapterModule, limits: Limits, dtype: torch.dtype | None, tree: str | None
) -> tuple[AdapterModule, Resized]:
    full = module.direction()
    matrix = full.flatten(1)
    tensors = stored(*nearest_product(matrix, limits), [], dtype or _own(module))
    apart = float((tensors["up"].double() @ tensors["down"].double() - matrix).norm())
    kernel = kernel_of([module], matrix.shape[1], tree)
    made = _module(module, with_kernel(tensors, matrix.shape[1], kernel), 1.0)
    return made, Resized(module.name, min(matrix.shape), made.rank, float(matrix.norm()), apart)


def _module(module: AdapterModule, tensors: dict[str, Tensor], scale: float) -> AdapterModule:
    alpha = as_stored(scale * tensors["up"].shape[1])
    return replace(module, algo="lora", tensors=tensors, alpha=alpha, rule="alpha/r", notes=list(module.notes))


def _own(module: AdapterModule) -> torch.dtype:
    floats = [tensor.dtype for tensor in module.tensors.values() if tensor.is_floating_point()]
    return max(floats, key=lambda dtype: dtype.itemsize)
