"""A loaded family again, without its weights: everything runs as it does, on the meta device and without memory."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from vislora.models.base import Family
from vislora.models.quantized import is_quantized


def weightless(family: Family) -> Family:
    """Return a copy of `family` whose modules are on the meta device. What is loaded stays as it is.

    Adapters on `family` would be shared in part, so make the copy before they are there.
    """
    bare: Any = copy.copy(family)
    bare.pipeline = copy.copy(family.pipeline)
    for name, part in family.pipeline.components.items():
        if isinstance(part, nn.Module):
            setattr(bare.pipeline, name, weightless_module(part))
    attributes = family.card.attributes
    bare.components = {name: getattr(bare.pipeline, attributes[name]) for name in family.components}
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
