"""Layer names of Sana: diffusers SanaTransformer2DModel, NVIDIA's own.

lora_unet_blocks_0_attn_qkv                        -> transformer_blocks.0.attn1.to_q, .to_k, .to_v (by rows)
diffusion_model.blocks.7.cross_attn.kv_linear      -> transformer_blocks.7.attn2.to_k, .to_v (by rows)
"""

from __future__ import annotations

from collections.abc import Iterator

from vislora.formats.names.rows import fused, kept, renamed
from vislora.formats.names.table import FamilyNames, NameTable, Row, Sign

_BLOCK, _ORIGINAL = "transformer_blocks.{}.", "blocks.{}."
_TOP = (
    ("patch_embed.proj", "x_embedder.proj"),
    ("time_embed.emb.timestep_embedder.linear_1", "t_embedder.mlp.0"),
    ("time_embed.emb.timestep_embedder.linear_2", "t_embedder.mlp.2"),
    ("time_embed.linear", "t_block.1"),
    ("caption_projection.linear_1", "y_embedder.y_proj.fc1"),
    ("caption_projection.linear_2", "y_embedder.y_proj.fc2"),
    ("caption_norm", "attention_y_norm"),
    ("proj_out", "final_layer.linear"),
)
_SAME_ROWS = (
    ("attn1.to_out.0", "attn.proj"),
    ("attn2.to_q", "cross_attn.q_linear"),
    ("attn2.to_out.0", "cross_attn.proj"),
    ("ff.conv_inverted", "mlp.inverted_conv.conv"),
    ("ff.conv_depth", "mlp.depth_conv.conv"),
    ("ff.conv_point", "mlp.point_conv.conv"),
)
# of Sana-Sprint, whose original names are not known here
_SPRINT = (
    "time_embed.timestep_embedder.linear_1",
    "time_embed.timestep_embedder.linear_2",
    "time_embed.guidance_embedder.linear_1",
    "time_embed.guidance_embedder.linear_2",
    *(f"{_BLOCK}attn{n}.norm_{name}" for n in "12" for name in "qk"),
)


def transformer_rows() -> Iterator[Row]:
    """Yield every layer that a SanaTransformer2DModel can have beside its original name."""
    yield from renamed(_TOP)
    yield from kept(_SPRINT)
    yield from renamed(_SAME_ROWS, _BLOCK, _ORIGINAL)
    yield from fused(f"{_ORIGINAL}attn.qkv", [f"{_BLOCK}attn1.{name}" for name in ("to_q", "to_k", "to_v")])
    yield from fused(f"{_ORIGINAL}cross_attn.kv_linear", [f"{_BLOCK}attn2.{name}" for name in ("to_k", "to_v")], (1, 1))


SANA = FamilyNames(
    family="sana",
    tables={"denoiser": NameTable(transformer_rows())},
    flat_prefixes={"denoiser": "lora_unet_"},
    folders={"denoiser": "transformer"},
    signs=(
        # 1.6B and 4.8B; the 0.6B has 1152, as PixArt
        Sign(r"transformer_blocks\.\d+\.attn[12]\..*", (1152, 2240)),
        Sign(r"transformer_blocks\.\d+\.ff\.conv_.*"),
    ),
    versions=("sana",),
)
