"""Layer names of Z-Image: diffusers ZImageTransformer2DModel and the tree of its single-file checkpoints.

    lora_unet_layers_0_attention_to_q                  -> layers.0.attention.to_q
    lora_unet_layers_0_attention_qkv                   -> layers.0.attention.to_q, .to_k, .to_v (by rows)
    diffusion_model.noise_refiner.1.attention.out      -> noise_refiner.1.attention.to_out.0

Trainers flatten either tree; both are read, the reference tree is written, in which nothing is fused. The patch
embedder and the final layer are numbered by patch sizes; the released models have `2-1` only.
"""

from __future__ import annotations

from collections.abc import Iterator

from vislora.formats.names.rows import fused, kept, renamed
from vislora.formats.names.table import FamilyNames, NameTable, Row, Sign

_TOP = ("t_embedder.mlp.0", "t_embedder.mlp.2", *(f"{name}_embedder.{n}" for name in ("cap", "siglip") for n in "01"))
_BLOCKS = ("layers.{}.", "noise_refiner.{}.", "context_refiner.{}.", "siglip_refiner.{}.")
_PATCHES = (
    ("all_x_embedder.2-1", "x_embedder"),
    ("all_final_layer.2-1.linear", "final_layer.linear"),
    ("all_final_layer.2-1.adaLN_modulation.1", "final_layer.adaLN_modulation.1"),
)
_KEPT = (
    *(f"feed_forward.{name}" for name in ("w1", "w2", "w3")),
    *("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2", "adaLN_modulation.0"),
)
_RENAMED = (
    ("attention.to_out.0", "attention.out"),
    ("attention.norm_q", "attention.q_norm"),
    ("attention.norm_k", "attention.k_norm"),
)


def transformer_rows() -> Iterator[Row]:
    """Yield every layer of a ZImageTransformer2DModel beside its name in single-file checkpoints."""
    yield from kept(_TOP)
    yield from renamed(_PATCHES)
    for block in _BLOCKS:
        yield from kept(_KEPT, block)
        yield from renamed(_RENAMED, block, block)
        yield from fused(f"{block}attention.qkv", [f"{block}attention.{name}" for name in ("to_q", "to_k", "to_v")])


Z_IMAGE = FamilyNames(
    family="z-image",
    tables={"denoiser": NameTable(transformer_rows())},
    flat_prefixes={"denoiser": "lora_unet_"},
    folders={"denoiser": "transformer"},
    flat_from="path",
    signs=(Sign(r"(layers|noise_refiner|context_refiner)\.\d+\.attention\..*", (3840,)),),
    versions=("z-image",),
)
