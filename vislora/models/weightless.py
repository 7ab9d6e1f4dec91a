"""A loaded family again, without its weights: everything runs as it does, on the meta device and without memory."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn

from vislora.models.base import Family
from vislora.models.quantized import is_quantized


def weightless(family: Family, components: Iterable[str]) -> Family:
    """Return a copy of `family` with these of its components on the meta device. What is loaded stays as it is.

    The other modules are shared. So would adapters be in part: make the copy before they are there.
    """
    bare: Any = copy.copy(family)
    bare.pipeline, bare.components = copy.copy(family.pipeline), dict(family.components)
    for name in components:
        bare.components[name] = weightless_module(family.components[name])
        setattr(bare.pipeline, family.card.attributes[name], bare.components[name])
    made: Family = bare
    return made


def weightless_module(module: nn.Module) -> nn.Module:
    """Return a deep copy of `module`, with its types and flags, whose parameters and buffers are on the meta device.

    Quantised layers are plain ones there, in the type that they compute in.
    """
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        for parameter in module.parameters()
    }
    memo |= {id(buffer): buffer.to("meta") for buffer in module.buffers()}
    memo |= {id(layer): _plain(layer, module) for layer in module.modules() if is_quantized(layer)}
    return copy.deepcopy(module, memo)


def _plain(layer: Any, module: nn.Module) -> nn.Linear:
    dtype = next(parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())
    made = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta", dtype=dtype)
    return made.requires_grad_(False).train(layer.training)
