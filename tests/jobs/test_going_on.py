"""`--adapter.begin`: training goes on from an adapter's file, of any format, and what would be lost is told."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.jobs.train_helpers import config, notes, trained
from vislora import formats
from vislora.errors import AdapterFileError, AdapterMismatchError, ConfigError
from vislora.jobs.convert import convert
from vislora.jobs.train import run

NOTHING = {"optimizer__learning_rate": 1e-12, "optimizer__weight_decay": 0.0, "loop__steps": 1}
"""A step that changes next to nothing: what comes out is what went in."""


def read(path):
    return {(item.component, item.path): item for item in formats.load(path).modules}


def alike(one, other):
    """Say whether two adapters mean the same to all that float32 holds, on the base of the family."""
    one, other = read(one), read(other)
    assert one.keys() == other.keys()
    for key, item in one.items():
        assert item.algo == other[key].algo
        assert item.scale == pytest.approx(other[key].scale)
        for slot, tensor in item.tensors.items():
            torch.testing.assert_close(tensor, other[key].tensors[slot], rtol=0, atol=1e-9)
        if item.magnitude is not None:
            torch.testing.assert_close(item.magnitude.flatten(), other[key].magnitude.flatten())


@pytest.mark.quick("settings2-diffusers", "settings4-kohya", "settings5-kohya")
@pytest.mark.parametrize(
    ("settings", "form"),
    [
        ({"adapter__alpha": 1.0, "adapter__preset": "all"}, "kohya"),
        ({"adapter__rank_stabilized": True}, "peft"),
        ({"adapter__dora": True}, "diffusers"),
        ({"adapter__algorithm": "lokr", "adapter__rank": 1}, "kohya"),
        ({"adapter__algorithm": "oft"}, "kohya"),
        ({"adapter__tucker": True, "adapter__preset": "all", "adapter__text_encoders": True}, "kohya"),
    ],
)
def test_it_begins_as_the_file_is(settings, form, tmp_path):
    first, _ = trained(tmp_path, "sd", output=tmp_path / "first", name="x", format=form, **settings)
    text = {"adapter__text_encoders": settings.get("adapter__text_encoders", False)}
    again, records = trained(tmp_path, "sd", adapter={"begin": first.path}, format=form, **NOTHING, **text)
    alike(first.path, again.path)
    more, _ = trained(tmp_path, "sd", output=tmp_path / "more", adapter={"begin": first.path}, format=form, **text)
    moved = read(more.path)
    assert any(
        not torch.equal(tensor, moved[key].tensors[slot])
        for key, item in read(first.path).items()
        for slot, tensor in item.tensors.items()
    )
    assert f"going on from {first.path}" in notes(records)


def test_other_formats_and_families_do_as_well(tmp_path):
    first, _ = trained(tmp_path, "sd3", output=tmp_path / "first", adapter__alpha=1.0)
    convert(first.path, tmp_path / "a.safetensors", to="diffusers")
    again, _ = trained(tmp_path, "sd3", adapter={"begin": tmp_path / "a.safetensors"}, **NOTHING)
    alike(first.path, again.path)


def test_settings_of_the_run_that_made_it_are_not_needed(tmp_path):
    """Ranks by pattern, say: they are the file's, and told so."""
    targets = [{"pattern": "*.attn1.to_q", "rank": 4, "alpha": 1.0}, {"pattern": "*.attn2.*", "rank": 0}]
    first, _ = trained(tmp_path, "sd", output=tmp_path / "first", adapter__targets=targets)
    again, _ = trained(tmp_path, "sd", adapter={"begin": first.path}, **NOTHING)
    alike(first.path, again.path)
    assert formats.load(again.path).metadata["ss_network_dim"] == "Dynamic"


def test_half_precision_is_widened(tmp_path):
    first, _ = trained(tmp_path, "sd", output=tmp_path / "first", save_precision="bf16")
    again, _ = trained(tmp_path, "sd", adapter={"begin": first.path}, loop__steps=1)
    assert {tensor.dtype for item in read(again.path).values() for tensor in item.tensors.values()} == {torch.float32}


