"""What goes into a file comes out of it, in every format and from each into each."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from itertools import product

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from tests.formats.format_helpers import WRITABLE, materialise, module, same_tensors, sd_adapter
from vislora import formats
from vislora.algebra.compare import compare
from vislora.errors import AdapterFileError
from vislora.formats.adapter_file import AdapterFile
from vislora.formats.header import read_header

PLACES = {"kohya": "a.safetensors", "diffusers": "b.safetensors", "peft": "c", "comfy": "d.safetensors"}
LISTINGS = {
    "kohya_sd15_lora_c3lier.json": ("sd", 350, 350),
    "kohya_sdxl_lora_c3lier.json": ("sdxl", 1052, 1052),
    "kohya_flux_lora_te1_te3_indims.json": ("flux", 552, 552 + 38 * 2 + 38 * 3),
    "kohya_sd3_medium.json": ("sd3", 501, 597),
}


@pytest.mark.quick("kohya_sd15_*", "kohya_sd3_*")
@pytest.mark.parametrize("listing", LISTINGS)
def test_kohya_files_of_real_models_go_through_every_format_and_back_bit_for_bit(listing, tmp_path):
    family, stored, modules = LISTINGS[listing]
    tensors = materialise(listing, tmp_path / "source.safetensors", shrink=32)
    assert len(tensors) == 3 * stored
    source = formats.load(tmp_path / "source.safetensors")
    assert (source.family, len(source.modules), source.extras) == (family, modules, {})
    for name in WRITABLE:
        formats.save(source, tmp_path / PLACES[name], name)
        read = formats.load(tmp_path / PLACES[name])
        assert (read.family, read.source.format) == (family, name)
        assert compare(source, read).exact
        formats.save(read, tmp_path / "back.safetensors", "kohya")
        same_tensors(tmp_path / "back.safetensors", tensors)


@pytest.mark.parametrize(("first", "second"), list(product(WRITABLE, WRITABLE)))
def test_any_format_to_any_other_keeps_tensors_alphas_and_metadata(first, second, tmp_path):
    adapter = sd_adapter()
    formats.save(adapter, tmp_path / PLACES[first], first)
    formats.save(formats.load(tmp_path / PLACES[first]), tmp_path / f"again.{PLACES[second]}", second)
    read = formats.load(tmp_path / f"again.{PLACES[second]}")
    assert read.metadata["note"] == "kept"
    by_path = {item.path: item for item in read.modules}
    for item in adapter.modules:
        found = by_path[item.path]
        assert (found.component, found.scale) == (item.component, item.scale)
        assert all(torch.equal(found.tensors[slot], tensor) for slot, tensor in item.tensors.items())
    assert len(read.modules) == len(adapter.modules)


@pytest.mark.parametrize("name", WRITABLE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_kept(name, dtype, tmp_path):
    adapter = AdapterFile(modules=[module("conv_in", shape=(8, 4, 3, 3), dtype=dtype)], family="sd")
    formats.save(adapter, tmp_path / PLACES[name], name)
    read = formats.load(tmp_path / PLACES[name])
    assert {tensor.dtype for tensor in read.modules[0].tensors.values()} == {dtype}


def test_saving_twice_gives_the_same_bytes(tmp_path):
    for name in ("kohya", "diffusers"):
        formats.save(sd_adapter(), tmp_path / "one.safetensors", name)
        formats.save(formats.load(tmp_path / "one.safetensors"), tmp_path / "two.safetensors", name)
        assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


def test_tucker_cores_stay_in_kohya_files_and_are_refused_elsewhere(tmp_path):
    item = module("conv_in", shape=(8, 4, 3, 3), tucker=True)
    assert "mid" in item.tensors
    adapter = AdapterFile(modules=[item], family="sd")
    formats.save(adapter, tmp_path / "a.safetensors", "kohya")
    assert compare(adapter, formats.load(tmp_path / "a.safetensors")).exact
    with pytest.raises(AdapterFileError, match="1 modules with mid, for which diffusers files have no slot"):
        formats.save(adapter, tmp_path / "b.safetensors", "diffusers")
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize("name", ["diffusers", "peft"])
def test_embedding_layers(name, tmp_path):
    path = "text_model.embeddings.token_embedding"
    adapter = AdapterFile(modules=[module(path, "te:clip_l", shape=(11, 6), kind="embedding")], family="sd")
    formats.save(adapter, tmp_path / PLACES[name], name)
    assert compare(adapter, formats.load(tmp_path / PLACES[name])).exact
    with pytest.raises(AdapterFileError, match="embedding_down and embedding_up, for which kohya files have no slot"):
        formats.save(adapter, tmp_path / "k.safetensors", "kohya")


def test_rank_stabilised_scale_becomes_a_plain_alpha_in_kohya_files(tmp_path):
    adapter = AdapterFile(modules=[module("conv_in", rank=4, alpha=3.0, rule="alpha/sqrt(r)")], family="sd")
    for name in WRITABLE:
        formats.save(adapter, tmp_path / PLACES[name], name)
        read = formats.load(tmp_path / PLACES[name])
        assert read.modules[0].scale == 1.5
        assert read.modules[0].rule == ("alpha/r" if name in ("kohya", "comfy") else "alpha/sqrt(r)")


def test_mixed_scale_rules_in_one_component(tmp_path):
    modules = [module("conv_in", alpha=3.0, rule="alpha/sqrt(r)"), module("conv_out", alpha=3.0)]
    adapter = AdapterFile(modules=modules, family="sd")
    formats.save(adapter, tmp_path / "a.safetensors", "diffusers")
    assert compare(adapter, formats.load(tmp_path / "a.safetensors")).exact


def test_alpha_zero_is_the_rank_in_kohya_files_and_zero_elsewhere(tmp_path):
    tensors = {f"lora_unet_conv_in.lora_{half}.weight": torch.ones(4, 4) for half in ("down", "up")}
    save_file({**tensors, "lora_unet_conv_in.alpha": torch.tensor(0.0)}, tmp_path / "a.safetensors")
    read = formats.load(tmp_path / "a.safetensors")
    assert read.modules[0].scale == 1.0
    assert "alpha 0" in read.notes[0]
    literal = AdapterFile(modules=[replace(read.modules[0], alpha=0.0)], family="sd")
    formats.save(literal, tmp_path / "b.safetensors", "diffusers")
    assert formats.load(tmp_path / "b.safetensors").modules[0].scale == 0.0
    with pytest.raises(AdapterFileError, match="alpha 0"):
        formats.save(literal, tmp_path / "c.safetensors", "kohya")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_alphas_of_any_dtype(dtype, tmp_path):
    tensors = {f"lora_unet_conv_in.lora_{half}.weight": torch.ones(4, 4) for half in ("down", "up")}
    save_file({**tensors, "lora_unet_conv_in.alpha": torch.tensor(6, dtype=dtype)}, tmp_path / "a.safetensors")
    assert formats.load(tmp_path / "a.safetensors").modules[0].alpha == 6.0


def test_peft_patterns_are_regular_expressions_and_the_first_hit_wins(tmp_path):
    formats.save(sd_adapter(text=False), tmp_path / "a", "peft")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    config["alpha_pattern"] = {r"attentions\.\d+.*to_k": 7, "to_k": 5, "conv_in": 3, "in": 9}
    config["lora_alpha"] = 1
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    alphas = {item.path: item.alpha for item in formats.load(tmp_path / "a").modules}
    for path, alpha in alphas.items():
        hits = [value for key, value in config["alpha_pattern"].items() if re.match(rf"(.*\.)?({key})$", path)]
        assert alpha == (hits[0] if hits else 1)
    assert 7 in alphas.values()
    assert 3 in alphas.values()


def test_a_peft_folder_has_one_sub_folder_per_component_only_when_there_are_several(tmp_path):
    formats.save(sd_adapter(), tmp_path / "both", "peft")
    assert sorted(item.name for item in (tmp_path / "both").iterdir()) == ["text_encoder", "unet"]
    formats.save(sd_adapter(text=False), tmp_path / "one", "peft")
    assert sorted(item.name for item in (tmp_path / "one").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    for place in ("one/adapter_model.safetensors", "both/unet", "both/unet/adapter_model.safetensors"):
        assert compare(sd_adapter(text=False), formats.load(tmp_path / place)).exact


def test_a_lone_second_text_encoder_is_recognised_after_peft(tmp_path):
    item = module("text_model.encoder.layers.0.mlp.fc1", "te:clip_g")
    formats.save(AdapterFile(modules=[item], family="sd3"), tmp_path / "a", "peft")
    read = formats.load(tmp_path / "a")
    assert read.modules[0].component == "te:clip_g"
    assert "vislora.component" not in read.metadata


def test_a_folder_with_other_things_is_never_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    with pytest.raises(AdapterFileError, match="is left as it is"):
        formats.save(sd_adapter(), tmp_path / "photos", "peft")
    assert (tmp_path / "photos" / "cat.png").read_bytes() == b"cat"


def test_fresh_kohya_files_carry_the_hashes_and_keys_that_tools_look_for(tmp_path):
    formats.save(sd_adapter(), tmp_path / "a.safetensors", "kohya")
    metadata = read_header(tmp_path / "a.safetensors").metadata
    # sd-scripts' precalculate_safetensors_hashes
    kept = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    data = save(load_file(tmp_path / "a.safetensors"), kept)
    start = 8 + int.from_bytes(data[:8], "little")
    assert hashlib.sha256(data[start:]).hexdigest() == metadata["sshs_model_hash"]
    assert hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8] == metadata["sshs_legacy_hash"]
    assert metadata["ss_network_dim"] == "Dynamic"
    assert metadata["ss_base_model_version"] == "sd_v1"


def test_diffusers_own_metadata_leaves_with_its_format(tmp_path):
    formats.save(sd_adapter(), tmp_path / "a.safetensors", "diffusers")
    read = formats.load(tmp_path / "a.safetensors")
    assert "lora_adapter_metadata" in read.metadata
    formats.save(read, tmp_path / "b.safetensors", "kohya")
    assert "lora_adapter_metadata" not in read_header(tmp_path / "b.safetensors").metadata


def test_a_text_encoder_alone_needs_a_family_for_kohya(tmp_path):
    adapter = AdapterFile(modules=[module("text_model.encoder.layers.0.mlp.fc1", "te:clip_l")])
    with pytest.raises(AdapterFileError, match="unknown family"):
        formats.save(adapter, tmp_path / "a.safetensors", "kohya")
    formats.save(replace(adapter, family="sd3"), tmp_path / "a.safetensors", "kohya")
    assert all(key.startswith("lora_te1_") for key in load_file(tmp_path / "a.safetensors"))


def test_one_layer_under_two_names_is_read_once_when_equal_and_refused_when_not(tmp_path):
    half = {"lora_down.weight": torch.ones(2, 4), "lora_up.weight": torch.ones(4, 2)}
    twice = {
        f"{name}.{end}": tensor.clone()
        for name in ("lora_unet_conv_in", "lycoris_conv_in")
        for end, tensor in half.items()
    }
    save_file(twice, tmp_path / "a.safetensors")
    read = formats.load(tmp_path / "a.safetensors")
    assert len(read.modules) == 1
    assert "repeats" in read.modules[0].notes[0]
    twice["lycoris_conv_in.lora_up.weight"][0] = 2.0
    save_file(twice, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match="for the same layer and differ"):
        formats.load(tmp_path / "a.safetensors")


def test_two_namespaces_in_one_file(tmp_path):
    formats.save(sd_adapter(text=False), tmp_path / "a.safetensors", "diffusers")
    tensors = load_file(tmp_path / "a.safetensors")
    metadata = read_header(tmp_path / "a.safetensors").metadata
    clip = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    tensors |= {f"{clip}.lora_down.weight": torch.ones(2, 4), f"{clip}.lora_up.weight": torch.ones(4, 2)}
    tensors["_aux.junk"] = torch.ones(1)
    tensors["bundle_emb.my.style.string_to_param.*"] = torch.ones(2, 8)
    save_file(tensors, tmp_path / "b.safetensors", metadata)
    read = formats.load(tmp_path / "b.safetensors")
    assert {item.component for item in read.modules} == {"denoiser", "te:clip_l"}
    assert list(read.extras) == ["_aux.junk"]
    assert list(read.embeddings["my.style"]) == ["string_to_param.*"]
    for name, match in (("kohya", "1 tensors that belong to no module"), ("peft", "1 embeddings, which have no place")):
        with pytest.raises(AdapterFileError, match=match):
            formats.save(read, tmp_path / "c", name)


def test_an_alpha_beyond_float32_is_refused_by_kohya_and_kept_by_json(tmp_path):
    adapter = AdapterFile(modules=[module("conv_in", alpha=1e39)], family="sd")
    with pytest.raises(AdapterFileError, match="float32 cannot hold"):
        formats.save(adapter, tmp_path / "a.safetensors", "kohya")
    assert list(tmp_path.iterdir()) == []
    formats.save(adapter, tmp_path / "a.safetensors", "diffusers")
    assert formats.load(tmp_path / "a.safetensors").modules[0].alpha == 1e39
