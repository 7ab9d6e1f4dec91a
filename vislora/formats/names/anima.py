"""Layer names of Anima and of Cosmos Predict2, whose network it has: diffusers CosmosTransformer3DModel, NVIDIA's own.

    lora_unet_blocks_0_self_attn_q_proj                -> transformer_blocks.0.attn1.to_q
    diffusion_model.blocks.7.adaln_modulation_mlp.2    -> transformer_blocks.7.norm3.linear_2
    lora_te_layers_0_self_attn_q_proj                  -> te:llm (Qwen3): model.layers.0.self_attn.q_proj

The text conditioner (`llm_adapter` in the original, a component of its own in diffusers) is not in the table.
"""

from __future__ import annotations

from collections.abc import Iterator

from vislora.formats.names.rows import renamed
from vislora.formats.names.table import FamilyNames, NameTable, Row, Sign
from vislora.formats.names.text import LLM

_TOP = (
    ("patch_embed.proj", "x_embedder.proj.1"),
    ("time_embed.t_embedder.linear_1", "t_embedder.1.linear_1"),
    ("time_embed.t_embedder.linear_2", "t_embedder.1.linear_2"),
    ("time_embed.norm", "t_embedding_norm"),
    ("norm_out.linear_1", "final_layer.adaln_modulation.1"),
    ("norm_out.linear_2", "final_layer.adaln_modulation.2"),
    ("proj_out", "final_layer.linear"),
)
_BLOCK = (
    *((f"norm1.linear_{n}", f"adaln_modulation_self_attn.{n}") for n in "12"),
    *((f"norm2.linear_{n}", f"adaln_modulation_cross_attn.{n}") for n in "12"),
    *((f"norm3.linear_{n}", f"adaln_modulation_mlp.{n}") for n in "12"),
    ("ff.net.0.proj", "mlp.layer1"),
    ("ff.net.2", "mlp.layer2"),
)
_ATTENTION = (
    ("to_q", "q_proj"),
    ("to_k", "k_proj"),
    ("to_v", "v_proj"),
    ("to_out.0", "output_proj"),
    ("norm_q", "q_norm"),
    ("norm_k", "k_norm"),
)


def transformer_rows() -> Iterator[Row]:
    """Yield every layer of Cosmos Predict2's CosmosTransformer3DModel beside its original name."""
    yield from renamed(_TOP)
    yield from renamed(_BLOCK, "transformer_blocks.{}.", "blocks.{}.")
    yield from renamed(_ATTENTION, "transformer_blocks.{}.attn1.", "blocks.{}.self_attn.")
    yield from renamed(_ATTENTION, "transformer_blocks.{}.attn2.", "blocks.{}.cross_attn.")


ANIMA = FamilyNames(
    family="anima",
    tables={"denoiser": NameTable(transformer_rows()), "te:llm": LLM},
    flat_prefixes={"denoiser": "lora_unet_", "te:llm": "lora_te_"},
    folders={"denoiser": "transformer", "te:llm": "text_encoder"},
    signs=(
        Sign(r"transformer_blocks\.\d+\.attn1\..*", (2048, 5120)),
        Sign(r"transformer_blocks\.\d+\.attn2\.to_[kv]", (1024,)),
        Sign(r"transformer_blocks\.\d+\.norm[123]\.linear_[12]"),
    ),
    against=(Sign(r"transformer_blocks\.\d+\.attn2\.to_[kv]", (1152, 2048, 2240, 4096)),),
    versions=("anima-preview", "anima"),
    network_module="networks.lora_anima",
)
