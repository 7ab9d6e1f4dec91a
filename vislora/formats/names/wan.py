"""Layer names of Wan 2.1 and 2.2 (and VACE): diffusers WanTransformer3DModel, Wan-AI's own, musubi-tuner's.

    lora_unet_blocks_0_self_attn_q                     -> blocks.0.attn1.to_q
    diffusion_model.blocks.7.cross_attn.k_img          -> blocks.7.attn2.add_k_proj
    transformer_2.blocks.0.ffn.net.0.proj              -> the same layer of the low-noise expert of 2.2

Wan 2.2 has two transformers: `denoiser` is the one for high noise, `denoiser_2` (diffusers' transformer_2) for low
noise. Flat files hold one of them and do not say which.
"""

from __future__ import annotations

from collections.abc import Iterator

from vislora.formats.names.rows import kept, renamed
from vislora.formats.names.table import FamilyNames, NameTable, Row, Sign
from vislora.formats.names.text import T5

_TOP = (
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
    ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
    ("condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
    ("proj_out", "head.head"),
)
_ATTENTION = (
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("to_out.0", "o"),
    ("norm_q", "norm_q"),
    ("norm_k", "norm_k"),
    ("add_k_proj", "k_img"),
    ("add_v_proj", "v_img"),
    ("norm_added_k", "norm_k_img"),
)
_BLOCK = (
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    ("norm2", "norm3"),  # the norm of cross-attention; the others have no weights
)
_VACE = (("proj_in", "before_proj"), ("proj_out", "after_proj"))


def transformer_rows() -> Iterator[Row]:
    """Yield every layer that a WanTransformer3DModel or WanVACETransformer3DModel can have beside its original name."""
    yield from kept(("patch_embedding", "vace_patch_embedding"))
    yield from renamed(_TOP)
    for block in ("blocks.{}.", "vace_blocks.{}."):
        yield from renamed(_BLOCK, block, block)
        yield from renamed(_ATTENTION, f"{block}attn1.", f"{block}self_attn.")
        yield from renamed(_ATTENTION, f"{block}attn2.", f"{block}cross_attn.")
    yield from renamed(_VACE, "vace_blocks.{}.", "vace_blocks.{}.")


def fun_rows() -> Iterator[Row]:
    """Yield the names of Wan-Fun's trainer, whose prefix is `lora_unet__`."""
    yield from (Row(row.path, f"_{row.stored or row.path}") for row in transformer_rows())


_TABLE = NameTable(transformer_rows(), fun_rows())

WAN = FamilyNames(
    family="wan",
    tables={"denoiser": _TABLE, "denoiser_2": _TABLE, "te:t5": T5},
    flat_prefixes={"denoiser": "lora_unet_"},
    folders={"denoiser": "transformer", "denoiser_2": "transformer_2", "te:t5": "text_encoder"},
    signs=(Sign(r"(vace_)?blocks\.\d+\.attn[12]\..*", (1536, 3072, 5120)),),
    versions=("wan",),
    network_module="networks.lora_wan",
)
