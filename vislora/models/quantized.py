"""Bases in less memory: the linear layers of their blocks in 8 or 4 bits, by bitsandbytes.

int8: LLM.int8() (arXiv 2208.07339), with its threshold of 6. nf4: 4-bit NormalFloat in blocks of 64, whose scales are
quantised too (QLoRA, arXiv 2305.14314, section 3). Adapters on them stay as wide as ever.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from vislora.algorithms.base import LayerSpec
from vislora.errors import ModelError, missing_extra
from vislora.inject.injection import is_readable

LARGE = 10**9
"""A text encoder is quantised from so many parameters on: T5 and language models, not CLIP."""
WIDE = ("wo",)
"""T5's last layers of feed-forward: what they are given is cast to the type of their weights (transformers)."""
THRESHOLD = 6.0
"""Columns of the input with a larger number are multiplied in 16 bits (LLM.int8(), section 3.2)."""
MISREAD = 0.15
"""Relative error of normal numbers in nf4 that says that they were read by wrong scales; 4 bits cost 0.09."""


def require_library(kind: str) -> Any:
    """Return bitsandbytes. Raises `ConfigError` when it is not installed."""
    try:
        import bitsandbytes
    except ImportError:
        raise missing_extra("bitsandbytes", "quantize", f"quantize = {kind}") from None
    # that int8 takes its input in float16, for every layer in every pass
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return bitsandbytes.nn


def quantize_base(pipeline: Any, denoiser: str, kind: str, device: torch.device) -> None:
    """Quantise what is large of a pipeline that lies in main memory: its `denoiser` (an attribute) and text encoders.

    kind: int8 or nf4. Weights are quantised on `device`, one by one, and stay there.
    Raises `ConfigError` without bitsandbytes.
    """
    for name, part in pipeline.components.items():
        is_large = name.startswith("text_encoder") and _size(part) >= LARGE
        if name == denoiser or is_large:
            quantize(part, kind, device)


def quantize(model: nn.Module, kind: str, device: torch.device) -> None:
    """Replace the linear layers of the blocks of `model`, whose weights are in main memory.

    What is outside of its blocks stays: the embedders and the last layer are small, and all goes through them.
    Raises `ConfigError` without bitsandbytes, and `ModelError` for nf4 that it reads wrongly on this CPU.
    """
    make, paths = _maker(kind), list(block_layers(model))
    if kind == "nf4" and device.type == "cpu":
        _require_read(model, paths)
    for path in paths:
        layer = cast(nn.Linear, model.get_submodule(path))
        made = make(layer, device)
        made.bias = layer.bias
        made.train(layer.training)
        model.set_submodule(path, made)


def block_layers(model: nn.Module) -> Iterator[str]:
    """Yield the paths of the linear layers within lists of blocks that the model may keep in few bits."""
    lists = tuple(f"{path}.".lstrip(".") for path, part in model.named_modules() if isinstance(part, nn.ModuleList))
    for path, part in model.named_modules():
        if type(part) is nn.Linear and path.startswith(lists) and path.rpartition(".")[2] not in WIDE:
            yield path


def is_quantized(layer: nn.Module) -> bool:
    """Say whether `layer` is a linear one that does not keep its weight as it is."""
    if not isinstance(layer, nn.Linear):
        return False
    return not is_readable(layer, LayerSpec("linear", (layer.out_features, layer.in_features)))


def stays(model: nn.Module) -> bool:
    """Say whether `model` must stay on its device: layers of int8 are not made to be moved once they have computed."""
    return any(is_quantized(layer) and layer.weight.dtype == torch.int8 for layer in model.modules())


def statistics(model: nn.Module) -> list[Tensor]:
    """Return what quantised layers keep beside their weights: scales and the like."""
    own = {name for name, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]}
    quantized = {path: layer for path, layer in model.named_modules() if is_quantized(layer)}
    states = ((f"{path}.", layer.state_dict(prefix=f"{path}.")) for path, layer in quantized.items())
    return [value for _, state in states for name, value in state.items() if name not in own]


def _size(part: Any) -> int:
    return sum(parameter.numel() for parameter in part.parameters()) if isinstance(part, nn.Module) else 0


def _require_read(model: nn.Module, paths: list[str]) -> None:
    widths = {path: cast(nn.Linear, model.get_submodule(path)).in_features for path in paths}
    misread = [path for path, width in widths.items() if is_misread(width)]
    if misread:
        raise ModelError(
            f"nf4: on this CPU bitsandbytes reads layers of {widths[misread[0]]} inputs by wrong scales ({misread[0]}, "
            f"and {len(misread) - 1} more): take int8, or a GPU"
        )


@cache
def is_misread(width: int) -> bool:
    """Say whether layers of `width` inputs in nf4 are not read as they were written on this CPU.

    With AVX-512 bitsandbytes 0.50 takes the scales of other blocks where rows end within blocks of 64.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
    found = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4"))
    return bool((found - weight).norm() > MISREAD * weight.norm())


def _maker(kind: str) -> Callable[[nn.Linear, torch.device], nn.Linear]:
    modules = require_library(kind)

    def nf4(layer: nn.Linear, device: torch.device) -> nn.Linear:
        weight = layer.weight.detach()
        made = modules.Linear4bit(*_shape(layer), compute_dtype=weight.dtype, quant_type="nf4", device="meta")
        made.weight = modules.Params4bit(weight, quant_type="nf4", module=made).to(device)
        # else, on CPUs with bfloat16 in AVX-512, the first pass packs the weight anew, in place: an error for some
        # shapes, and bfloat16 from then on
        made.support_avx512bf16_for_cpu = False
        return made

    def int8(layer: nn.Linear, device: torch.device) -> nn.Linear:
        made = modules.Linear8bitLt(*_shape(layer), has_fp16_weights=False, threshold=THRESHOLD, device="meta")
        made.weight = modules.Int8Params(layer.weight.detach(), requires_grad=False).to(device)
        return made

    return {"nf4": nf4, "int8": int8}[kind]


def _shape(layer: nn.Linear) -> tuple[int, int, bool]:
    return layer.in_features, layer.out_features, layer.bias is not None