def test_it_is_resumed_to_the_same_bits(tmp_path):
    first, _ = trained(tmp_path, "sd", output=tmp_path / "first")
    settings = {"adapter": {"begin": first.path, "dropout": 0.1}, "name": "x", "loop__save_every": 2}
    whole, _ = trained(tmp_path, "sd", output=tmp_path / "whole", **settings)
    trained(tmp_path, "sd", **settings)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000004")
    again, _ = trained(tmp_path, "sd", resume=True, **settings)
    one, other = load_file(whole.path), load_file(again.path)
    assert all(torch.equal(one[key], other[key]) for key in one)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000004")
    trained(tmp_path, "sd", output=tmp_path / "first", overwrite=True, seed=1)
    with pytest.raises(ConfigError, match=r"the adapter .*first.safetensors was changed"):
        trained(tmp_path, "sd", resume=True, **settings)


@pytest.mark.parametrize(
    ("adapter", "more", "reason"),
    [
        ({"rank": 4}, {}, "rank: is as the file of adapter.begin has it"),
        ({"dora": True}, {}, "dora: is as the file"),
        ({"targets": [{"pattern": "*"}]}, {}, "targets: is as the file"),
        ({}, {"optimizer__lora_plus_ratio": 2.0}, "lora_plus_ratio: is for what starts at zero"),
    ],
)
def test_what_the_file_decides_is_not_a_setting_too(adapter, more, reason, tmp_path):
    with pytest.raises(ConfigError, match=reason):
        config(tmp_path, adapter={"begin": tmp_path / "a.safetensors", **adapter}, **more)


def on(tmp_path, path, family="sd", **settings):
    """Try to go on from `path`."""
    return list(run(config(tmp_path, family, adapter={"begin": path, **settings}, output=tmp_path / "on")))


def test_what_cannot_be_gone_on_from_is_told_before_training(tmp_path):
    first, _ = trained(tmp_path, "sd", output=tmp_path / "first")
    with pytest.raises(AdapterFileError, match="nowhere"):
        on(tmp_path, tmp_path / "nowhere.safetensors")
    with pytest.raises(AdapterMismatchError, match="modules of adapter 'training' fit"):
        on(tmp_path, first.path, "sd3")
    with pytest.raises(ConfigError, match="has none for text encoders; set it to False"):
        on(tmp_path, first.path, text_encoders=True)
    tensors = load_file(first.path)
    both, _ = trained(tmp_path, "sd", output=tmp_path / "both", adapter__text_encoders=True, loop__steps=1)
    with pytest.raises(ConfigError, match="has some for text encoders; set it to True"):
        on(tmp_path, both.path)
    save_file({**tensors, "bundle_emb.sks.string_to_param.*": torch.zeros(1, 32)}, tmp_path / "words.safetensors")
    with pytest.raises(ConfigError, match="holds more than can be gone on from:\n  the word 'sks'"):
        on(tmp_path, tmp_path / "words.safetensors")
    name = next(key for key in tensors if key.endswith("attn1_to_out_0.lora_up.weight")).partition(".")[0]
    bias = {f"{name}.diff_b": torch.ones(tensors[f"{name}.lora_up.weight"].shape[0])}
    save_file({**tensors, **bias}, tmp_path / "bias.safetensors")
    with pytest.raises(ConfigError, match=r"layer '.*to_out.0': a change of the layer's bias cannot be trained"):
        on(tmp_path, tmp_path / "bias.safetensors")
    unet = tiny.model("unet")
    norm = next(path for path, part in unet.named_modules() if type(part).__name__ == "LayerNorm")
    width = unet.get_submodule(norm).weight.shape[0]
    save_file({f"lora_unet_{norm.replace('.', '_')}.w_norm": torch.ones(width)}, tmp_path / "norm.safetensors")
    with pytest.raises(ConfigError, match="a module of kind 'norm' cannot be trained"):
        on(tmp_path, tmp_path / "norm.safetensors")
