"""The released models' configurations, at few layers: widths, heads and block counts are real.

Source, unless said: the defaults of diffusers' classes (0.42.1), which are those of the released models.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import nn

# how many blocks of each kind to build
FEW = {
    "Flux2Transformer2DModel": {"num_layers": 2, "num_single_layers": 2},
    "HunyuanVideoTransformer3DModel": {"num_layers": 2, "num_single_layers": 2},
    "HunyuanImageTransformer2DModel": {"num_layers": 2, "num_single_layers": 2},
    "HiDreamImageTransformer2DModel": {"num_layers": 2, "num_single_layers": 2},
    "AuraFlowTransformer2DModel": {"num_mmdit_layers": 2, "num_single_dit_layers": 2},
    "ZImageTransformer2DModel": {"n_layers": 2},
    "FluxTransformer2DModel": {"num_layers": 2, "num_single_layers": 2},
    "UNet2DConditionModel": {},
    "MochiTransformer3DModel": {},  # whose last block differs
}


@dataclass(frozen=True)
class Dit:
    """A released model: its family, diffusers class and configuration, and how many blocks of each kind it has.

    `blocks`: path of a list of blocks -> their number.
    """

    family: str
    cls: str
    blocks: dict[str, int]
    config: dict[str, Any] = field(default_factory=dict)

    def build(self, **more: Any) -> nn.Module:
        """Build the model without memory, with two blocks of each kind."""
        few = FEW.get(self.cls, {"num_layers": 2})
        with torch.device("meta"):
            return getattr(diffusers, self.cls)(**{**self.config, **few, **more})


HUNYUAN_BLOCKS = {"transformer_blocks": 20, "single_transformer_blocks": 40}
Z_IMAGE_BLOCKS = {"layers": 30, "noise_refiner": 2, "context_refiner": 2}
COSMOS2 = {  # nvidia/Cosmos-Predict2-2B-Text2Image: 16 heads of 128
    "num_attention_heads": 16,
    "extra_pos_embed_type": None,
    "concat_padding_mask": True,
}
DITS = {
    "flux2 dev": Dit("flux2", "Flux2Transformer2DModel", {"transformer_blocks": 8, "single_transformer_blocks": 48}),
    "flux2 klein 9B": Dit(  # black-forest-labs/FLUX.2-klein-9B
        "flux2",
        "Flux2Transformer2DModel",
        {"transformer_blocks": 8, "single_transformer_blocks": 24},
        {"num_attention_heads": 32, "joint_attention_dim": 12288, "guidance_embeds": False},
    ),
    "flux2 klein 4B": Dit(  # black-forest-labs/FLUX.2-klein-4B
        "flux2",
        "Flux2Transformer2DModel",
        {"transformer_blocks": 5, "single_transformer_blocks": 20},
        {"num_attention_heads": 24, "joint_attention_dim": 7680, "guidance_embeds": False},
    ),
    "qwen-image": Dit("qwen-image", "QwenImageTransformer2DModel", {"transformer_blocks": 60}),
    "qwen-image layered": Dit(  # Qwen/Qwen-Image-Layered
        "qwen-image", "QwenImageTransformer2DModel", {"transformer_blocks": 60}, {"use_additional_t_cond": True}
    ),
    "z-image": Dit("z-image", "ZImageTransformer2DModel", Z_IMAGE_BLOCKS),
    "z-image omni": Dit("z-image", "ZImageTransformer2DModel", Z_IMAGE_BLOCKS, {"siglip_feat_dim": 1152}),
    "lumina2": Dit(  # Alpha-VLLM/Lumina-Image-2.0: Gemma 2 2B, whose width is 2304
        "lumina2",
        "Lumina2Transformer2DModel",
        {"layers": 26, "noise_refiner": 2, "context_refiner": 2},
        {"cap_feat_dim": 2304},
    ),
    "wan 14B": Dit("wan", "WanTransformer3DModel", {"blocks": 40}),
    "wan 1.3B": Dit(  # Wan-AI/Wan2.1-T2V-1.3B
        "wan", "WanTransformer3DModel", {"blocks": 30}, {"num_attention_heads": 12, "ffn_dim": 8960}
    ),
    "wan i2v 14B": Dit(  # Wan-AI/Wan2.1-I2V-14B: CLIP-H's width is 1280
        "wan",
        "WanTransformer3DModel",
        {"blocks": 40},
        {"image_dim": 1280, "added_kv_proj_dim": 5120, "in_channels": 36},
    ),
    "wan 5B": Dit(  # Wan-AI/Wan2.2-TI2V-5B
        "wan",
        "WanTransformer3DModel",
        {"blocks": 30},
        {"num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48},
    ),
    "wan vace": Dit("wan", "WanVACETransformer3DModel", {"blocks": 40, "vace_blocks": 8}, {"vace_layers": [0, 1]}),
    "hunyuan-video": Dit("hunyuan-video", "HunyuanVideoTransformer3DModel", HUNYUAN_BLOCKS),
    "hunyuan-image": Dit(  # hunyuanvideo-community/HunyuanImage-2.1: the second text encoder is ByT5 small
        "hunyuan-image", "HunyuanImageTransformer2DModel", HUNYUAN_BLOCKS, {"text_embed_2_dim": 1472}
    ),
    "hunyuan-image distilled": Dit(
        "hunyuan-image",
        "HunyuanImageTransformer2DModel",
        HUNYUAN_BLOCKS,
        {"text_embed_2_dim": 1472, "guidance_embeds": True, "use_meanflow": True},
    ),
    "pixart": Dit("pixart", "PixArtTransformer2DModel", {"transformer_blocks": 28}, {"caption_channels": 4096}),
    "sana 1.6B": Dit("sana", "SanaTransformer2DModel", {"transformer_blocks": 20}),
    "sana 0.6B": Dit(  # Efficient-Large-Model/Sana_600M
        "sana",
        "SanaTransformer2DModel",
        {"transformer_blocks": 28},
        {
            "num_attention_heads": 36,
            "num_cross_attention_heads": 16,
            "cross_attention_head_dim": 72,
            "cross_attention_dim": 1152,
        },
    ),
    "sana sprint": Dit(
        "sana",
        "SanaTransformer2DModel",
        {"transformer_blocks": 20},
        {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"},
    ),
    "hidream": Dit(  # HiDream-ai/HiDream-I1-Full: T5 and Llama 3.1 8B, both 4096 wide
        "hidream",
        "HiDreamImageTransformer2DModel",
        {"double_stream_blocks": 16, "single_stream_blocks": 32},
        {"patch_size": 2, "in_channels": 16, "caption_channels": [4096, 4096]},
    ),
    "auraflow": Dit(
        "auraflow", "AuraFlowTransformer2DModel", {"joint_transformer_blocks": 4, "single_transformer_blocks": 32}
    ),
    "anima": Dit("anima", "CosmosTransformer3DModel", {"transformer_blocks": 28}, COSMOS2),
    "krea2": Dit("krea2", "Krea2Transformer2DModel", {"transformer_blocks": 28}),
    "ltx 2B": Dit("ltx", "LTXVideoTransformer3DModel", {"transformer_blocks": 28}),
    "ltx 13B": Dit(  # Lightricks/LTX-Video-0.9.7-dev
        "ltx",
        "LTXVideoTransformer3DModel",
        {"transformer_blocks": 48},
        {"attention_head_dim": 128, "cross_attention_dim": 4096},
    ),
    "cogvideox 2B": Dit("cogvideox", "CogVideoXTransformer3DModel", {"transformer_blocks": 30}),
    "mochi": Dit("mochi", "MochiTransformer3DModel", {"transformer_blocks": 48}),
    "cogvideox 5B": Dit(  # THUDM/CogVideoX-5b
        "cogvideox", "CogVideoXTransformer3DModel", {"transformer_blocks": 42}, {"num_attention_heads": 48}
    ),
}

# models of the families that have tests of their own, which nothing else may be taken for
OTHERS = {
    "flux": Dit(
        "flux",
        "FluxTransformer2DModel",
        {"transformer_blocks": 19, "single_transformer_blocks": 38},
        {"guidance_embeds": True},
    ),
    "sd3 medium": Dit("sd3", "SD3Transformer2DModel", {"transformer_blocks": 24}, {"num_attention_heads": 24}),
    "sd3.5 large": Dit("sd3", "SD3Transformer2DModel", {"transformer_blocks": 38}, {"num_attention_heads": 38}),
    "sd": Dit("sd", "UNet2DConditionModel", {}, {"cross_attention_dim": 768}),
    "sdxl": Dit(
        "sdxl",
        "UNet2DConditionModel",
        {},
        {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
        },
    ),
}


def linears(dit: Dit, pattern: str = ".*") -> dict[str, int]:
    """Return path -> inputs of the linear layers that match, at the full depth of the released model."""
    found = {}
    for path, layer in dit.build().named_modules():
        if isinstance(layer, nn.Linear) and re.fullmatch(pattern, path):
            blocks = next((name for name in dit.blocks if path.startswith(f"{name}.")), None)
            if blocks is None:
                found[path] = layer.in_features
            elif path.startswith(f"{blocks}.0."):
                rest = path.removeprefix(f"{blocks}.0.")
                found |= {f"{blocks}.{index}.{rest}": layer.in_features for index in range(dit.blocks[blocks])}
    return found
