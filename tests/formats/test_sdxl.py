"""UNets in their original names (LDM, SGM) against diffusers' conversion of whole checkpoints, and SDXL files."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.formats.format_helpers import header_only, listed_shapes, materialise, module, same_tensors
from tests.formats.test_names import REFINER, SDXL
from vislora import formats
from vislora.formats.adapter_file import AdapterFile
from vislora.formats.detect import parse_file
from vislora.formats.names import FAMILY_NAMES, canonical

LISTING = "kohya_sdxl_lora_c3lier.json"
UNETS = {
    "sd15": ("sd", {"cross_attention_dim": 768}),
    "sd21": ("sd", {"cross_attention_dim": 1024, "use_linear_projection": True}),
    "sdxl": ("sdxl", SDXL),
    "refiner": ("sdxl-refiner", REFINER),
}
# where LDM and SGM have the upsampler: behind the attention, or in its place where there is none
UPSAMPLERS = {
    "sd15": ["output_blocks.2.1.conv", "output_blocks.5.2.conv", "output_blocks.8.2.conv"],
    "sdxl": ["output_blocks.2.2.conv", "output_blocks.5.2.conv"],
    "refiner": ["output_blocks.2.1.conv", "output_blocks.5.2.conv", "output_blocks.8.2.conv"],
}


def unet(config: dict) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**config)


@pytest.mark.parametrize("name", UNETS)
def test_original_names_of_unets_agree_with_the_conversion_of_whole_checkpoints(name):
    """Diffusers only renames: with every weight's own name in its place, it must find each where it belongs."""
    family, config = UNETS[name]
    table = FAMILY_NAMES[family].tables["denoiser"]
    model = unet(config)
    original = {}
    for key in model.state_dict():
        path, _, kind = key.rpartition(".")
        stored = table.place(path).name
        assert [lead.path for lead in table.find_dotted(stored)] == [path]
        assert [lead.path for lead in table.find_flat(stored.replace(".", "_"))] == [path]
        original[f"model.diffusion_model.{stored}.{kind}"] = key
    assert len(original) == len(model.state_dict())
    found = convert_ldm_unet_checkpoint(original, model.config)
    assert found == {key: key for key in model.state_dict()}
    places = [table.place(path).name for path, _ in model.named_modules() if path.endswith("upsamplers.0.conv")]
    assert places == UPSAMPLERS.get(name, UPSAMPLERS["sd15"])


def test_every_layer_of_kohyas_files_is_one_of_the_real_models(tmp_path):
    parsed = parse_file(header_only(listed_shapes(LISTING), tmp_path / "a.safetensors"))
    assert (parsed.family, parsed.format, len(parsed.modules)) == ("sdxl", "kohya", 788 + 72 + 192)
    with torch.device("meta"):
        clip_l = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072))
        big = CLIPTextConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32)
        clip_g = CLIPTextModelWithProjection(big)
    models = {"denoiser": unet(SDXL), "te:clip_l": clip_l, "te:clip_g": clip_g}
    shapes = {
        (component, canonical(name.removesuffix(".weight"))): weight.shape
        for component, model in models.items()
        for name, weight in model.named_parameters()
    }
    found = {(item.component, item.path): item for item in parsed.modules}
    assert len(found) == len(parsed.modules)
    for place, item in found.items():
        outputs, inputs = item.refs["up"].shape[0], item.refs["down"].shape[1:]
        assert (outputs, *inputs) == tuple(shapes[place]), place


def test_names_of_the_reference_tree_and_mixtures_come_to_the_same(tmp_path):
    tensors = materialise(LISTING, tmp_path / "a.safetensors", shrink=64)
    source = formats.load(tmp_path / "a.safetensors")
    unet_names = {item.raw_name: item.path for item in source.modules if item.component == "denoiser"}
    for prefix, every in (("lora_unet_", 1), ("lycoris_", 1), ("lora_unet_", 2)):
        chosen = dict(list(unet_names.items())[::every])
        renamed = {}
        for key, tensor in tensors.items():
            name, _, slot = key.partition(".")
            flat = prefix + chosen[name].replace(".", "_") if name in chosen else name
            renamed[f"{flat}.{slot}"] = tensor
        save_file(renamed, tmp_path / "b.safetensors")
        read = formats.load(tmp_path / "b.safetensors")
        assert read.family == "sdxl"
        assert {item.path for item in read.modules} == {item.path for item in source.modules}
        formats.save(read, tmp_path / "c.safetensors", "kohya")
        same_tensors(tmp_path / "c.safetensors", tensors)


def test_the_projection_of_the_second_text_encoder_is_known(tmp_path):
    tensors = {
        f"{name}.{slot}": torch.randn(shape)
        for name in ("lora_te2_text_projection", "lora_unet_label_emb_0_0")
        for slot, shape in (("lora_down.weight", (2, 8)), ("lora_up.weight", (8, 2)), ("alpha", ()))
    }
    save_file(tensors, tmp_path / "a.safetensors")
    read = formats.load(tmp_path / "a.safetensors")
    assert [(item.component, item.path) for item in read.modules] == [
        ("te:clip_g", "text_projection"),
        ("denoiser", "add_embedding.linear_1"),
    ]
    formats.save(read, tmp_path / "b.safetensors", "diffusers")
    assert "text_encoder_2.text_projection.lora_A.weight" in load_file(tmp_path / "b.safetensors")
    formats.save(formats.load(tmp_path / "b.safetensors"), tmp_path / "c.safetensors", "kohya")
    same_tensors(tmp_path / "c.safetensors", tensors)


SHOWN = {
    "nothing": ([("down_blocks.1.attentions.0.proj_in", "denoiser", 16)], "sd"),
    "a deep block": ([("mid_block.attentions.0.transformer_blocks.9.attn1.to_q", "denoiser", 16)], "sdxl"),
    "CLIP-G": (
        [("conv_in", "denoiser", 16), ("text_model.encoder.layers.0.mlp.fc1", "te:clip_g", 16)],
        "sdxl",
    ),
    "CLIP-L": ([("conv_in", "denoiser", 16), ("text_model.encoder.layers.0.mlp.fc1", "te:clip_l", 16)], "sd"),
    "a wide context": ([("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", "denoiser", 2048)], "sdxl"),
    "SD's context": ([("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", "denoiser", 768)], "sd"),
    "the refiner's": (
        [("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", "denoiser", 1280)],
        "sdxl-refiner",
    ),
    "attention where SD has none": ([("up_blocks.0.attentions.0.proj_in", "denoiser", 1280)], "sdxl"),
}


@pytest.mark.parametrize("name", SHOWN)
def test_what_an_adapter_shows_tells_its_family(name, tmp_path):
    layers, family = SHOWN[name]
    modules = [module(path, component, shape=(8, inputs)) for path, component, inputs in layers]
    formats.save(AdapterFile(modules=modules, family="sdxl"), tmp_path / "a.safetensors", "diffusers")
    assert parse_file(tmp_path / "a.safetensors").family == family
