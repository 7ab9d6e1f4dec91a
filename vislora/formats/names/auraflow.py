"""Layer names of AuraFlow: diffusers AuraFlowTransformer2DModel, fal's own.

    lora_unet_double_layers_0_attn_w2q                 -> joint_transformer_blocks.0.attn.to_q
    diffusion_model.single_layers.3.mlp.c_fc1          -> single_transformer_blocks.3.ff.linear_1

`w2` are the image's layers, `w1` the text's; single layers have `w1` only. The original splits the final modulation
into (shift, scale), diffusers into (scale, shift): the halves of `norm_out.linear` change places.
"""

from __future__ import annotations

from collections.abc import Iterator

from vislora.formats.names.rows import renamed
from vislora.formats.names.table import FamilyNames, NameTable, Row, Sign
from vislora.formats.names.text import T5

_TOP = (
    ("pos_embed.proj", "init_x_linear"),
    ("context_embedder", "cond_seq_linear"),
    ("time_step_proj.linear_1", "t_embedder.mlp.0"),
    ("time_step_proj.linear_2", "t_embedder.mlp.2"),
    ("proj_out", "final_linear"),
)
_FEED_FORWARD = (("linear_1", "c_fc1"), ("linear_2", "c_fc2"), ("out_projection", "c_proj"))
_PROJECTIONS = (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"))
_TEXT = (("add_q_proj", "q"), ("add_k_proj", "k"), ("add_v_proj", "v"), ("to_add_out", "o"))
_JOINT = (
    *((f"attn.{name}", f"attn.w2{original}") for name, original in _PROJECTIONS),
    *((f"attn.{name}", f"attn.w1{original}") for name, original in _TEXT),
    *((f"ff.{name}", f"mlpX.{original}") for name, original in _FEED_FORWARD),
    *((f"ff_context.{name}", f"mlpC.{original}") for name, original in _FEED_FORWARD),
    ("norm1.linear", "modX.1"),
    ("norm1_context.linear", "modC.1"),
)
_SINGLE = (
    *((f"attn.{name}", f"attn.w1{original}") for name, original in _PROJECTIONS),
    *((f"ff.{name}", f"mlp.{original}") for name, original in _FEED_FORWARD),
    ("norm1.linear", "modCX.1"),
)


def transformer_rows() -> Iterator[Row]:
    """Yield every layer of an AuraFlowTransformer2DModel beside its original name."""
    yield from renamed(_TOP)
    yield Row("norm_out.linear", "modF.1", swap="always")
    yield from renamed(_JOINT, "joint_transformer_blocks.{}.", "double_layers.{}.")
    yield from renamed(_SINGLE, "single_transformer_blocks.{}.", "single_layers.{}.")


AURAFLOW = FamilyNames(
    family="auraflow",
    tables={"denoiser": NameTable(transformer_rows()), "te:t5": T5},
    flat_prefixes={"denoiser": "lora_unet_"},
    folders={"denoiser": "transformer", "te:t5": "text_encoder"},
    signs=(
        Sign(r"(joint|single)_transformer_blocks\.\d+\.attn\..*", (3072,)),
        Sign(r"(joint|single)_transformer_blocks\.\d+\.attn\.to_out\.0", (3072,)),  # Flux' single blocks have none
    ),
    versions=("auraflow",),
)
