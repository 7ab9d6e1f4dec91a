"""The name tables against the real architectures, built without memory on the meta device."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    ChromaTransformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from vislora.formats.kohya import place
from vislora.formats.names import FAMILY_NAMES, Found, Share, canonical, component_of, find_text, flat_prefix

SD3_MEDIUM = {"caption_projection_dim": 1536, "num_attention_heads": 24, "num_layers": 4, "joint_attention_dim": 4096}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
REFINER = {
    "block_out_channels": (384, 768, 1536, 1536),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": 4,
    "attention_head_dim": (6, 12, 24, 24),
    "cross_attention_dim": 1280,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2560,
}
FLUX = {"num_layers": 2, "num_single_layers": 2, "guidance_embeds": True}
SD35 = {**SD3_MEDIUM, "dual_attention_layers": (0, 1, 2), "qk_norm": "rms_norm"}
TINY_UNET = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 16,
}
MODELS = {
    "sd15": ("sd", "denoiser", lambda: UNet2DConditionModel(cross_attention_dim=768)),
    "sd21": ("sd", "denoiser", lambda: UNet2DConditionModel(cross_attention_dim=1024, use_linear_projection=True)),
    "sdxl": ("sdxl", "denoiser", lambda: UNet2DConditionModel(**SDXL)),
    "sdxl refiner": ("sdxl-refiner", "denoiser", lambda: UNet2DConditionModel(**REFINER)),
    "tiny": ("sd", "denoiser", lambda: UNet2DConditionModel(**TINY_UNET, time_cond_proj_dim=8)),
    "sd3": ("sd3", "denoiser", lambda: SD3Transformer2DModel(**SD3_MEDIUM)),
    "sd3.5": ("sd3", "denoiser", lambda: SD3Transformer2DModel(**SD35)),
    "flux": ("flux", "denoiser", lambda: FluxTransformer2DModel(**FLUX)),
    "flux control": ("flux", "denoiser", lambda: FluxTransformer2DModel(**{**FLUX, "in_channels": 128})),
    "flux schnell": ("flux", "denoiser", lambda: FluxTransformer2DModel(**{**FLUX, "guidance_embeds": False})),
    "chroma": ("chroma", "denoiser", lambda: ChromaTransformer2DModel(num_layers=2, num_single_layers=2)),
    "clip_l": ("sd", "te:clip_l", lambda: CLIPTextModel(CLIPTextConfig())),
    "clip_l of sd3": ("sd3", "te:clip_l", lambda: CLIPTextModelWithProjection(CLIPTextConfig())),
    "clip_g": ("sd3", "te:clip_g", lambda: CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=1280))),
    "clip_g of sdxl": ("sdxl", "te:clip_g", lambda: CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=1280))),
    "t5": ("sd3", "te:t5", lambda: T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", num_layers=2))),
    "t5 of old": ("sd3", "te:t5", lambda: T5EncoderModel(T5Config(num_layers=2))),
}
LAYERS = (nn.Linear, nn.Conv2d, nn.Embedding, nn.LayerNorm, nn.GroupNorm)


def find_flat(raw_name: str, family: str) -> tuple[str, list[Found]]:
    prefix = flat_prefix(raw_name)
    if prefix is None or prefix.startswith("lora_te"):
        return find_text(raw_name) or ("", [])
    return "denoiser", FAMILY_NAMES[family].tables["denoiser"].find_flat(raw_name.removeprefix(prefix))


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_of_the_real_architectures_has_a_name_and_comes_back(name):
    family, component, build = MODELS[name]
    with torch.device("meta"):
        model = build()
    paths = [canonical(path) for path, layer in model.named_modules() if isinstance(layer, LAYERS)]
    # SD3's own LayerNorms have no weights; those with weights are in the table
    weightless = {canonical(path) for path, item in model.named_modules() if not list(item.parameters(recurse=False))}
    paths = [path for path in paths if path not in weightless]
    assert paths
    for path in paths:
        stored = place(component, path, family)
        assert stored is not None, path
        found_component, leads = find_flat(stored.name, family)
        # CLIP-L of SD3 and SD alike: the prefix differs, the component is the same
        assert found_component == component, stored.name
        assert path in [lead.path for lead in leads]
        assert component_of(FAMILY_NAMES[family].folders[component], path) == component


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name][1] == "denoiser"])
def test_no_two_layers_share_a_stored_name(name):
    family, _, build = MODELS[name]
    with torch.device("meta"):
        model = build()
    paths = [path for path, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    places = [FAMILY_NAMES[family].tables["denoiser"].place(path) for path in paths]
    assert len({(item.name.replace(".", "_"), item.part) for item in places}) == len(paths)


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_down_blocks_0_attentions_0_to_nothing",
        "lora_unet_down_blocks_00_resnets_0_conv1",
        "lora_unet_down_blocks_x_resnets_0_conv1",
        "lora_unet_input_blocks_3_0_in_layers_2",
        "lora_unet_input_blocks_4_2_proj_in",
        "lora_unet_middle_block_2_proj_in",
        "lora_unet_output_blocks_4_2_conv",
        "lora_unet_input_blocks_0_1_proj_in",
        "lora_unet_input_blocks_9999999999_0_in_layers_2",
        "lora_unet_input_blocks_#_0_in_layers_2",
        "lora_te9_text_model_encoder_layers_0_mlp_fc1",
        "",
    ],
)
def test_unknown_names_are_not_guessed(name):
    assert not any(find_flat(name, family)[1] for family in FAMILY_NAMES)


def test_fused_names_lead_to_all_their_members():
    component, leads = find_flat("lora_unet_joint_blocks_7_context_block_attn_qkv", "sd3")
    assert component == "denoiser"
    assert [(lead.path.rpartition(".")[2], lead.part) for lead in leads] == [
        ("add_q_proj", Share(0)),
        ("add_k_proj", Share(1)),
        ("add_v_proj", Share(2)),
    ]
