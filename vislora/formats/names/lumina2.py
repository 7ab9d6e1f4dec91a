"""Layer names of Lumina-Image 2.0: diffusers Lumina2Transformer2DModel, Alpha-VLLM's own, sd-scripts lora_lumina.py.

    lora_unet_layers_0_attention_qkv                   -> layers.0.attn.to_q, .to_k, .to_v (rows 3:1:1)
    diffusion_model.context_refiner.1.feed_forward.w2  -> context_refiner.1.feed_forward.linear_2

Attention has 24 heads for queries, 8 for keys and 8 for values, so q, k and v are not equal rows of the fused layer.
"""

from __future__ import annotations

from collections.abc import Iterator

from vislora.formats.names.rows import fused, kept, renamed
from vislora.formats.names.table import FamilyNames, NameTable, Row, Sign

_TOP = (
    ("time_caption_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
    ("time_caption_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
    ("time_caption_embed.caption_embedder.0", "cap_embedder.0"),
    ("time_caption_embed.caption_embedder.1", "cap_embedder.1"),
    ("norm_out.linear_1", "final_layer.adaLN_modulation.1"),
    ("norm_out.linear_2", "final_layer.linear"),
)
_BLOCK = (
    ("attn.to_out.0", "attention.out"),
    ("attn.norm_q", "attention.q_norm"),
    ("attn.norm_k", "attention.k_norm"),
    ("feed_forward.linear_1", "feed_forward.w1"),
    ("feed_forward.linear_2", "feed_forward.w2"),
    ("feed_forward.linear_3", "feed_forward.w3"),
    ("norm2", "attention_norm2"),
    ("ffn_norm1", "ffn_norm1"),
    ("ffn_norm2", "ffn_norm2"),
)
_MODULATED = (("norm1.linear", "adaLN_modulation.1"), ("norm1.norm", "attention_norm1"))
_PLAIN = (("norm1", "attention_norm1"),)


def transformer_rows() -> Iterator[Row]:
    """Yield every layer of a Lumina2Transformer2DModel beside its original name."""
    yield from kept(("x_embedder",))
    yield from renamed(_TOP)
    for stem, norm in (("layers", _MODULATED), ("noise_refiner", _MODULATED), ("context_refiner", _PLAIN)):
        block = f"{stem}.{{}}."
        yield from renamed((*_BLOCK, *norm), block, block)
        members = [f"{block}attn.{name}" for name in ("to_q", "to_k", "to_v")]
        yield from fused(f"{block}attention.qkv", members, (3, 1, 1))


LUMINA2 = FamilyNames(
    family="lumina2",
    tables={"denoiser": NameTable(transformer_rows())},
    flat_prefixes={"denoiser": "lora_unet_"},
    folders={"denoiser": "transformer"},
    signs=(Sign(r"(layers|noise_refiner|context_refiner)\.\d+\.attn\..*", (2304,)),),
    versions=("lumina-2",),
    network_module="networks.lora_lumina",
)
