"""SD3: kohya's fused q, k, v against diffusers' separate ones, and the swapped halves of final modulations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file

from tests.formats.format_helpers import module
from vislora import formats
from vislora.algebra.compare import compare
from vislora.algorithms.dora import decomposed
from vislora.errors import AdapterFileError
from vislora.formats.adapter_file import AdapterFile
from vislora.formats.kohya import place
from vislora.formats.parsed import Slice

QKV = "lora_unet_joint_blocks_0_x_block_attn_qkv"
MEMBERS = tuple(f"transformer_blocks.0.attn.to_{name}" for name in "qkv")
TINY = {
    "sample_size": 8,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "caption_projection_dim": 16,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "pos_embed_max_size": 8,
    "dual_attention_layers": (0,),
    "qk_norm": "rms_norm",
}


def separate(*specs: tuple[int, float] | None, dtype: torch.dtype = torch.float32) -> AdapterFile:
    modules = [
        module(path, rank=spec[0], alpha=spec[1], shape=(16, 12), dtype=dtype)
        for path, spec in zip(MEMBERS, specs, strict=True)
        if spec
    ]
    return AdapterFile(modules=modules, family="sd3")


def test_split_modules_share_down_and_know_where_they_came_from(tmp_path):
    tensors = {f"{QKV}.lora_down.weight": torch.randn(2, 8), f"{QKV}.lora_up.weight": torch.randn(24, 2)}
    save_file(tensors, tmp_path / "a.safetensors")
    read = formats.load(tmp_path / "a.safetensors")
    assert [item.path for item in read.modules] == list(MEMBERS)
    assert [item.target for item in read.modules] == [Slice(0, 0, 8), Slice(0, 8, 8), Slice(0, 16, 8)]
    assert {item.group for item in read.modules} == {"joint_blocks.0.x_block.attn.qkv"}
    assert len({item.tensors["down"].data_ptr() for item in read.modules}) == 1
    whole = (tensors[f"{QKV}.lora_up.weight"].double() @ tensors[f"{QKV}.lora_down.weight"].double()).chunk(3)
    assert all(torch.equal(read.delta(item), part) for item, part in zip(read.modules, whole, strict=True))


@pytest.mark.parametrize("specs", [((2, 1.0), (3, 1.5), (4, 2.0)), ((4, 2.0), None, (4, 2.0)), (None, (2, 8.0), None)])
def test_separately_trained_members_become_an_exact_block_diagonal(specs, tmp_path):
    adapter = separate(*specs)
    formats.save(adapter, tmp_path / "a.safetensors", "kohya")
    found = load_file(tmp_path / "a.safetensors")
    ranks = [spec[0] for spec in specs if spec]
    assert found[f"{QKV}.lora_up.weight"].shape == (48, sum(ranks))
    assert found[f"{QKV}.alpha"] == adapter.modules[0].scale * sum(ranks)
    comparison = compare(adapter, formats.load(tmp_path / "a.safetensors"))
    assert comparison.exact, comparison.problems(0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_unequal_scales_cost_one_rounding_at_most(dtype, tmp_path):
    adapter = separate((4, 4.0), (4, 3.0), (4, 8.0), dtype=dtype)
    formats.save(adapter, tmp_path / "a.safetensors", "kohya")
    comparison = compare(adapter, formats.load(tmp_path / "a.safetensors"))
    assert comparison.ok(1e-7), comparison.problems(1e-7)


def test_dora_of_fused_and_of_reordered_layers(tmp_path):
    tensors = {f"{QKV}.lora_down.weight": torch.randn(2, 8), f"{QKV}.lora_up.weight": torch.randn(24, 2)}
    tensors[f"{QKV}.dora_scale"] = torch.rand(24, 1)
    final = "lora_unet_final_layer_adaLN_modulation_1"
    tensors |= {f"{final}.lora_down.weight": torch.randn(2, 8), f"{final}.lora_up.weight": torch.randn(16, 2)}
    tensors[f"{final}.dora_scale"] = torch.rand(16, 1)
    save_file(tensors, tmp_path / "a.safetensors")
    read = formats.load(tmp_path / "a.safetensors")
    weight = torch.randn(24, 8)
    whole = decomposed(
        weight.double(),
        tensors[f"{QKV}.lora_up.weight"].double() @ tensors[f"{QKV}.lora_down.weight"].double(),
        tensors[f"{QKV}.dora_scale"].double(),
        "out",
    )
    parts = [read.delta(path, rows) for path, rows in zip(MEMBERS, weight.chunk(3), strict=True)]
    torch.testing.assert_close(torch.cat(parts), whole)
    formats.save(read, tmp_path / "b.safetensors", "diffusers")
    again = formats.load(tmp_path / "b.safetensors")
    assert again.family is None  # so narrow, these could be layers of Flux
    formats.save(replace(again, family="sd3"), tmp_path / "c.safetensors", "kohya")
    found = load_file(tmp_path / "c.safetensors")
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())


def test_members_that_are_no_rows_of_one_layer_are_refused(tmp_path):
    adapter = separate((2, 1.0), (2, 1.0), None)
    adapter.modules[1].tensors["up"] = torch.ones(9, 2)
    with pytest.raises(AdapterFileError, match="should have rows in the proportions 1:1:1"):
        formats.save(adapter, tmp_path / "a.safetensors", "kohya")


def test_rows_that_do_not_divide_by_three_are_refused(tmp_path):
    save_file({f"{QKV}.lora_down.weight": torch.ones(2, 8), f"{QKV}.lora_up.weight": torch.ones(25, 2)}, tmp_path / "a")
    with pytest.raises(AdapterFileError, match="output rows in the proportions 1:1:1"):
        formats.load(tmp_path / "a")


def test_names_and_row_order_agree_with_the_conversion_of_whole_checkpoints(tmp_path):
    """Give every original layer a LoRA; its deltas, added in kohya's names, must be diffusers' conversion of them."""
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in SD3Transformer2DModel(**TINY).named_parameters()}
    original = _original_weights(shapes)
    halves = {}
    for name in [name for name, weight in original.items() if weight.dim() == 2]:
        down, up = torch.randn(2, original[name].shape[1]), torch.randn(original[name].shape[0], 2)
        flat = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        halves |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
        original[name] = up.double() @ down.double()
    save_file(halves, tmp_path / "a.safetensors")
    expected = convert_sd3_transformer_checkpoint_to_diffusers(dict(original))
    read = formats.load(tmp_path / "a.safetensors")
    linear = {name for name, shape in shapes.items() if len(shape) == 2 and name.endswith(".weight")}
    assert {f"{item.path}.weight" for item in read.modules} == linear
    for item in read.modules:
        assert torch.equal(read.delta(item), expected[f"{item.path}.weight"]), item.path
    formats.save(read, tmp_path / "b.safetensors", "kohya")
    assert {k: t for k, t in load_file(tmp_path / "b.safetensors").items() if "alpha" not in k}.keys() == halves.keys()
    assert all(torch.equal(load_file(tmp_path / "b.safetensors")[key], tensor) for key, tensor in halves.items())


def _original_weights(shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Return zeros under the original names, for every layer of the diffusers model; fused ones have all their rows."""
    weights = {"pos_embed": torch.zeros(1)}
    for name, shape in shapes.items():
        path, _, kind = name.rpartition(".")
        found = place("denoiser", path, "sd3")
        assert found is not None, name
        stored = _dotted(path) + f".{kind}"
        rows = shape[0] * (len(found.part.sizes) if found.part else 1)
        weights[stored] = torch.zeros(rows, *shape[1:], dtype=torch.float64)
    return weights


def _dotted(path: str) -> str:
    from vislora.formats.names import FAMILY_NAMES

    return FAMILY_NAMES["sd3"].tables["denoiser"].place(path).name
