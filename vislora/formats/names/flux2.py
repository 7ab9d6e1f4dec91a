"""Layer names of FLUX.2 (dev and klein): diffusers Flux2Transformer2DModel, Black Forest Labs' own.

    lora_unet_double_blocks_0_img_attn_qkv          -> transformer_blocks.0.attn.to_q, .to_k, .to_v (by rows)
    diffusion_model.single_blocks.3.linear1         -> single_transformer_blocks.3.attn.to_qkv_mlp_proj

All blocks share three modulations. The single blocks stay fused in diffusers too. The original splits the final
modulation into (shift, scale), diffusers into (scale, shift): the halves of `norm_out.linear` change places.
"""

from __future__ import annotations

from collections.abc import Iterator

from vislora.formats.names.rows import fused, renamed
from vislora.formats.names.table import FamilyNames, NameTable, Row, Sign

_BLOCK, _ORIGINAL = "transformer_blocks.{}.", "double_blocks.{}."
_TOP = (
    ("x_embedder", "img_in"),
    ("context_embedder", "txt_in"),
    ("time_guidance_embed.timestep_embedder.linear_1", "time_in.in_layer"),
    ("time_guidance_embed.timestep_embedder.linear_2", "time_in.out_layer"),
    ("time_guidance_embed.guidance_embedder.linear_1", "guidance_in.in_layer"),
    ("time_guidance_embed.guidance_embedder.linear_2", "guidance_in.out_layer"),
    ("double_stream_modulation_img.linear", "double_stream_modulation_img.lin"),
    ("double_stream_modulation_txt.linear", "double_stream_modulation_txt.lin"),
    ("single_stream_modulation.linear", "single_stream_modulation.lin"),
    ("proj_out", "final_layer.linear"),
)
_DOUBLE = (
    ("attn.to_out.0", "img_attn.proj"),
    ("attn.norm_q", "img_attn.norm.query_norm"),
    ("attn.norm_k", "img_attn.norm.key_norm"),
    ("ff.linear_in", "img_mlp.0"),
    ("ff.linear_out", "img_mlp.2"),
    ("attn.to_add_out", "txt_attn.proj"),
    ("attn.norm_added_q", "txt_attn.norm.query_norm"),
    ("attn.norm_added_k", "txt_attn.norm.key_norm"),
    ("ff_context.linear_in", "txt_mlp.0"),
    ("ff_context.linear_out", "txt_mlp.2"),
)
_SINGLE = (
    ("attn.to_qkv_mlp_proj", "linear1"),
    ("attn.to_out", "linear2"),
    ("attn.norm_q", "norm.query_norm"),
    ("attn.norm_k", "norm.key_norm"),
)
_IMAGE = [f"{_BLOCK}attn.{name}" for name in ("to_q", "to_k", "to_v")]
_TEXT = [f"{_BLOCK}attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj")]


def transformer_rows() -> Iterator[Row]:
    """Yield every layer of a Flux2Transformer2DModel beside its original name."""
    yield from renamed(_TOP)
    yield Row("norm_out.linear", "final_layer.adaLN_modulation.1", swap="always")
    yield from renamed(_DOUBLE, _BLOCK, _ORIGINAL)
    yield from fused(f"{_ORIGINAL}img_attn.qkv", _IMAGE)
    yield from fused(f"{_ORIGINAL}txt_attn.qkv", _TEXT)
    yield from renamed(_SINGLE, "single_transformer_blocks.{}.", "single_blocks.{}.")


FLUX2 = FamilyNames(
    family="flux2",
    tables={"denoiser": NameTable(transformer_rows())},
    flat_prefixes={"denoiser": "lora_unet_"},
    folders={"denoiser": "transformer"},
    signs=(
        # dev 6144, klein 9B 4096; klein 4B has the 3072 of FLUX.1, but wider or narrower feed-forwards
        Sign(r"transformer_blocks\.\d+\.attn\..*", (6144, 4096)),
        Sign(r"single_transformer_blocks\.\d+\.attn\.to_out", (24576, 16384, 12288)),
        Sign(r"transformer_blocks\.\d+\.ff(_context)?\.linear_out", (18432, 9216)),
        Sign(r"(single|double)_stream_modulation.*"),
        Sign(r"single_transformer_blocks\.4\d\..*"),  # dev has 48, more than any other
    ),
    against=(Sign(r"transformer_blocks\.(8|9|\d\d)\..*"),),
    versions=("flux-2",),
)
