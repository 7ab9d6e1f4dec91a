"""Flux and Chroma: BFL's fused layers against diffusers' separate ones, whole checkpoints and LoRA files alike."""

from __future__ import annotations

import pytest
import torch
from diffusers import ChromaTransformer2DModel, FluxPipeline, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_chroma_transformer_checkpoint_to_diffusers,
    convert_flux_transformer_checkpoint_to_diffusers,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.formats.format_helpers import header_only, listed_shapes, module, same_tensors
from vislora import formats
from vislora.algebra.compare import compare
from vislora.formats.adapter_file import AdapterFile
from vislora.formats.detect import parse_file
from vislora.formats.kohya import place
from vislora.formats.names import FAMILY_NAMES

LISTING = "kohya_flux_lora_te1_te3_indims.json"
# diffusers' converter takes no other width than the real one; inputs are cut to a few, for no layer is split by them
INPUTS = 4
MODELS = {
    "flux": (
        FluxTransformer2DModel,
        {"num_layers": 2, "num_single_layers": 2, "guidance_embeds": True},
        convert_flux_transformer_checkpoint_to_diffusers,
    ),
    "chroma": (
        ChromaTransformer2DModel,
        {"num_layers": 2, "num_single_layers": 2},
        convert_chroma_transformer_checkpoint_to_diffusers,
    ),
}


def real_shapes(family: str, **more: object) -> dict[str, torch.Size]:
    build, config, _ = MODELS[family]
    with torch.device("meta"):
        return {name: weight.shape for name, weight in build(**config, **more).named_parameters()}


def original_weights(family: str, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Return zeros under BFL's names for every weight of the diffusers model; fused ones have all their rows."""
    weights: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        path, _, kind = name.rpartition(".")
        stored = FAMILY_NAMES[family].tables["denoiser"].place(path)
        assert stored is not None, name
        kind = (
            "scale" if "norm.query_norm" in stored.name or "norm.key_norm" in stored.name or "norms" in path else kind
        )
        key = f"{stored.name}.{kind}"
        rows = shape[0] + (len(weights[key]) if key in weights else 0)
        weights[key] = torch.zeros(rows, *[INPUTS for _ in shape[1:]], dtype=torch.float64)
    return weights


@pytest.mark.parametrize("family", MODELS)
def test_names_and_row_order_agree_with_the_conversion_of_whole_checkpoints(family, tmp_path):
    """Give every original layer a LoRA; its deltas, added in kohya's names, must be diffusers' conversion of them."""
    shapes = real_shapes(family)
    original = original_weights(family, shapes)
    halves = {}
    for name in [name for name, weight in original.items() if weight.dim() == 2]:
        down, up = torch.randn(2, INPUTS), torch.randn(len(original[name]), 2)
        flat = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        halves |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
        original[name] = up.double() @ down.double()
    save_file(halves, tmp_path / "a.safetensors")
    expected = MODELS[family][2](dict(original))
    assert expected.keys() == shapes.keys()
    read = formats.load(tmp_path / "a.safetensors")
    assert read.family == family
    linear = {name for name, shape in shapes.items() if len(shape) == 2 and name.endswith(".weight")}
    assert {f"{item.path}.weight" for item in read.modules} == linear
    for item in read.modules:
        assert torch.equal(read.delta(item), expected[f"{item.path}.weight"]), item.path
    formats.save(read, tmp_path / "b.safetensors", "kohya")
    found = {key: tensor for key, tensor in load_file(tmp_path / "b.safetensors").items() if "alpha" not in key}
    assert found.keys() == halves.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in halves.items())


def test_every_layer_of_kohyas_files_is_one_of_the_real_model(tmp_path):
    parsed = parse_file(header_only(listed_shapes(LISTING), tmp_path / "a.safetensors"))
    assert (parsed.family, parsed.format) == ("flux", "kohya")
    assert all(item.path for item in parsed.modules)
    found: dict[str, int] = {}
    for item in parsed.modules:
        found[item.component] = found.get(item.component, 0) + 1
    blocks = 19 * (2 + 3 + 3 + 2 + 4) + 38 * (1 + 4 + 1)
    assert found == {"denoiser": blocks + 8, "te:clip_l": 72, "te:t5": 24 * 7}
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    shapes = {name.removesuffix(".weight"): tuple(weight.shape) for name, weight in model.named_parameters()}
    for item in parsed.modules:
        if item.component == "denoiser":
            assert (item.refs["up"].shape[0], item.refs["down"].shape[1]) == shapes[item.path], item.path


def test_each_layer_agrees_with_diffusers_own_conversion_of_lora_files(tmp_path):
    """Its keys for what is outside the blocks lack `transformer.` and their alphas, so that those have alpha = rank."""
    outside = {
        "img_in": 3072,
        "time_in_in_layer": 3072,
        "final_layer_linear": 64,
        "final_layer_adaLN_modulation_1": 6144,
    }
    tensors = {}
    for name, rows in outside.items():
        tensors |= lora(f"lora_unet_{name}", rows, alpha=4.0)
    for name, rows in {"img_attn_qkv": 9216, "txt_attn_qkv": 9216, "img_attn_proj": 3072, "txt_mlp_0": 12288}.items():
        tensors |= lora(f"lora_unet_double_blocks_0_{name}", rows, alpha=2.0)
    tensors |= lora("lora_unet_double_blocks_0_img_mod_lin", 18432, 8.0) | lora(
        "lora_unet_double_blocks_0_txt_mod_lin", 18432, 2.0
    )
    for name, rows in {"linear1": 21504, "linear2": 3072, "modulation_lin": 9216}.items():
        tensors |= lora(f"lora_unet_single_blocks_0_{name}", rows, alpha=1.0)
    save_file(tensors, tmp_path / "a.safetensors")
    theirs = FluxPipeline.lora_state_dict({key: tensor.clone() for key, tensor in tensors.items()})
    ours = formats.load(tmp_path / "a.safetensors")
    pairs = {key.removeprefix("transformer.").removesuffix(".lora_A.weight"): key for key in theirs if "lora_A" in key}
    assert pairs.keys() == {item.path for item in ours.modules}
    for item in ours.modules:
        down = theirs[pairs[item.path]].double()
        up = theirs[pairs[item.path].replace("lora_A", "lora_B")].double()
        torch.testing.assert_close(ours.delta(item), up @ down, rtol=1e-5, atol=1e-6)


