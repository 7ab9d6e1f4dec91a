"""Layer names of HunyuanVideo and HunyuanImage 2.1: diffusers HunyuanVideoTransformer3DModel and Tencent's own.

    lora_unet_double_blocks_0_img_attn_qkv             -> transformer_blocks.0.attn.to_q, .to_k, .to_v (by rows)
    diffusion_model.single_blocks.3.linear1            -> single_transformer_blocks.3.attn.to_q, to .proj_mlp (1:1:1:4)
    txt_in.individual_token_refiner.blocks.0.mlp.fc1   -> context_embedder.token_refiner.refiner_blocks.0.ff.net.0.proj

The original splits the final modulation into (shift, scale), diffusers into (scale, shift): the halves of
`norm_out.linear` change places. ComfyUI names the MLPs' layers 0 and 2 instead of fc1 and fc2. Of HunyuanImage only
the blocks' original names are in the table.
"""

from __future__ import annotations

from collections.abc import Iterator

from vislora.formats.names.rows import fused, kept, renamed
from vislora.formats.names.table import FamilyNames, NameTable, Row, Sign

_BLOCK, _ORIGINAL = "transformer_blocks.{}.", "double_blocks.{}."
_SINGLE, _ORIGINAL_SINGLE = "single_transformer_blocks.{}.", "single_blocks.{}."
_REFINER = "context_embedder.token_refiner.refiner_blocks.{}."
_ORIGINAL_REFINER = "txt_in.individual_token_refiner.blocks.{}."
_TOP = (
    ("x_embedder.proj", "img_in.proj"),
    ("time_text_embed.timestep_embedder.linear_1", "time_in.mlp.0"),
    ("time_text_embed.timestep_embedder.linear_2", "time_in.mlp.2"),
    ("time_text_embed.guidance_embedder.linear_1", "guidance_in.mlp.0"),
    ("time_text_embed.guidance_embedder.linear_2", "guidance_in.mlp.2"),
    ("time_text_embed.text_embedder.linear_1", "vector_in.in_layer"),
    ("time_text_embed.text_embedder.linear_2", "vector_in.out_layer"),
    ("context_embedder.proj_in", "txt_in.input_embedder"),
    ("context_embedder.time_text_embed.timestep_embedder.linear_1", "txt_in.t_embedder.mlp.0"),
    ("context_embedder.time_text_embed.timestep_embedder.linear_2", "txt_in.t_embedder.mlp.2"),
    ("context_embedder.time_text_embed.text_embedder.linear_1", "txt_in.c_embedder.linear_1"),
    ("context_embedder.time_text_embed.text_embedder.linear_2", "txt_in.c_embedder.linear_2"),
    ("proj_out", "final_layer.linear"),
)
_DOUBLE_ROWS = (
    ("norm1.linear", "img_mod.linear"),
    ("attn.to_out.0", "img_attn_proj"),
    ("attn.norm_q", "img_attn_q_norm"),
    ("attn.norm_k", "img_attn_k_norm"),
    ("ff.net.0.proj", "img_mlp.fc1"),
    ("ff.net.2", "img_mlp.fc2"),
    ("norm1_context.linear", "txt_mod.linear"),
    ("attn.to_add_out", "txt_attn_proj"),
    ("attn.norm_added_q", "txt_attn_q_norm"),
    ("attn.norm_added_k", "txt_attn_k_norm"),
    ("ff_context.net.0.proj", "txt_mlp.fc1"),
    ("ff_context.net.2", "txt_mlp.fc2"),
)
_SINGLE_ROWS = (
    ("norm.linear", "modulation.linear"),
    ("proj_out", "linear2"),
    ("attn.norm_q", "q_norm"),
    ("attn.norm_k", "k_norm"),
)
_REFINER_ROWS = (
    ("norm1", "norm1"),
    ("norm2", "norm2"),
    ("attn.to_out.0", "self_attn_proj"),
    ("ff.net.0.proj", "mlp.fc1"),
    ("ff.net.2", "mlp.fc2"),
    ("norm_out.linear", "adaLN_modulation.1"),
)
_QKV = ("to_q", "to_k", "to_v")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
_TIMES = ("timestep_embedder", "timestep_embedder_r", "guidance_embedder")
# HunyuanImage's layers outside the blocks, whose original names are not known here
_IMAGE_TOP = (
    "x_embedder.proj",
    *(f"time_guidance_embed.{name}.linear_{n}" for name in _TIMES for n in "12"),
    "context_embedder.proj_in",
    *(f"context_embedder.time_text_embed.{name}_embedder.linear_{n}" for name in ("timestep", "text") for n in "12"),
    *(f"context_embedder_2.{name}" for name in ("norm", "linear_1", "linear_2", "linear_3")),
    *(f"{_REFINER}attn.{name}" for name in (*_QKV, "to_out.0")),
    *(f"{_REFINER}{name}" for name in ("norm1", "norm2", "ff.net.0.proj", "ff.net.2", "norm_out.linear")),
    "norm_out.linear",
    "proj_out",
)


