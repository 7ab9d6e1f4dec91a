"""ComfyUI's generic files, and the same dotted names under other prefixes or none."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.formats.format_helpers import materialise, module, same_tensors
from vislora import formats
from vislora.algebra.compare import compare
from vislora.config.convert import ConvertConfig
from vislora.errors import AdapterFileError, ConfigError
from vislora.formats.adapter_file import AdapterFile

QKV = "joint_blocks.0.x_block.attn.qkv"
CLIP = "text_model.encoder.layers.0.self_attn.q_proj"
T5 = "encoder.block.0.layer.0.SelfAttention.q"
PREFIXES = ("diffusion_model.", "", "transformer.", "base_model.model.", "unet.base_model.model.")


def pair(name: str, out: int, inputs: int, rank: int = 2, halves: str = "lora_A lora_B") -> dict[str, Tensor]:
    down, up = halves.split()
    seeded = torch.Generator().manual_seed(len(name))
    return {
        f"{name}.{down}.weight": torch.randn(rank, inputs, generator=seeded),
        f"{name}.{up}.weight": torch.randn(out, rank, generator=seeded),
    }


def sd3_listing(tmp_path) -> dict[str, Tensor]:
    return materialise("kohya_sd3_medium.json", tmp_path / "kohya.safetensors")


def test_sd3_of_kohya_goes_to_comfy_and_back_bit_for_bit(tmp_path):
    tensors = sd3_listing(tmp_path)
    source = formats.load(tmp_path / "kohya.safetensors")
    formats.save(source, tmp_path / "comfy.safetensors", "comfy")
    found = load_file(tmp_path / "comfy.safetensors")
    assert len(found) == len(tensors)
    assert {key.split(".")[0] for key in found} == {"diffusion_model", "text_encoders"}
    assert found[f"diffusion_model.{QKV}.lora_B.weight"].shape[0] == 288
    assert found[f"diffusion_model.{QKV}.alpha"].dtype == torch.float32
    assert f"text_encoders.clip_g.transformer.{CLIP}.lora_A.weight" in found
    read = formats.load(tmp_path / "comfy.safetensors")
    assert (read.family, read.source.format, read.extras) == ("sd3", "comfy", {})
    assert compare(source, read).exact
    formats.save(read, tmp_path / "back.safetensors", "kohya")
    same_tensors(tmp_path / "back.safetensors", tensors)
    formats.save(formats.load(tmp_path / "back.safetensors"), tmp_path / "again.safetensors", "comfy")
    same_tensors(tmp_path / "again.safetensors", found)


@pytest.mark.parametrize("halves", ["lora_A lora_B", "lora_down lora_up", "lora_A.default lora_B.default"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_original_names_lead_to_the_same_layers_under_every_prefix(prefix, halves, tmp_path):
    save_file(pair(f"{prefix}{QKV}", 24, 8, halves=halves), tmp_path / "a.safetensors")
    read = formats.load(tmp_path / "a.safetensors")
    assert [item.path for item in read.modules] == [f"transformer_blocks.0.attn.to_{name}" for name in "qkv"]
    assert (read.family, {item.component for item in read.modules}) == ("sd3", {"denoiser"})
    down, up = pair(f"{prefix}{QKV}", 24, 8, halves=halves).values()
    whole = up.double() @ down.double()
    assert torch.equal(torch.cat([read.delta(item) for item in read.modules]), whole)
    assert read.extras == {}


TEXTS = {
    f"text_encoders.clip_l.transformer.{CLIP}": ("te:clip_l", CLIP),
    f"text_encoders.clip_g.transformer.{CLIP}": ("te:clip_g", CLIP),
    f"text_encoders.clip_h.transformer.{CLIP}": ("te:clip_l", CLIP),
    f"text_encoders.t5xxl.transformer.{T5}": ("te:t5", T5),
    f"text_encoders.umt5xxl.transformer.{T5}": ("te:t5", T5),
    "text_encoders.qwen25_7b.transformer.model.layers.3.mlp.up_proj": ("te:llm", "model.layers.3.mlp.up_proj"),
    "text_encoders.transformer.model.layers.3.mlp.up_proj": ("te:llm", "model.layers.3.mlp.up_proj"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_encoders_are_told_by_their_layers_and_comfys_name(name, tmp_path):
    save_file(pair(name, 8, 8), tmp_path / "a.safetensors")
    item = formats.load(tmp_path / "a.safetensors").modules[0]
    assert (item.component, item.path) == TEXTS[name]


def test_alpha_dora_and_products_under_comfys_names(tmp_path):
    proj = "diffusion_model.joint_blocks.0.x_block.attn.proj"
    tensors = {**pair(proj, 8, 8), f"{proj}.alpha": torch.tensor(1.0), f"{proj}.dora_scale": torch.rand(8, 1)}
    product = "diffusion_model.joint_blocks.0.x_block.mlp.fc1"
    tensors |= {f"{product}.lokr_w1": torch.randn(2, 2), f"{product}.lokr_w2": torch.randn(8, 4)}
    save_file(tensors, tmp_path / "a.safetensors")
    read = formats.load(tmp_path / "a.safetensors")
    assert [(item.algo, item.scale) for item in read.modules] == [("lora", 0.5), ("lokr", 1.0)]
    expected = torch.kron(tensors[f"{product}.lokr_w1"].double(), tensors[f"{product}.lokr_w2"].double())
    assert torch.equal(read.delta("transformer_blocks.0.ff.net.0.proj"), expected)
    formats.save(read, tmp_path / "b.safetensors", "comfy")
    found = load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())


def test_names_that_nobody_knows_are_told(tmp_path):
    tensors = pair(f"diffusion_model.{QKV}", 24, 8) | pair("diffusion_model.what.ever", 8, 8)
    save_file(tensors, tmp_path / "a.safetensors")
    read = formats.load(tmp_path / "a.safetensors")
    assert [item.raw_name for item in read.modules if item.path is None] == ["diffusion_model.what.ever"]
    assert any("diffusion_model.what.ever" in note for note in read.notes)
    with pytest.raises(AdapterFileError, match="no model family has"):
        formats.save(read, tmp_path / "b.safetensors", "kohya")


def test_what_a_model_of_diffusers_saved_has_its_alpha_in_the_header(tmp_path):
    tensors = pair("transformer_blocks.0.attn.to_q", 8, 8) | pair("transformer_blocks.0.attn.to_k", 8, 8)
    config = {"r": 2, "lora_alpha": 6, "alpha_pattern": {"to_k": 3}}
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt", "lora_adapter_metadata": json.dumps(config)})
    read = formats.load(tmp_path / "a.safetensors")
    assert read.source.format == "bare"
    assert {item.path[-4:]: item.scale for item in read.modules} == {"to_q": 3.0, "to_k": 1.5}


@pytest.mark.parametrize("other", ["lora_unet_joint_blocks_0_x_block_attn_qkv", f"transformer.{QKV}", QKV])
def test_a_layer_under_two_names_is_taken_once_and_must_be_the_same(other, tmp_path):
    one = pair(f"diffusion_model.{QKV}", 24, 8)
    names = pair(other, 24, 8, halves="lora_down lora_up")
    two = {key: tensor.clone() for key, tensor in zip(names, one.values(), strict=True)}
    save_file(one | two, tmp_path / "a.safetensors")
    read = formats.load(tmp_path / "a.safetensors")
    assert len(read.modules) == 3
    assert any("repeats" in note for note in read.notes)
    two[f"{other}.lora_up.weight"] += 1
    save_file(one | two, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError) as caught:
        formats.load(tmp_path / "a.safetensors")
    assert other in str(caught.value)
    assert f"diffusion_model.{QKV}" in str(caught.value)


def test_the_second_expert_of_wan_is_a_component_of_its_own(tmp_path):
    name = "blocks.0.attn1.to_q"
    tensors = pair(f"transformer.{name}", 8, 8) | {k: t + 1 for k, t in pair(f"transformer_2.{name}", 8, 8).items()}
    save_file(tensors, tmp_path / "a.safetensors")
    read = formats.load(tmp_path / "a.safetensors")
    assert {item.component for item in read.modules} == {"denoiser", "denoiser_2"}
    formats.save(read, tmp_path / "b.safetensors", "diffusers")
    same_tensors(tmp_path / "b.safetensors", tensors)


def block_diagonal(rank: int, rows: int) -> Tensor:
    up = torch.zeros(3 * rows, 3 * rank)
    for index in range(3):
        up[index * rows : (index + 1) * rows, index * rank : (index + 1) * rank] = torch.randn(rows, rank)
    return up


@pytest.mark.parametrize(("alpha", "weak"), [(4.0, True), (12.0, False)])
def test_fused_layers_that_split_qkv_saved_too_weak_are_told(alpha, weak, tmp_path):
    name, plain = "lora_unet_joint_blocks_0_x_block_attn_qkv", "lora_unet_joint_blocks_0_x_block_attn_proj"
    tensors = {f"{name}.lora_down.weight": torch.randn(12, 8), f"{name}.lora_up.weight": block_diagonal(4, 8)}
    tensors |= {f"{name}.alpha": torch.tensor(alpha), f"{plain}.alpha": torch.tensor(4.0)}
    save_file(tensors | pair(plain, 8, 8, 4, "lora_down lora_up"), tmp_path / "a.safetensors")
    read = formats.load(tmp_path / "a.safetensors")
    assert {item.scale for item in read.modules if item.group} == {alpha / 12}
    assert any("split_qkv" in note and name in note for note in read.notes) == weak
    formats.save(read, tmp_path / "b.safetensors", "diffusers")
    assert compare(read, formats.load(tmp_path / "b.safetensors")).exact


def test_files_for_mochi_have_no_weight_at_the_end(tmp_path):
    tensors = pair("transformer_blocks.0.attn.to_q", 8, 8)
    save_file({key.removesuffix(".weight"): tensor for key, tensor in tensors.items()}, tmp_path / "a.safetensors")
    read = formats.load(tmp_path / "a.safetensors")
    assert [sorted(item.tensors) for item in read.modules] == [["down", "up"]]


def test_other_names_of_the_format(tmp_path):
    save_file(pair(f"diffusion_model.{QKV}", 24, 8), tmp_path / "a.safetensors")
    read = formats.load(tmp_path / "a.safetensors")
    for name in ("comfy", "comfyui", "bfl", "ai-toolkit"):
        formats.save(read, tmp_path / f"{name}.safetensors", name)
        assert ConvertConfig.of({"source": "a", "destination": "b", "to": name}).to == "comfy"
    assert len({path.read_bytes() for path in tmp_path.glob("*.safetensors")}) == 2
    with pytest.raises(ConfigError, match="unknown format 'comfi'"):
        formats.save(read, tmp_path / "b.safetensors", "comfi")


def test_sd2_has_clip_h_where_sd1_has_clip_l(tmp_path):
    for width, encoder in ((768, "clip_l"), (1024, "clip_h")):
        path = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
        modules = [module(path, shape=(320, width)), module(CLIP, "te:clip_l", shape=(8, width))]
        adapter = AdapterFile(modules=modules, family="sd")
        formats.save(adapter, tmp_path / "a.safetensors", "comfy")
        found = load_file(tmp_path / "a.safetensors")
        assert "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.lora_A.weight" in found
        assert f"text_encoders.{encoder}.transformer.{CLIP}.lora_A.weight" in found
        assert compare(adapter, formats.load(tmp_path / "a.safetensors")).exact


def test_a_models_own_weights_are_not_taken_for_an_adapter(tmp_path):
    vector = torch.ones(4)
    save_file({"decoder.up.0.alpha": vector, "decoder.conv_in.weight": vector.clone()}, tmp_path / "vae.safetensors")
    norm = "double_blocks.0.img_attn.norm.key_norm.scale"
    save_file({norm: vector, "double_blocks.0.img_attn.qkv.weight": vector.clone()}, tmp_path / "flux.safetensors")
    for name, thing in (("vae", "a VAE"), ("flux", "a denoiser's weights")):
        with pytest.raises(AdapterFileError, match=thing):
            formats.load(tmp_path / f"{name}.safetensors")
    tensors = pair(f"diffusion_model.{QKV}", 24, 8)
    save_file({**tensors, "decoder.0.alpha": vector}, tmp_path / "both.safetensors")
    assert set(formats.load(tmp_path / "both.safetensors").extras) == {"decoder.0.alpha"}


def test_flat_names_with_two_underscores(tmp_path):
    """kohya_ss' fork that trains Wan-Fun writes `lora_unet__` where others have `lora_unet_`."""
    save_file(pair("lora_unet__joint_blocks_0_x_block_attn_qkv", 24, 8), tmp_path / "a.safetensors")
    read = formats.load(tmp_path / "a.safetensors")
    assert [item.path for item in read.modules] == [f"transformer_blocks.0.attn.to_{name}" for name in "qkv"]
