"""Layer names of Stable Diffusion 3 and 3.5: diffusers SD3Transformer2DModel, SAI's mmditx.py, kohya lora_sd3.py.

    lora_unet_joint_blocks_0_x_block_attn_qkv                  -> transformer_blocks.0.attn.to_q, .to_k, .to_v (by rows)
    lora_unet_joint_blocks_23_context_block_adaLN_modulation_1 -> transformer_blocks.23.norm1_context.linear

The original splits a final modulation into (shift, scale), diffusers into (scale, shift): the halves of
`norm_out.linear` and of the last block's `norm1_context.linear` change places. Only that block has two rows per input
there, the others have six.
"""

from __future__ import annotations

from collections.abc import Iterator

from vislora.formats.names.table import FamilyNames, NameTable, Row, Share, Sign
from vislora.formats.names.text import CLIP, T5

_BLOCK = "transformer_blocks.{}"
_IMAGE = "joint_blocks.{}.x_block"
_TEXT = "joint_blocks.{}.context_block"
_SAME_ROWS = (
    ("pos_embed.proj", "x_embedder.proj"),
    ("time_text_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
    ("time_text_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
    ("time_text_embed.text_embedder.linear_1", "y_embedder.mlp.0"),
    ("time_text_embed.text_embedder.linear_2", "y_embedder.mlp.2"),
    ("context_embedder", "context_embedder"),
    ("proj_out", "final_layer.linear"),
    (f"{_BLOCK}.norm1.linear", f"{_IMAGE}.adaLN_modulation.1"),
    (f"{_BLOCK}.attn.to_out.0", f"{_IMAGE}.attn.proj"),
    (f"{_BLOCK}.attn.norm_q", f"{_IMAGE}.attn.ln_q"),
    (f"{_BLOCK}.attn.norm_k", f"{_IMAGE}.attn.ln_k"),
    (f"{_BLOCK}.attn2.to_out.0", f"{_IMAGE}.attn2.proj"),
    (f"{_BLOCK}.attn2.norm_q", f"{_IMAGE}.attn2.ln_q"),
    (f"{_BLOCK}.attn2.norm_k", f"{_IMAGE}.attn2.ln_k"),
    (f"{_BLOCK}.ff.net.0.proj", f"{_IMAGE}.mlp.fc1"),
    (f"{_BLOCK}.ff.net.2", f"{_IMAGE}.mlp.fc2"),
    (f"{_BLOCK}.attn.to_add_out", f"{_TEXT}.attn.proj"),
    (f"{_BLOCK}.attn.norm_added_q", f"{_TEXT}.attn.ln_q"),
    (f"{_BLOCK}.attn.norm_added_k", f"{_TEXT}.attn.ln_k"),
    (f"{_BLOCK}.ff_context.net.0.proj", f"{_TEXT}.mlp.fc1"),
    (f"{_BLOCK}.ff_context.net.2", f"{_TEXT}.mlp.fc2"),
)
_FUSED = (
    (f"{_IMAGE}.attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
    (f"{_IMAGE}.attn2.qkv", ("attn2.to_q", "attn2.to_k", "attn2.to_v")),
    (f"{_TEXT}.attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
)


def transformer_rows() -> Iterator[Row]:
    """Yield every layer that an SD3Transformer2DModel can have, beside its original name."""
    yield from (Row(path, stored) for path, stored in _SAME_ROWS)
    yield Row("norm_out.linear", "final_layer.adaLN_modulation.1", swap="always")
    yield Row(f"{_BLOCK}.norm1_context.linear", f"{_TEXT}.adaLN_modulation.1", swap="two rows per input")
    for stored, members in _FUSED:
        yield from (Row(f"{_BLOCK}.{name}", stored, Share(index)) for index, name in enumerate(members))


SD3 = FamilyNames(
    family="sd3",
    tables={"denoiser": NameTable(transformer_rows()), "te:clip_l": CLIP, "te:clip_g": CLIP, "te:t5": T5},
    flat_prefixes={
        "denoiser": "lora_unet_",
        "te:clip_l": "lora_te1_",
        "te:clip_g": "lora_te2_",
        "te:t5": "lora_te3_",
    },
    folders={
        "denoiser": "transformer",
        "te:clip_l": "text_encoder",
        "te:clip_g": "text_encoder_2",
        "te:t5": "text_encoder_3",
    },
    signs=(
        Sign(r"transformer_blocks\.\d+\..*", (1536, 2432, 6144, 9728)),
        Sign(r"transformer_blocks\.\d+\.attn2\..*"),
    ),
    versions=("sd3_medium", "sd3", "stable-diffusion-3"),
    network_module="networks.lora_sd3",
)
