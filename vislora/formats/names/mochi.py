"""Layer names of Mochi 1: diffusers MochiTransformer3DModel, Genmo's own.

    lora_unet_blocks_0_attn_qkv_x                      -> transformer_blocks.0.attn1.to_q, .to_k, .to_v (by rows)
    diffusion_model.blocks.7.mlp_y.w1                  -> transformer_blocks.7.ff_context.net.0.proj

The halves of the gated feed-forwards' first layers (gate and value) and of the final modulation (shift and scale)
change places. The text's modulation in the last of the 48 blocks, which has one chunk only, has another name in
diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator

from vislora.formats.names.rows import fused, renamed
from vislora.formats.names.table import FamilyNames, NameTable, Numbers, Renumber, Row, Sign
from vislora.formats.names.text import T5

_LAST = 47
_BLOCK, _ORIGINAL = "transformer_blocks.{}.", "blocks.{}."
_TOP = (
    ("patch_embed.proj", "x_embedder.proj"),
    ("time_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
    ("time_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
    ("time_embed.pooler.to_kv", "t5_y_embedder.to_kv"),
    ("time_embed.pooler.to_q", "t5_y_embedder.to_q"),
    ("time_embed.pooler.to_out", "t5_y_embedder.to_out"),
    ("time_embed.caption_proj", "t5_yproj"),
    ("proj_out", "final_layer.linear"),
)
_SAME_ROWS = (
    ("norm1.linear", "mod_x"),
    ("attn1.norm_q", "attn.q_norm_x"),
    ("attn1.norm_k", "attn.k_norm_x"),
    ("attn1.to_out.0", "attn.proj_x"),
    ("attn1.norm_added_q", "attn.q_norm_y"),
    ("attn1.norm_added_k", "attn.k_norm_y"),
    ("attn1.to_add_out", "attn.proj_y"),
    ("ff.net.2", "mlp_x.w2"),
    ("ff_context.net.2", "mlp_y.w2"),
)
_GATED = (("ff.net.0.proj", "mlp_x.w1"), ("ff_context.net.0.proj", "mlp_y.w1"))


def _not_last(numbers: Numbers) -> Numbers | None:
    return None if numbers == (_LAST,) else numbers


def transformer_rows() -> Iterator[Row]:
    """Yield every layer of a MochiTransformer3DModel beside its original name."""
    yield from renamed(_TOP)
    yield Row("norm_out.linear", "final_layer.mod", swap="always")
    yield from renamed(_SAME_ROWS, _BLOCK, _ORIGINAL)
    yield from (Row(_BLOCK + name, _ORIGINAL + stored, swap="always") for name, stored in _GATED)
    yield from fused(f"{_ORIGINAL}attn.qkv_x", [f"{_BLOCK}attn1.{name}" for name in ("to_q", "to_k", "to_v")])
    yield from fused(f"{_ORIGINAL}attn.qkv_y", [f"{_BLOCK}attn1.add_{name}_proj" for name in "qkv"])
    yield Row(f"{_BLOCK}norm1_context.linear", f"{_ORIGINAL}mod_y", renumber=Renumber(_not_last, _not_last))
    yield Row(f"transformer_blocks.{_LAST}.norm1_context.linear_1", f"blocks.{_LAST}.mod_y")


MOCHI = FamilyNames(
    family="mochi",
    tables={"denoiser": NameTable(transformer_rows()), "te:t5": T5},
    flat_prefixes={"denoiser": "lora_unet_"},
    folders={"denoiser": "transformer", "te:t5": "text_encoder"},
    signs=(
        Sign(r"transformer_blocks\.\d+\.attn1\..*", (3072,)),
        Sign(r"transformer_blocks\.4[2-7]\.attn1\..*", (3072,)),  # CogVideoX has this width, but 42 blocks
        Sign(r"transformer_blocks\.\d+\.attn1\.add_._proj", (1536,)),
    ),
    versions=("mochi",),
)
