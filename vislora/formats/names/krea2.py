"""Layer names of Krea 2: diffusers Krea2Transformer2DModel, krea-ai's own.

lora_unet_blocks_0_attn_wq                         -> transformer_blocks.0.attn.to_q
diffusion_model.txtfusion.refiner_blocks.1.mlp.up  -> text_fusion.refiner_blocks.1.ff.up
"""

from __future__ import annotations

from collections.abc import Iterator

from vislora.formats.names.rows import renamed
from vislora.formats.names.table import FamilyNames, NameTable, Row, Sign

_TOP = (
    ("img_in", "first"),
    ("time_embed.linear_1", "tmlp.0"),
    ("time_embed.linear_2", "tmlp.2"),
    ("time_mod_proj", "tproj.1"),
    ("txt_in.norm", "txtmlp.0"),
    ("txt_in.linear_1", "txtmlp.1"),
    ("txt_in.linear_2", "txtmlp.3"),
    ("text_fusion.projector", "txtfusion.projector"),
    ("final_layer.norm", "last.norm"),
    ("final_layer.linear", "last.linear"),
)
_BLOCK = (
    ("attn.to_q", "attn.wq"),
    ("attn.to_k", "attn.wk"),
    ("attn.to_v", "attn.wv"),
    ("attn.to_out.0", "attn.wo"),
    ("attn.to_gate", "attn.gate"),
    ("attn.norm_q", "attn.qknorm.qnorm"),
    ("attn.norm_k", "attn.qknorm.knorm"),
    ("ff.gate", "mlp.gate"),
    ("ff.up", "mlp.up"),
    ("ff.down", "mlp.down"),
    ("norm1", "prenorm"),
    ("norm2", "postnorm"),
)


def transformer_rows() -> Iterator[Row]:
    """Yield every layer of a Krea2Transformer2DModel beside its original name."""
    yield from renamed(_TOP)
    yield from renamed(_BLOCK, "transformer_blocks.{}.", "blocks.{}.")
    for blocks in ("layerwise_blocks", "refiner_blocks"):
        yield from renamed(_BLOCK, f"text_fusion.{blocks}.{{}}.", f"txtfusion.{blocks}.{{}}.")


KREA2 = FamilyNames(
    family="krea2",
    tables={"denoiser": NameTable(transformer_rows())},
    flat_prefixes={"denoiser": "lora_unet_"},
    folders={"denoiser": "transformer"},
    signs=(
        Sign(r"transformer_blocks\.\d+\.attn\..*", (6144,)),
        Sign(r"transformer_blocks\.(8|9|1\d|2[0-7])\.attn\..*", (6144,)),  # FLUX.2 has this width, but 8 blocks
        Sign(r"transformer_blocks\.\d+\.attn\.to_gate|text_fusion\..*"),
    ),
    versions=("krea2",),
)
