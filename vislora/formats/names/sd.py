"""Layer names of Stable Diffusion 1.x and 2.x (diffusers UNet2DConditionModel, kohya networks/lora.py).

lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_out_0
lora_te_text_model_encoder_layers_0_mlp_fc1
"""

from __future__ import annotations

from collections.abc import Iterator

from vislora.formats.names.table import FamilyNames, NameTable, Row
from vislora.formats.names.text import CLIP

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj", "norm_q", "norm_k", "group_norm")
_RESNET = ("conv1", "conv2", "time_emb_proj", "conv_shortcut", "norm1", "norm2")
_TOP = (
    "conv_in",
    "conv_out",
    "conv_norm_out",
    "time_embedding.linear_1",
    "time_embedding.linear_2",
    "time_embedding.cond_proj",
    "class_embedding",
    "class_embedding.linear_1",
    "class_embedding.linear_2",
    "add_embedding.linear_1",
    "add_embedding.linear_2",
    "encoder_hid_proj",
)


def unet_paths() -> Iterator[str]:
    """Yield the templates of every layer that a UNet2DConditionModel can have."""
    yield from _TOP
    for block in ("down_blocks.{}", "mid_block", "up_blocks.{}"):
        yield from (f"{block}.resnets.{{}}.{name}" for name in _RESNET)
        yield from (f"{block}.attentions.{{}}.{name}" for name in ("proj_in", "proj_out", "norm", *_ATTENTION))
        inner = f"{block}.attentions.{{}}.transformer_blocks.{{}}"
        yield from (f"{inner}.{attn}.{name}" for attn in ("attn1", "attn2") for name in _ATTENTION)
        yield from (f"{inner}.{name}" for name in ("ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"))
    yield "down_blocks.{}.downsamplers.{}.conv"
    yield "up_blocks.{}.upsamplers.{}.conv"


SD = FamilyNames(
    family="sd",
    tables={"denoiser": NameTable(map(Row, unet_paths())), "te:clip_l": CLIP},
    flat_prefixes={"denoiser": "lora_unet_", "te:clip_l": "lora_te_"},
    folders={"denoiser": "unet", "te:clip_l": "text_encoder"},
    flattened=frozenset({"te:clip_l"}),
)
