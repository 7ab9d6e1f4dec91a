"""The shapes of SDXL and FLUX.1 with random weights, and random adapters for them: what speed is measured on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vislora.algorithms.base import LayerSpec
from vislora.inject.injection import FileModule
from vislora.inject.targets import Target, select

SDXL: dict[str, Any] = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "layers_per_block": 2,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
SD15: dict[str, Any] = {
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
FLUX: dict[str, Any] = {"guidance_embeds": True}


def sdxl_unet(device: str = "cpu", dtype: torch.dtype = torch.float32, shrink: int = 1, **changes: Any) -> Any:
    """Return SDXL's UNet; `shrink` divides its widths, the module tree stays whole (1,680 modules, 722 for LoRA)."""
    from diffusers import UNet2DConditionModel

    config = {**SDXL, "block_out_channels": [width // shrink for width in SDXL["block_out_channels"]]}
    if shrink > 1:
        small = {"cross_attention_dim": 2048 // shrink, "addition_time_embed_dim": 32, "norm_num_groups": 10}
        config |= {**small, "projection_class_embeddings_input_dim": 1280 // shrink + 6 * 32}
    return filled(lambda: UNet2DConditionModel(**{**config, **changes}), device, dtype)


def sd15_unet(device: str = "cpu", dtype: torch.dtype = torch.float32, shrink: int = 2) -> Any:
    """Return SD 1.5's UNet with its widths divided by `shrink`."""
    from diffusers import UNet2DConditionModel

    widths = [width // shrink for width in SD15["block_out_channels"]]
    return filled(lambda: UNet2DConditionModel(**{**SD15, "block_out_channels": widths}), device, dtype)


def flux_transformer(device: str = "cpu", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Return FLUX.1's transformer."""
    from diffusers import FluxTransformer2DModel

    return filled(lambda: FluxTransformer2DModel(**{**FLUX, **changes}), device, dtype)


def filled(build: Callable[[], Any], device: str, dtype: torch.dtype) -> Any:
    """Build on no device, then fill: small normal matrices, ones for norms, zeros for biases. Fast for any size."""
    with torch.device("meta"):
        model = build()
    nn.Module.to(model, dtype=dtype)  # diffusers' own warns of nothing
    model = model.to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, 0.02, generator=generator)
        else:
            parameter.zero_()
    for module in model.modules():
        if "Norm" in type(module).__name__ and isinstance(getattr(module, "weight", None), Tensor):
            module.weight.fill_(1.0)
    for buffer in model.buffers():
        buffer.zero_()
    return model


def sdxl_inputs(model: Any, batch: int, side: int) -> dict[str, Any]:
    """Return inputs of `sdxl_unet` for latents of `side` by `side`."""
    like = next(model.parameters())
    width = model.config.cross_attention_dim
    pooled = model.config.projection_class_embeddings_input_dim - 6 * model.config.addition_time_embed_dim
    new = {"device": like.device, "dtype": like.dtype}
    return {
        "sample": torch.randn(batch, 4, side, side, **new),
        "timestep": torch.tensor(500, device=like.device),
        "encoder_hidden_states": torch.randn(batch, 77, width, **new),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(batch, pooled, **new),
            "time_ids": torch.ones(batch, 6, **new),
        },
    }


def sd15_inputs(model: Any, batch: int, side: int) -> dict[str, Any]:
    """Return inputs of `sd15_unet` for latents of `side` by `side`."""
    text = torch.randn(batch, 77, model.config.cross_attention_dim)
    return {
        "sample": torch.randn(batch, 4, side, side),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": text,
    }


def flux_inputs(model: Any, batch: int, side: int, text: int = 512) -> dict[str, Any]:
    """Return inputs of `flux_transformer` for an image of `side` by `side` packed tokens."""
    like, config = next(model.parameters()), model.config
    new = {"device": like.device, "dtype": like.dtype}
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(float(side)), torch.arange(float(side)))
    return {
        "hidden_states": torch.randn(batch, side * side, config.in_channels, **new),
        "timestep": torch.full((batch,), 0.5, **new),
        "guidance": torch.full((batch,), 3.5, **new),
        "encoder_hidden_states": torch.randn(batch, text, config.joint_attention_dim, **new),
        "pooled_projections": torch.randn(batch, config.pooled_projection_dim, **new),
        "img_ids": places.to(**new),
        "txt_ids": torch.zeros(text, 3, **new),
    }


def random_adapter(model: nn.Module, rank: int, seed: int, preset: str = "attention-ff") -> list[FileModule]:
    """Return the modules of a small random LoRA on the device and in the dtype of `model`."""
    layers = dict(model.named_modules())
    like = next(model.parameters())
    draw = torch.Generator(like.device).manual_seed(seed)
    found = []
    for path in select(model, [], preset, Target("", rank)):
        spec = LayerSpec.of(layers[path])
        assert spec is not None
        out, *rest = spec.weight_shape
        down = torch.empty(rank, *rest, device=like.device, dtype=like.dtype).normal_(0.0, 0.02, generator=draw)
        up = torch.empty(out, rank, *[1] * (len(rest) - 1), device=like.device, dtype=like.dtype)
        found.append(FileModule(path, "lora", {"down": down, "up": up.normal_(0.0, 0.02, generator=draw)}, 1.0))
    return found
