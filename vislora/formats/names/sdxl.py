"""Layer names of Stable Diffusion XL, base and refiner: SD's UNet with deeper blocks, in kohya's files by SGM's names.

    lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k   -> down_blocks.1.attentions.0.transformer_blocks.1. ...
    lora_unet_output_blocks_2_2_conv                             -> up_blocks.0.upsamplers.0.conv
    lora_te2_text_model_encoder_layers_31_mlp_fc1                -> te:clip_g

The refiner is a family of its own: its first up block has no attention, so that SGM calls one layer differently, and it
has CLIP-G alone.
"""

from __future__ import annotations

from vislora.formats.names.sd import unet_rows
from vislora.formats.names.table import FamilyNames, NameTable, Row, Sign
from vislora.formats.names.text import CLIP

_ADD_EMBEDDING = (
    Row("add_embedding.linear_1", "label_emb.0.0"),
    Row("add_embedding.linear_2", "label_emb.0.2"),
)
_OF_REFINER = (
    Sign(r".*\.attn2\.to_[kv]", (1280,)),
    Sign(r".*\.attentions\..*(attn[12]\.to_(q|out\.0)|attn1\.to_[kv]|ff\.net\.0\.proj|proj_in|proj_out)", (768, 1536)),
    # no sign are its convs of 1152 and 2304: 3 x 3 convs of 128 and 256 look so where slots do not tell the kernel
    Sign(r".*\.(resnets|downsamplers|upsamplers)\..*", (384, 768, 1536, 3072)),
    Sign(r"add_embedding\.linear_1", (2560,)),
)

SDXL = FamilyNames(
    family="sdxl",
    tables={
        "denoiser": NameTable((*unet_rows(bare_blocks=0), *_ADD_EMBEDDING)),
        "te:clip_l": CLIP,
        "te:clip_g": CLIP,
    },
    flat_prefixes={"denoiser": "lora_unet_", "te:clip_l": "lora_te1_", "te:clip_g": "lora_te2_"},
    folders={"denoiser": "unet", "te:clip_l": "text_encoder", "te:clip_g": "text_encoder_2"},
    flattened=frozenset({"te:clip_l"}),
    signs=(
        Sign(r".*\.transformer_blocks\.[1-9].*"),
        Sign(r"add_embedding\..*"),
        Sign(r".*\.attn2\.to_[kv]", (2048,)),
        # at these places and widths SD has no layers
        Sign(r"up_blocks\.0\.attentions\..*", (1280, 5120)),
        Sign(r"up_blocks\.1\.attentions\..*", (640, 2560)),
        Sign(r"up_blocks\.1\.resnets\.(2\.conv1|2\.conv_shortcut|.\.conv2)", (640, 960)),
        Sign(r"up_blocks\.2\.resnets\.0\.conv(1|_shortcut)", (960,)),
        Sign(r"up_blocks\.2\.resnets\.[12]\.conv(1|_shortcut)", (640,)),
        Sign(r"up_blocks\.2\.resnets\..\.conv2", (320,)),
    ),
    against=_OF_REFINER,
    versions=("sdxl_base_v1-0", "sdxl", "stable-diffusion-xl"),
    variant_of="sd",
)
SDXL_REFINER = FamilyNames(
    family="sdxl-refiner",
    tables={"denoiser": NameTable((*unet_rows(bare_blocks=1), *_ADD_EMBEDDING)), "te:clip_g": CLIP},
    flat_prefixes={"denoiser": "lora_unet_", "te:clip_g": "lora_te2_"},
    folders={"denoiser": "unet", "te:clip_g": "text_encoder_2"},
    signs=_OF_REFINER,
    versions=("sdxl_refiner", "stable-diffusion-xl-v1-refiner"),
    variant_of="sdxl",
)