def block_rows() -> Iterator[Row]:
    """Yield the layers of double and single blocks beside their original names."""
    yield from renamed(_DOUBLE_ROWS, _BLOCK, _ORIGINAL)
    yield from fused(f"{_ORIGINAL}img_attn_qkv", [f"{_BLOCK}attn.{name}" for name in _QKV])
    yield from fused(f"{_ORIGINAL}txt_attn_qkv", [f"{_BLOCK}attn.{name}" for name in _ADDED])
    yield from renamed(_SINGLE_ROWS, _SINGLE, _ORIGINAL_SINGLE)
    members = [*(f"{_SINGLE}attn.{name}" for name in _QKV), f"{_SINGLE}proj_mlp"]
    yield from fused(f"{_ORIGINAL_SINGLE}linear1", members, (1, 1, 1, 4))


def video_rows() -> Iterator[Row]:
    """Yield every layer of a HunyuanVideoTransformer3DModel beside its original name."""
    yield from renamed(_TOP)
    yield Row("norm_out.linear", "final_layer.adaLN_modulation.1", swap="always")
    yield from renamed(_REFINER_ROWS, _REFINER, _ORIGINAL_REFINER)
    yield from fused(f"{_ORIGINAL_REFINER}self_attn_qkv", [f"{_REFINER}attn.{name}" for name in _QKV])
    yield from block_rows()


def image_rows() -> Iterator[Row]:
    """Yield every layer of a HunyuanImageTransformer2DModel; outside the blocks under its reference name."""
    yield from kept(_IMAGE_TOP)
    yield from block_rows()


def numbered_mlps(rows: Iterator[Row]) -> Iterator[Row]:
    """Yield the rows of MLPs under ComfyUI's names."""
    for row in rows:
        if row.stored.endswith(("mlp.fc1", "mlp.fc2")):
            yield Row(row.path, row.stored.replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.2"))


# 20 double and 40 single blocks: more than the 19 and 38 of FLUX.1, which has their names and HunyuanVideo's width
_DEEP = r"transformer_blocks\.19\..*|single_transformer_blocks\.3[89]\..*"
_TOO_DEEP = (Sign(r"transformer_blocks\.[2-9]\d\..*|single_transformer_blocks\.[4-9]\d\..*"),)
_REFINED = r"context_embedder\.token_refiner\..*\.attn\..*"

HUNYUAN_VIDEO = FamilyNames(
    family="hunyuan-video",
    tables={"denoiser": NameTable(video_rows(), numbered_mlps(video_rows()))},
    flat_prefixes={"denoiser": "lora_unet_"},
    folders={"denoiser": "transformer"},
    signs=(
        Sign(r"(single_)?transformer_blocks\.\d+\.attn\..*", (3072,)),
        Sign(_DEEP, (3072,)),
        Sign(_REFINED, (3072,)),
    ),
    against=_TOO_DEEP,
    versions=("hunyuan-video",),
)

HUNYUAN_IMAGE = FamilyNames(
    family="hunyuan-image",
    tables={"denoiser": NameTable(image_rows(), numbered_mlps(block_rows()))},
    flat_prefixes={"denoiser": "lora_unet_"},
    folders={"denoiser": "transformer"},
    signs=(
        Sign(r"(single_)?transformer_blocks\.\d+\.attn\..*", (3584,)),
        Sign(_DEEP, (3584,)),
        Sign(_REFINED, (3584,)),
    ),
    against=_TOO_DEEP,
    versions=("hunyuan-image-2.1", "hunyuan-image"),
    network_module="networks.lora_hunyuan_image",
)
