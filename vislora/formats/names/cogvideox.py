"""Layer names of CogVideoX: diffusers CogVideoXTransformer3DModel.

Its original names are not known here.

transformer.transformer_blocks.0.attn1.to_q
lora_unet_transformer_blocks_0_norm1_linear
"""

from __future__ import annotations

from collections.abc import Iterator

from vislora.formats.names.rows import kept
from vislora.formats.names.table import FamilyNames, NameTable, Row, Sign
from vislora.formats.names.text import T5

_TOP = (
    "patch_embed.proj",
    "patch_embed.text_proj",
    *(f"{name}.linear_{n}" for name in ("time_embedding", "ofs_embedding") for n in "12"),
    "norm_final",
    "norm_out.linear",
    "norm_out.norm",
    "proj_out",
)
_BLOCK = (
    *("norm1.linear", "norm1.norm", "norm2.linear", "norm2.norm"),
    *(f"attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k")),
    *("ff.net.0.proj", "ff.net.2"),
)


def transformer_rows() -> Iterator[Row]:
    """Yield every layer that a CogVideoXTransformer3DModel can have."""
    yield from kept(_TOP)
    yield from kept(_BLOCK, "transformer_blocks.{}.")


COGVIDEOX = FamilyNames(
    family="cogvideox",
    tables={"denoiser": NameTable(transformer_rows()), "te:t5": T5},
    flat_prefixes={"denoiser": "lora_unet_"},
    folders={"denoiser": "transformer", "te:t5": "text_encoder"},
    flat_from="path",
    signs=(
        Sign(r"transformer_blocks\.\d+\.attn1\..*", (1920, 3072)),
        Sign(r"transformer_blocks\.41\.attn1\..*", (3072,)),  # the last block of 5B; Mochi has this width and 48
        Sign(r"transformer_blocks\.\d+\.norm[12]\.linear", (512,)),
    ),
    against=(Sign(r"transformer_blocks\.(4[2-9]|[5-9]\d)\..*"),),
    versions=("cogvideox",),
)
