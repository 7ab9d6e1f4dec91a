"""Layer names of PixArt-alpha and PixArt-Sigma: diffusers PixArtTransformer2DModel.

Its original names are not known here.

transformer.transformer_blocks.0.attn1.to_q
lora_unet_transformer_blocks_0_attn2_to_out_0
"""

from __future__ import annotations

from collections.abc import Iterator

from vislora.formats.names.rows import kept
from vislora.formats.names.table import FamilyNames, NameTable, Row, Sign
from vislora.formats.names.text import T5

_EMBEDDERS = ("timestep_embedder", "resolution_embedder", "aspect_ratio_embedder")


def transformer_rows() -> Iterator[Row]:
    """Yield every layer that a PixArtTransformer2DModel can have."""
    yield from kept(("pos_embed.proj", "proj_out", "adaln_single.linear"))
    yield from kept(f"adaln_single.emb.{name}.linear_{n}" for name in _EMBEDDERS for n in "12")
    yield from kept(("caption_projection.linear_1", "caption_projection.linear_2"))
    block = "transformer_blocks.{}."
    yield from kept((f"attn{n}.{name}" for n in "12" for name in ("to_q", "to_k", "to_v", "to_out.0")), block)
    yield from kept(("ff.net.0.proj", "ff.net.2"), block)


PIXART = FamilyNames(
    family="pixart",
    tables={"denoiser": NameTable(transformer_rows()), "te:t5": T5},
    flat_prefixes={"denoiser": "lora_unet_"},
    folders={"denoiser": "transformer", "te:t5": "text_encoder"},
    flat_from="path",
    signs=(
        Sign(r"transformer_blocks\.\d+\.attn[12]\..*", (1152,)),
        Sign(r"transformer_blocks\.\d+\.ff\.net\.0\.proj", (1152,)),
        Sign(r"adaln_single\..*"),
    ),
    versions=("pixart",),
)
