"""One file, several ways to name things: all are read; a layer that stands twice must be the same twice."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.formats.format_helpers import sd_adapter
from vislora import formats
from vislora.algebra.compare import compare
from vislora.errors import AdapterFileError

PATH = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
OWNER = PATH.removesuffix(".to_out.0")
DOWN, UP = torch.randn(2, 8), torch.randn(8, 2)
# one layer as every kind of file names it
NAMES = {
    "kohya": (f"lora_unet_{PATH.replace('.', '_')}.lora_down.weight", "lora_up.weight"),
    "lycoris": (f"lycoris_{PATH.replace('.', '_')}.lora_down.weight", "lora_up.weight"),
    "peft": (f"base_model.model.{PATH}.lora_A.weight", "lora_B.weight"),
    "peft with a component": (f"base_model.model.unet.{PATH}.lora_A.weight", "lora_B.weight"),
    "diffusers": (f"unet.{PATH}.lora_A.weight", "lora_B.weight"),
    "diffusers-mid": (f"unet.{PATH}.lora.down.weight", "up.weight"),
    "diffusers-old": (f"unet.{OWNER}.processor.to_out_lora.down.weight", "up.weight"),
    "without a prefix": (f"{OWNER}.processor.to_out_lora.down.weight", "up.weight"),
}


def pair(name: str, up: torch.Tensor = UP) -> dict[str, torch.Tensor]:
    down_key, up_end = NAMES[name]
    stem = down_key.removesuffix(".weight").rpartition(".")[0]
    return {down_key: DOWN.clone(), f"{stem}.{up_end}": up.clone()}


@pytest.mark.parametrize("name", NAMES)
def test_a_repeated_layer_is_read_once_and_noted(name, tmp_path):
    other = "diffusers" if name != "diffusers" else "kohya"
    save_file({**pair(name), **pair(other)}, tmp_path / "a.safetensors")
    read = formats.load(tmp_path / "a.safetensors")
    assert [item.path for item in read.modules] == [PATH]
    assert any("repeats" in note for note in read.notes)
    assert read.extras == {}


def test_all_of_them_in_one_file(tmp_path):
    save_file({key: tensor for name in NAMES for key, tensor in pair(name).items()}, tmp_path / "a.safetensors")
    read = formats.load(tmp_path / "a.safetensors")
    assert len(read.modules) == 1
    assert sum("repeats" in note for note in read.notes) == len(NAMES) - 1


@pytest.mark.parametrize("name", [name for name in NAMES if name != "diffusers"])
def test_two_that_differ_are_an_error_with_both_keys(name, tmp_path):
    different, plain = pair(name, up=UP + 1), pair("diffusers")
    save_file({**different, **plain}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match="differ") as caught:
        formats.load(tmp_path / "a.safetensors")
    assert f"'{list(different)[1]}'" in str(caught.value)
    assert f"'{list(plain)[1]}'" in str(caught.value)


def test_an_alpha_makes_the_difference_unless_it_is_the_rank(tmp_path):
    key = f"lora_unet_{PATH.replace('.', '_')}.alpha"
    tensors = {**pair("kohya"), **pair("peft")}
    save_file({**tensors, key: torch.tensor(2.0)}, tmp_path / "a.safetensors")
    assert len(formats.load(tmp_path / "a.safetensors").modules) == 1
    save_file({**tensors, key: torch.tensor(1.0)}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match=f"'{key}' and 'base_model.model.{PATH}'"):
        formats.load(tmp_path / "a.safetensors")


def test_original_and_reference_block_names_of_sdxl(tmp_path):
    """lora_unet_input_blocks_4_1_... is down_blocks.1.attentions.0; tools that convert leave some of each behind."""
    names = ("lora_unet_input_blocks_4_1_proj_in", "lora_unet_down_blocks_1_attentions_0_proj_in")
    deep = "lora_unet_down_blocks_2_attentions_0_transformer_blocks_9_attn1_to_q"
    halves = {"lora_down.weight": DOWN, "lora_up.weight": UP}
    both = {f"{name}.{end}": tensor.clone() for name in (*names, deep) for end, tensor in halves.items()}
    save_file(both, tmp_path / "a.safetensors")
    read = formats.load(tmp_path / "a.safetensors")
    assert (read.family, sorted(item.path for item in read.modules)) == (
        "sdxl",
        [
            "down_blocks.1.attentions.0.proj_in",
            "down_blocks.2.attentions.0.transformer_blocks.9.attn1.to_q",
        ],
    )
    save_file({**both, f"{names[0]}.lora_up.weight": UP + 1}, tmp_path / "b.safetensors")
    with pytest.raises(AdapterFileError, match=r"b\.safetensors: .* for the same layer and differ") as caught:
        formats.load(tmp_path / "b.safetensors")
    assert all(f"'{name}.lora_up.weight'" in str(caught.value) for name in names)


def test_every_second_layer_under_another_name(tmp_path):
    for name in ("kohya", "diffusers"):
        formats.save(sd_adapter(text=False), tmp_path / f"{name}.safetensors", name)
    kohya, new = (load_file(tmp_path / f"{name}.safetensors") for name in ("kohya", "diffusers"))
    metadata = formats.load(tmp_path / "diffusers.safetensors").metadata
    some = {key: tensor for key, tensor in kohya.items() if "attentions" in key}
    rest = {key: tensor for key, tensor in new.items() if "attentions" not in key}
    save_file({**some, **rest}, tmp_path / "mixed.safetensors", metadata)
    assert compare(sd_adapter(text=False), formats.load(tmp_path / "mixed.safetensors")).exact


def test_faults_name_keys(tmp_path):
    down, up = pair("diffusers-old")
    save_file({down: torch.ones(2, 8), up: torch.ones(8, 3)}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match="do not share a rank") as caught:
        formats.load(tmp_path / "a.safetensors")
    assert down in str(caught.value)
    assert up in str(caught.value)
