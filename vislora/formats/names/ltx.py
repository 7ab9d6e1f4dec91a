"""Layer names of LTX-Video: diffusers LTXVideoTransformer3DModel, Lightricks' own.

diffusion_model.transformer_blocks.0.attn1.to_q    -> the same
diffusion_model.adaln_single.linear                -> time_embed.linear
"""

from __future__ import annotations

from collections.abc import Iterator

from vislora.formats.names.rows import kept, renamed
from vislora.formats.names.table import FamilyNames, NameTable, Row, Sign
from vislora.formats.names.text import T5

_BLOCK = "transformer_blocks.{}."
_RENAMED = (
    ("proj_in", "patchify_proj"),
    ("time_embed.emb.timestep_embedder.linear_1", "adaln_single.emb.timestep_embedder.linear_1"),
    ("time_embed.emb.timestep_embedder.linear_2", "adaln_single.emb.timestep_embedder.linear_2"),
    ("time_embed.linear", "adaln_single.linear"),
)


def transformer_rows() -> Iterator[Row]:
    """Yield every layer of an LTXVideoTransformer3DModel beside its original name."""
    yield from renamed(_RENAMED)
    yield from kept(("proj_out", "caption_projection.linear_1", "caption_projection.linear_2"))
    for attention in (f"{_BLOCK}attn1.", f"{_BLOCK}attn2."):
        yield from kept(("to_q", "to_k", "to_v", "to_out.0"), attention)
        yield from renamed((("norm_q", "q_norm"), ("norm_k", "k_norm")), attention, attention)
    yield from kept(("ff.net.0.proj", "ff.net.2"), _BLOCK)


LTX = FamilyNames(
    family="ltx",
    tables={"denoiser": NameTable(transformer_rows()), "te:t5": T5},
    flat_prefixes={"denoiser": "lora_unet_"},
    folders={"denoiser": "transformer", "te:t5": "text_encoder"},
    signs=(
        Sign(r"transformer_blocks\.\d+\.attn1\..*", (2048, 4096)),
        Sign(r"transformer_blocks\.\d+\.attn2\.to_[kv]", (2048, 4096)),
    ),
    versions=("ltx-video",),
)
