"""Layer names of Chroma: diffusers ChromaTransformer2DModel, sd-scripts library/chroma_models.py.

    lora_unet_double_blocks_0_img_attn_qkv                        as Flux has them
    lora_unet_distilled_guidance_layer_layers_0_in_layer          -> distilled_guidance_layer.layers.0.linear_1

Its blocks are Flux's; one small network makes all modulations, which have no layers of their own. There is no CLIP.
"""

from __future__ import annotations

from vislora.formats.names.flux import BLOCK_SIGNS, BLOCKS_AGAINST, common_rows
from vislora.formats.names.table import FamilyNames, NameTable, Row
from vislora.formats.names.text import T5

_GUIDANCE = "distilled_guidance_layer"
_OWN_ROWS = (
    Row(f"{_GUIDANCE}.in_proj"),
    Row(f"{_GUIDANCE}.out_proj"),
    Row(f"{_GUIDANCE}.norms.{{}}"),
    Row(f"{_GUIDANCE}.layers.{{}}.linear_1", f"{_GUIDANCE}.layers.{{}}.in_layer"),
    Row(f"{_GUIDANCE}.layers.{{}}.linear_2", f"{_GUIDANCE}.layers.{{}}.out_layer"),
)

CHROMA = FamilyNames(
    family="chroma",
    tables={"denoiser": NameTable((*common_rows(), *_OWN_ROWS)), "te:t5": T5},
    flat_prefixes={"denoiser": "lora_unet_", "te:t5": "lora_te3_"},
    folders={"denoiser": "transformer", "te:t5": "text_encoder"},
    signs=BLOCK_SIGNS,
    against=BLOCKS_AGAINST,
    versions=("chroma",),
    variant_of="flux",
    network_module="networks.lora_flux",
)