def lora(name: str, rows: int, alpha: float, rank: int = 4) -> dict[str, Tensor]:
    down, up = torch.randn(rank, INPUTS), torch.randn(rows, rank)
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(alpha)}


def test_members_of_linear1_that_were_trained_apart_become_one_exactly(tmp_path):
    """Flux's linear1 has q, k, v and four times as many rows of the MLP; here k was not trained."""
    block = "single_transformer_blocks.3"
    modules = [
        module(f"{block}.attn.to_q", rank=2, alpha=1.0, shape=(16, 12)),
        module(f"{block}.attn.to_v", rank=3, alpha=1.5, shape=(16, 12)),
        module(f"{block}.proj_mlp", rank=2, alpha=1.0, shape=(64, 12)),
    ]
    adapter = AdapterFile(modules=modules, family="flux")
    formats.save(adapter, tmp_path / "a.safetensors", "kohya")
    found = load_file(tmp_path / "a.safetensors")
    assert found["lora_unet_single_blocks_3_linear1.lora_up.weight"].shape == (7 * 16, 7)
    read = formats.load(tmp_path / "a.safetensors")
    assert read.family == "flux"
    assert compare(adapter, read).exact


def test_onetrainers_name_of_the_t5_and_flattened_reference_names(tmp_path):
    t5 = "encoder_block_0_layer_0_SelfAttention_q"
    tensors = lora(f"lora_te2_{t5}", 8, 2.0) | lora("lora_te1_text_model_encoder_layers_0_mlp_fc1", 8, 2.0)
    tensors |= lora("lora_transformer_single_transformer_blocks_0_proj_mlp", 64, 2.0)
    tensors |= lora("lora_transformer_norm_out_linear", 8, 2.0)
    save_file(tensors, tmp_path / "a.safetensors")
    read = formats.load(tmp_path / "a.safetensors")
    assert (read.family, {item.component for item in read.modules}) == ("flux", {"te:t5", "te:clip_l", "denoiser"})
    norm = read.find("norm_out.linear")  # in diffusers' order already
    assert torch.equal(norm.tensors["up"], tensors["lora_transformer_norm_out_linear.lora_up.weight"])
    formats.save(read, tmp_path / "b.safetensors", "diffusers")
    keys = set(load_file(tmp_path / "b.safetensors"))
    assert "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight" in keys
    assert "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight" in keys
    again = formats.load(tmp_path / "b.safetensors")
    assert {item.component for item in again.modules} == {"te:t5", "te:clip_l", "denoiser"}
    formats.save(again, tmp_path / "c.safetensors", "kohya")
    assert f"lora_te3_{t5}.lora_down.weight" in load_file(tmp_path / "c.safetensors")


def test_chroma_is_told_from_flux_by_its_own_layers_or_by_metadata_alone(tmp_path):
    """Their blocks have the same names and rows: an adapter of blocks alone is converted alike for both."""
    block = lora("lora_unet_double_blocks_18_img_attn_qkv", 9216, 2.0)  # the last one; block 0 could be many models'
    guidance = lora("lora_unet_distilled_guidance_layer_layers_0_in_layer", 8, 2.0)
    modulation = lora("lora_unet_double_blocks_0_img_mod_lin", 18432, 2.0)
    clip = lora("lora_te1_text_model_encoder_layers_0_mlp_fc1", 8, 2.0)
    cases = [
        (block, {}, "flux"),
        (block, {"ss_base_model_version": "chroma"}, "chroma"),
        (block, {"modelspec.architecture": "chroma/lora"}, "chroma"),
        (block, {"modelspec.architecture": "flux-1-dev/lora"}, "flux"),
        (block | guidance, {}, "chroma"),
        (block | guidance, {"ss_base_model_version": "flux1"}, "chroma"),
        (block | modulation, {"ss_base_model_version": "chroma"}, "flux"),
        (block | clip, {"ss_base_model_version": "chroma"}, "flux"),
    ]
    for tensors, metadata, family in cases:
        save_file(tensors, tmp_path / "a.safetensors", metadata)
        read = formats.load(tmp_path / "a.safetensors")
        assert read.family == family, metadata
        formats.save(read, tmp_path / "b.safetensors", "kohya")
        same_tensors(tmp_path / "b.safetensors", tensors)


def test_flux_and_chroma_store_what_both_have_in_the_same_places():
    paths = {name.rpartition(".")[0] for name in real_shapes("flux")}
    shared = [path for path in paths if place("denoiser", path, "chroma")]
    assert len(shared) == 2 * (3 + 3 + 2 + 2 * 2 + 4) + 2 * (4 + 1 + 2) + 3
    assert all(place("denoiser", path, "chroma") == place("denoiser", path, "flux") for path in shared)
