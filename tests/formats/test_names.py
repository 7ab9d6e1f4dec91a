"""The name tables against the real architectures, built without memory on the meta device."""

from __future__ import annotations

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from vislora.formats.kohya import place
from vislora.formats.names import FAMILY_NAMES, canonical, component_of, find_flat

SD3_MEDIUM = {"caption_projection_dim": 1536, "num_attention_heads": 24, "num_layers": 4, "joint_attention_dim": 4096}
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
    "tiny": ("sd", "denoiser", lambda: UNet2DConditionModel(**TINY_UNET, time_cond_proj_dim=8)),
    "sd3": ("sd3", "denoiser", lambda: SD3Transformer2DModel(**SD3_MEDIUM)),
    "sd3.5": ("sd3", "denoiser", lambda: SD3Transformer2DModel(**SD35)),
    "clip_l": ("sd", "te:clip_l", lambda: CLIPTextModel(CLIPTextConfig())),
    "clip_l of sd3": ("sd3", "te:clip_l", lambda: CLIPTextModelWithProjection(CLIPTextConfig())),
    "clip_g": ("sd3", "te:clip_g", lambda: CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=1280))),
    "t5": ("sd3", "te:t5", lambda: T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", num_layers=2))),
    "t5 of old": ("sd3", "te:t5", lambda: T5EncoderModel(T5Config(num_layers=2))),
}
LAYERS = (nn.Linear, nn.Conv2d, nn.Embedding, nn.LayerNorm, nn.GroupNorm)


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
        assert find_flat(stored.name) is not None, stored.name
        names, found_component, leads = find_flat(stored.name)
        # CLIP-L of SD3 and SD alike: the prefix differs, the component is the same
        assert (names.family, found_component) == (family, component)
        assert path in [lead.path for lead in leads]
        assert component_of(names.folders[component], path) == component


def test_no_two_layers_share_a_stored_name():
    for family, names in FAMILY_NAMES.items():
        with torch.device("meta"):
            model = MODELS["sd15" if family == "sd" else "sd3.5"][2]()
        paths = [path for path, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
        places = [names.tables["denoiser"].place(path) for path in paths]
        assert len({(item.name.replace(".", "_"), item.part) for item in places}) == len(paths)


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_down_blocks_0_attentions_0_to_nothing",
        "lora_unet_down_blocks_00_resnets_0_conv1",
        "lora_unet_down_blocks_x_resnets_0_conv1",
        "lora_unet_input_blocks_4_1_proj_in",
        "lora_te9_text_model_encoder_layers_0_mlp_fc1",
        "",
    ],
)
def test_unknown_names_are_not_guessed(name):
    assert find_flat(name) is None


def test_fused_names_lead_to_all_their_members():
    _, component, leads = find_flat("lora_unet_joint_blocks_7_context_block_attn_qkv")
    assert component == "denoiser"
    assert [(lead.path.rpartition(".")[2], lead.part) for lead in leads] == [
        ("add_q_proj", (0, 3)),
        ("add_k_proj", (1, 3)),
        ("add_v_proj", (2, 3)),
    ]
