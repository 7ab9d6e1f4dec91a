"""Layer names of Qwen-Image and Qwen-Image-Edit: diffusers QwenImageTransformer2DModel, which is the original tree too.

lora_unet_transformer_blocks_0_attn_add_q_proj
diffusion_model.transformer_blocks.0.img_mlp.net.0.proj
"""

from __future__ import annotations

from collections.abc import Iterator

from vislora.formats.names.rows import kept
from vislora.formats.names.table import FamilyNames, NameTable, Row, Sign

_BLOCK = "transformer_blocks.{}."
_TOP = (
    "img_in",
    "txt_in",
    "txt_norm",
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
    "time_text_embed.addition_t_embedding",
    "norm_out.linear",
    "proj_out",
)
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
_STREAM = ("mod.1", "mlp.net.0.proj", "mlp.net.2")


def transformer_rows() -> Iterator[Row]:
    """Yield every layer that a QwenImageTransformer2DModel can have."""
    yield from kept(_TOP)
    yield from kept((*_ATTENTION, *_NORMS), f"{_BLOCK}attn.")
    yield from kept(_STREAM, f"{_BLOCK}img_")
    yield from kept(_STREAM, f"{_BLOCK}txt_")


QWEN_IMAGE = FamilyNames(
    family="qwen-image",
    tables={"denoiser": NameTable(transformer_rows())},
    flat_prefixes={"denoiser": "lora_unet_"},
    folders={"denoiser": "transformer"},
    flat_from="path",
    signs=(
        Sign(r"transformer_blocks\.\d+\.attn\..*", (3072,)),
        Sign(r"transformer_blocks\.[2-5]\d\.attn\..*", (3072,)),  # it has 60 blocks, the others of this width up to 20
        Sign(r"transformer_blocks\.5\d\.attn\..*"),
        Sign(r"transformer_blocks\.\d+\.(img|txt)_(mod|mlp)\..*"),
    ),
    versions=("qwen-image",),
)
