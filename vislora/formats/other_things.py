"""What a file without an adapter in it is: a table from the keys that give a thing away to its name. Torch-free.

lllite_unet_..._attn1_to_q.down.0.weight -> a ControlNet-LLLite      first_stage_model.encoder... -> a whole checkpoint
"""

from __future__ import annotations

import re
from collections.abc import Collection

_WEIGHT = r".*\.(weight|bias|scale)$"
_SD3 = r"joint_blocks\.\d+\."
_FLUX = r"double_blocks\.\d+\.img_attn\.qkv\.(weight|bias)"
_IN_CHECKPOINT = r"model\.diffusion_model\."
# from the particular to the general: (name, patterns that each begin a key of it), and the first that fits all of them
OTHER_THINGS: tuple[tuple[str, tuple[str, ...]], ...] = (
    # beside a model
    ("a ControlNet-LLLite", (r"lllite_",)),
    ("a ControlNet-LoRA (Stability AI)", (r"lora_controlnet$",)),
    ("a ControlNet", (r"(control_model\.|controlnet_(cond_embedding|down_blocks|blocks|x_embedder|mode_embedder)\b)",)),
    ("a ControlNet", (r"(input_hint_block|zero_convs)\.",)),
    ("an IP-Adapter with a LoRA for faces", (r"ip_adapter\.\d+\.to_k_ip", r"ip_adapter\.\d+\.to_\w+_lora\.")),
    (
        "an IP-Adapter",
        (r"(image_proj\.|ip_adapter\.|ip_adapter_proj_model\.|double_blocks\.\d+\.processor\.ip_adapter_)",),
    ),
    ("a PhotoMaker", (r"id_encoder\.",)),
    ("PuLID's weights", (r"pulid_(encoder|ca)\.",)),
    ("a T2I-Adapter for styles", (r"(style_embedding$|transformer_layes\.)",)),
    ("a T2I-Adapter", (r"(adapter\.)?body\.\d+\.(block1|in_conv|resnets\.\d+\.block1)\.",)),
    ("a GLIGEN's weights", (r"(.*\.)?(fuser|position_net)\.",)),
    ("an AnimateDiff motion LoRA", (r".*motion_modules\..*lora",)),
    ("an AnimateDiff motion module", (r".*motion_modules\.",)),
    ("a Custom Diffusion's attention weights", (r".*\.processor\.to_\w+_custom_diffusion\.",)),
    ("a hypernetwork", (r"(320|640|768|1024|1280|2048)\.[01]\.(linear\.)?\w+\.(weight|bias)$",)),
    ("a Flux Redux image adapter", (r"redux_(up|down)\.",)),
    # embeddings
    ("a textual inversion embedding for SD3 or Flux", (r"clip_l$", r"t5(xxl)?$")),
    ("a textual inversion embedding for SDXL", (r"clip_l$", r"clip_g$")),
    ("a textual inversion embedding", (r"(emb_params|clip_l|clip_g)$|string_to_param\b|<[^<>]+>$",)),
    # whole checkpoints in their original names
    ("a whole checkpoint of SD3", (_IN_CHECKPOINT + _SD3,)),
    ("a whole checkpoint of Flux", (_IN_CHECKPOINT + _FLUX,)),
    ("a whole checkpoint of SDXL", (_IN_CHECKPOINT, r"conditioner\.embedders\.1\.")),
    ("a whole checkpoint of SDXL's refiner", (_IN_CHECKPOINT, r"conditioner\.embedders\.0\.model\.")),
    ("a whole checkpoint of SD 1.x", (_IN_CHECKPOINT, r"cond_stage_model\.transformer\.")),
    ("a whole checkpoint of SD 2.x", (_IN_CHECKPOINT, r"cond_stage_model\.model\.")),
    ("a whole checkpoint", (r"(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner|model_ema)\.",)),
    ("a LoRA for Stable Cascade, a model that vislora does not support", (r"lora_prior_(unet|te)_",)),
    # one part of a model
    ("a denoiser's weights (Flux, original names)", (_FLUX,)),
    ("a denoiser's weights (Flux, diffusers names)", (r"single_transformer_blocks\.\d+\." + _WEIGHT,)),
    ("a denoiser's weights (SD3, original names)", (_SD3 + _WEIGHT,)),
    ("a denoiser's weights (SD3, diffusers names)", (r"transformer_blocks\.\d+\.attn\.add_q_proj\.", r"pos_embed\.")),
    ("a denoiser's weights (SDXL, diffusers names)", (r"down_blocks\.\d+\.resnets\.", r"add_embedding\.")),
    ("a VAE's weights", (r"(encoder|decoder)\.(conv_in|conv_out|down|up|mid|down_blocks|up_blocks|mid_block)\b",)),
    ("a VAE's weights", (r"(quant_conv|post_quant_conv)\.",)),
    ("a denoiser's weights (SD, diffusers names)", (r"down_blocks\.\d+\.(attentions|resnets)\.",)),
    ("a denoiser's weights (original names)", (r"(input_blocks|output_blocks)\.\d+\.",)),
    (
        "a denoiser's weights",
        (r"(transformer_blocks|double_blocks|blocks|layers)\.\d+\..*attn", r".*(embedder|proj_out)\b"),
    ),
    ("an image encoder's weights", (r"(vision_model|visual)\.",)),
    ("a text encoder's weights (T5)", (r"(encoder\.block\.\d+\.layer\.\d+\.|shared\.weight)",)),
    ("a text encoder's weights (OpenCLIP)", (r"(model\.)?transformer\.resblocks\.\d+\.",)),
    (
        "a text encoder's weights (CLIP)",
        (r"(transformer\.)?(text_model|encoder\.layers|embeddings)\b.*(weight|bias)$",),
    ),
    ("a language model's weights", (r"(model\.)?layers\.\d+\.(self_attn|mlp)\.",)),
    ("an upscaler's weights", (r"(params_ema\.|params\.)?(conv_first|conv_body|RDB_trunk|upconv1)\.",)),
    ("an upscaler's weights", (r"(params_ema\.|params\.)?layers\.\d+\.residual_group\.",)),
    ("an upscaler's weights", (r"model\.1\.sub\.\d+\.",)),
)


def looks_like(keys: Collection[str]) -> str:
    """Say in words what a file with these keys is, when it is no adapter that vislora knows."""
    for name, patterns in OTHER_THINGS:
        if all(any(map(re.compile(pattern).match, keys)) for pattern in patterns):
            return name
    return "a safetensors file without a LoRA in it" if keys else "a safetensors file without any tensor"
