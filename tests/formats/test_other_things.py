"""What is no LoRA is called by its name: keys of real model classes, and of the files that their tools write."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    FluxTransformer2DModel,
    MotionAdapter,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    T2IAdapter,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from tests.formats.test_peers import UNET
from tests.formats.test_sd3 import TINY
from vislora import formats
from vislora.errors import AdapterFileError
from vislora.formats.detect import parse_file
from vislora.formats.other_things import OTHER_THINGS, looks_like
from vislora.jobs.inspect import inspect

SDXL = {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": 32, "addition_time_embed_dim": 8}
FLUX = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
WIDTHS = {"joint_attention_dim": 8, "pooled_projection_dim": 8, "axes_dims_rope": (4, 6, 6)}
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
MODELS = {
    "a denoiser's weights (SD, diffusers names)": lambda: UNet2DConditionModel(**UNET),
    "a denoiser's weights (SDXL, diffusers names)": lambda: UNet2DConditionModel(**UNET, **SDXL),
    "a denoiser's weights (SD3, diffusers names)": lambda: SD3Transformer2DModel(**TINY),
    "a denoiser's weights (Flux, diffusers names)": lambda: FluxTransformer2DModel(**FLUX, **WIDTHS),
    "a denoiser's weights": lambda: PixArtTransformer2DModel(num_layers=1, num_attention_heads=2, attention_head_dim=8),
    "a VAE's weights": lambda: AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
    "a ControlNet": lambda: ControlNetModel.from_unet(UNet2DConditionModel(**UNET)),
    "a T2I-Adapter": lambda: T2IAdapter(channels=[8, 16], num_res_blocks=1, downscale_factor=8),
    "an AnimateDiff motion module": lambda: MotionAdapter(block_out_channels=(32, 32), motion_num_attention_heads=2),
    "a text encoder's weights (CLIP)": lambda: CLIPTextModel(CLIPTextConfig(**SMALL)),
    "a text encoder's weights (CLIP) ": lambda: CLIPTextModelWithProjection(CLIPTextConfig(**SMALL)),
    "an image encoder's weights": lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**SMALL)),
    "a text encoder's weights (T5)": lambda: T5EncoderModel(T5Config(num_layers=1)),
}
UNET_IN_CHECKPOINT = (
    "model.diffusion_model.input_blocks.0.0.weight",
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
    "model.diffusion_model.out.2.bias",
    "first_stage_model.encoder.conv_in.weight",
)
FLUX_BFL = (
    "double_blocks.0.img_attn.norm.key_norm.scale",
    "double_blocks.0.img_attn.qkv.weight",
    "single_blocks.0.linear1.weight",
    "guidance_in.in_layer.weight",
    "final_layer.linear.weight",
)
KEYS = {
    "a whole checkpoint of SD 1.x": (
        *UNET_IN_CHECKPOINT,
        "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
        "model_ema.decay",
        "betas",
    ),
    "a whole checkpoint of SD 2.x": (
        *UNET_IN_CHECKPOINT,
        "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight",
    ),
    "a whole checkpoint of SDXL": (
        *UNET_IN_CHECKPOINT,
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
        "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight",
    ),
    "a whole checkpoint of SDXL's refiner": (
        *UNET_IN_CHECKPOINT,
        "conditioner.embedders.0.model.transformer.resblocks.0.attn.in_proj_weight",
    ),
    "a whole checkpoint of SD3": (
        "model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight",
        "model.diffusion_model.x_embedder.proj.weight",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
        "first_stage_model.encoder.conv_in.weight",
    ),
    "a whole checkpoint of Flux": (
        *(f"model.diffusion_model.{key}" for key in FLUX_BFL),
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight",
        "vae.encoder.conv_in.weight",
    ),
    "a whole checkpoint": ("first_stage_model.encoder.conv_in.weight",),
    "a denoiser's weights (Flux, original names)": FLUX_BFL,
    "a denoiser's weights (SD3, original names)": ("joint_blocks.0.x_block.attn.qkv.weight", "pos_embed"),
    "a denoiser's weights (original names)": ("input_blocks.0.0.weight", "middle_block.0.in_layers.0.weight"),
    "a VAE's weights": ("encoder.down.0.block.0.conv1.weight", "decoder.conv_out.bias", "quant_conv.weight"),
    "a text encoder's weights (OpenCLIP)": ("transformer.resblocks.0.attn.in_proj_weight", "token_embedding.weight"),
    "a language model's weights": ("model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"),
    "a ControlNet-LLLite": (
        "lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.conditioning1.0.weight",
        "lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight",
        "lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.up.0.weight",
    ),
    "a ControlNet-LoRA (Stability AI)": (
        "input_blocks.0.0.bias",
        "input_blocks.1.0.in_layers.2.down",
        "input_blocks.1.0.in_layers.2.up",
        "input_hint_block.0.weight",
        "lora_controlnet",
        "zero_convs.0.0.weight",
    ),
    "a ControlNet": ("control_model.input_blocks.0.0.weight", "control_model.zero_convs.0.0.weight"),
    "a ControlNet ": ("controlnet_blocks.0.weight", "controlnet_x_embedder.weight", FLUX_BFL[1]),
    "an IP-Adapter": ("image_proj.proj.weight", "image_proj.norm.bias", "ip_adapter.1.to_k_ip.weight"),
    "an IP-Adapter ": (
        "double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight",
        "ip_adapter_proj_model.norm.bias",
    ),
    "an IP-Adapter with a LoRA for faces": (
        "image_proj.proj.0.weight",
        "ip_adapter.0.to_q_lora.down.weight",
        "ip_adapter.1.to_k_ip.weight",
    ),
    "a PhotoMaker": ("id_encoder.fuse_module.mlp1.fc1.weight", "lora_weights.unet.x.lora.down.weight"),
    "PuLID's weights": ("pulid_encoder.latents", "pulid_ca.0.to_q.weight"),
    "a T2I-Adapter": ("body.0.block1.weight", "body.2.in_conv.weight", "conv_in.weight"),
    "a T2I-Adapter for styles": ("style_embedding", "transformer_layes.0.attn.in_proj_weight", "ln_pre.weight"),
    "a GLIGEN's weights": ("input_blocks.1.1.transformer_blocks.0.fuser.alpha_attn", "position_net.linears.0.weight"),
    "an AnimateDiff motion LoRA": (
        "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.processor.to_q_lora."
        "down.weight",
    ),
    "a Custom Diffusion's attention weights": (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_custom_diffusion.weight",
    ),
    "a hypernetwork": ("320.0.linear.0.weight", "320.1.linear.0.bias", "1280.0.linear.0.weight"),
    "a Flux Redux image adapter": ("redux_up.weight", "redux_down.bias"),
    "a textual inversion embedding": ("emb_params",),
    "a textual inversion embedding ": ("string_to_param.*",),
    "a textual inversion embedding  ": ("<cat-toy>",),
    "a textual inversion embedding for SDXL": ("clip_g", "clip_l"),
    "a textual inversion embedding for SD3 or Flux": ("clip_l", "t5"),
    "an upscaler's weights": ("conv_first.weight", "body.0.rdb1.conv1.weight", "conv_up1.weight", "conv_last.bias"),
    "an upscaler's weights ": ("model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight", "model.10.bias"),
    "an upscaler's weights  ": ("params_ema.conv_last.weight", "params_ema.layers.0.residual_group.conv.weight"),
    "a LoRA for Stable Cascade, a model that vislora does not support": ("lora_prior_unet_down_blocks_0_0.alpha",),
    "a safetensors file without a LoRA in it": ("what.ever",),
    "a safetensors file without any tensor": (),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_the_weights_of_real_models(name):
    with torch.device("meta"):
        keys = list(MODELS[name]().state_dict())
    assert looks_like(keys) == name.strip()


@pytest.mark.parametrize("name", KEYS)
def test_the_files_of_tools(name):
    assert looks_like(KEYS[name]) == name.strip()


def test_every_name_of_the_table_is_tested():
    tested = {name.strip() for name in (*MODELS, *KEYS)}
    assert {name for name, _ in OTHER_THINGS} - tested == set()


@pytest.mark.parametrize("name", MODELS)
def test_a_models_own_weights_hold_no_module_of_an_adapter(name, tmp_path):
    with torch.device("meta"):
        keys = list(MODELS[name]().state_dict())
    save_file({key: torch.ones(1) for key in keys}, tmp_path / "a.safetensors")
    assert parse_file(tmp_path / "a.safetensors").modules == []


@pytest.mark.parametrize("name", [name for name in KEYS if KEYS[name]])
def test_load_and_inspect_say_so(name, tmp_path):
    save_file({key: torch.ones(1) for key in KEYS[name]}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError) as caught:
        formats.load(tmp_path / "a.safetensors")
    assert f"a.safetensors: this is {name.strip()}" in str(caught.value)
    summary = inspect(tmp_path / "a.safetensors")
    assert (summary.what, summary.format) == (name.strip(), None)


def test_pickles_are_named_too(tmp_path):
    """A1111's hypernetworks and embeddings are pickles with numbers and nested tables for names."""
    hypernetwork = {768: [{"linear.0.weight": torch.ones(2, 2)}, {"linear.0.weight": torch.ones(2, 2)}], "step": 10}
    embedding = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 768)}, "name": "cat"}
    checkpoint = {"state_dict": {key: torch.ones(1) for key in KEYS["a whole checkpoint of SD 1.x"]}, "global_step": 3}
    for content, name in (
        (hypernetwork, "a hypernetwork"),
        (embedding, "a textual inversion embedding"),
        (checkpoint, "a whole checkpoint of SD 1.x"),
    ):
        torch.save(content, tmp_path / "a.pt")
        assert inspect(tmp_path / "a.pt", allow_pickle=True).what == name
