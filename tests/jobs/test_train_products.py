"""Training every algorithm, and DoRA: what was trained is in the file, what no file can hold is refused at once."""

from __future__ import annotations

import re
import shutil
from functools import cache

import pytest
import torch
from safetensors.torch import load_file

import vislora
from tests import tiny
from tests.jobs.train_helpers import config, trained
from vislora import formats
from vislora.errors import ConfigError
from vislora.formats.kohya import LYCORIS_NAMES
from vislora.jobs.train import run
from vislora.registry import TRAINED

KINDS = [name for name in TRAINED if name != "lora"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a function that trains an algorithm for two steps, once."""

    @cache
    def train(kind):
        settings = {"format": "peft"} if kind == "oft_peft" else {}
        rank = 8 if kind == "boft" else 2
        root = tmp_path_factory.mktemp(kind)
        return trained(root, "sd", adapter__algorithm=kind, adapter__rank=rank, loop__steps=2, **settings)

    return train


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_adapter_is_in_its_file(kind, made):
    value, _ = made(kind)
    read = formats.load(value.path)
    assert {item.algo for item in read.modules} == {kind}
    unet = tiny.model("unet")
    deltas = [read.delta(item, unet.get_submodule(item.path).weight.detach()) for item in read.modules]
    assert all(torch.isfinite(delta).all() for delta in deltas)
    assert all(delta.any() for delta in deltas)
    if kind != "oft_peft":
        assert read.metadata["ss_network_module"] == "lycoris.kohya"
        assert f'"algo": "{LYCORIS_NAMES.get(kind, kind)}"' in read.metadata["ss_network_args"]


def output(unet) -> torch.Tensor:
    with torch.no_grad():
        return unet(**tiny.MODELS["unet"][1]())[0]


# LyCORIS 4.1 cannot load the IA3 that it saves itself: an argument too many
@pytest.mark.parametrize("kind", [name for name in KINDS if name not in ("oft_peft", "ia3")])
def test_lycoris_computes_with_it_what_this_does(kind, made):
    lycoris = pytest.importorskip("lycoris")
    value, _ = made(kind)
    own, other = tiny.model("unet"), tiny.model("unet")
    before = output(own)
    vislora.load(own, value.path)
    renamed = {key.replace("lora_unet_", "lycoris_"): tensor for key, tensor in load_file(value.path).items()}
    network, _ = lycoris.create_lycoris_from_weights(1.0, "", other, weights_sd=renamed)
    assert len(network.loras) == len(formats.load(value.path).modules)
    network.apply_to()
    network.eval()
    assert (output(own) - before).abs().max() > 1e-3
    torch.testing.assert_close(output(own), output(other), rtol=0, atol=2e-5)


def test_peft_computes_with_its_rotation_what_this_does(made):
    peft = pytest.importorskip("peft")
    value, _ = made("oft_peft")
    own, other = tiny.model("unet"), tiny.model("unet")
    before = output(own)
    vislora.load(own, value.path)
    # merged: beside a conv of more than one pixel PEFT sums windows that overlap, also where nothing is turned
    adapted = peft.PeftModel.from_pretrained(other, value.path).merge_and_unload()
    assert (output(own) - before).abs().max() > 1e-3
    torch.testing.assert_close(output(own), output(adapted), rtol=0, atol=2e-5)


@pytest.mark.quick("ia3")
@pytest.mark.parametrize("kind", ["oft", "ia3"])
def test_constants_are_not_learned_and_a_resumed_run_has_them(kind, tmp_path):
    settings = {"name": "x", "adapter__algorithm": kind, "loop__save_every": 2}
    whole, _ = trained(tmp_path, "sd", output=tmp_path / "whole", **settings)
    trained(tmp_path, "sd", **settings)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000004")
    again, _ = trained(tmp_path, "sd", resume=True, **settings)
    one, other = load_file(whole.path), load_file(again.path)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    constants = [tensor for key, tensor in one.items() if key.endswith((".alpha", ".on_input"))]
    assert constants
    assert not any(constants)


def test_layers_may_learn_at_a_rate_of_their_own(tmp_path):
    step = {"loop__steps": 1, "optimizer__name": "sgd", "optimizer__weight_decay": 0.0, "optimizer__max_grad_norm": 1e9}
    pattern = {"pattern": "*.attn1.to_q"}
    values = [
        trained(tmp_path, "sd", output=tmp_path / str(len(own)), adapter__targets=[{**pattern, **own}], **step)[0]
        for own in ({}, {"learning_rate": 2e-2})
    ]
    plain, more = (load_file(value.path) for value in values)
    factors = {
        key: float((more[key] * one).sum() / (one * one).sum()) for key, one in plain.items() if "lora_up" in key
    }
    assert all(factor == pytest.approx(2.0 if "attn1_to_q" in key else 1.0) for key, factor in factors.items())
    assert {round(factor) for factor in factors.values()} == {1, 2}


def test_names_that_lycoris_has_are_understood_and_others_get_the_nearest(tmp_path):
    assert config(tmp_path, adapter__algorithm="diag-oft").adapter.algorithm == "oft"
    assert config(tmp_path, adapter__algorithm="locon").adapter.algorithm == "lora"
    with pytest.raises(ConfigError, match=r"adapter\.algorithm: unknown name \(did you mean 'lokr'") as caught:
        config(tmp_path, adapter__algorithm="lokrr")
    assert "norm" not in str(caught.value)


def test_magnitudes_are_refused_on_what_no_file_has_them_on(tmp_path):
    with pytest.raises(ConfigError, match=r"adapter\.dora: goes with full, glora, loha, lokr, lora, and not with oft"):
        list(run(config(tmp_path, "sd", adapter__algorithm="oft", adapter__dora=True)))


def test_a_layer_that_an_algorithm_does_not_fit_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"layer '.*': algorithm 'boft' cannot cut 96 .* rank 6 is the least"):
        list(run(config(tmp_path, "sd3", adapter__algorithm="boft", adapter__preset="all", adapter__rank=4)))


@pytest.mark.parametrize(("family", "form"), [("sd", "kohya"), ("sd3", "kohya"), ("sd", "peft")])
def test_a_trained_dora_is_in_its_file_with_exact_magnitudes(family, form, tmp_path):
    value, _ = trained(tmp_path, family, adapter__dora=True, format=form, save_precision="bf16", loop__steps=2)
    read = formats.load(value.path)
    assert all(item.magnitude is not None and item.magnitude_axis == "out" for item in read.modules)
    assert {item.magnitude.dtype for item in read.modules} == {torch.float32}
    assert {tensor.dtype for item in read.modules for tensor in item.tensors.values()} == {torch.bfloat16}
    if form == "kohya":
        assert read.metadata["ss_network_module"] == "lycoris.kohya"
        assert '"dora_wd": "True"' in read.metadata["ss_network_args"]


def test_a_run_with_dora_goes_on_to_the_same_bits(tmp_path):
    whole, _ = trained(tmp_path, output=tmp_path / "whole", name="x", adapter__dora=True)
    trained(tmp_path, name="x", adapter__dora=True, loop__save_every=2)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000004")
    again, _ = trained(tmp_path, name="x", adapter__dora=True, loop__save_every=2, resume=True)
    read = [formats.load(path).modules for path in (whole.path, again.path)]
    assert all(torch.equal(a.magnitude, b.magnitude) for a, b in zip(*read, strict=True))


@pytest.mark.parametrize(
    ("family", "kind", "form", "reason"),
    [
        ("sd3", "loha", "kohya", "modules that kohya files fuse into one: its parts of kind loha do not share"),
        # at first these do, as what is trained of them is zero
        ("sd3", "lokr", "kohya", "modules that kohya files fuse into one: its parts of kind lokr do not share"),
        ("sd", "loha", "diffusers", "diffusers files have no slot"),
    ],
)
def test_what_no_file_can_hold_is_refused_before_training(family, kind, form, reason, tmp_path):
    settings = config(tmp_path, family, adapter__algorithm=kind, format=form)
    with pytest.raises(ConfigError, match=reason) as caught:
        list(run(settings))
    able = re.search(r"what can: --format (\w+)", str(caught.value))
    trained(tmp_path, family, adapter__algorithm=kind, format=able[1])


def test_kinds_may_differ_by_pattern(tmp_path):
    targets = [{"pattern": "*.attn1.to_q", "algorithm": "lokr"}, {"pattern": "*.attn1.to_k", "rank": 3}]
    value, _ = trained(tmp_path, "sd", adapter__targets=targets, loop__steps=1)
    modules = formats.load(value.path).modules
    kinds = {item.path.rpartition(".")[2]: item.algo for item in modules if ".attn1." in item.path}
    assert (kinds["to_q"], kinds["to_k"], kinds["to_v"]) == ("lokr", "lora", "lora")


def test_large_images_are_encoded_one_by_one():
    """Eight of 1024 pixels at once would take 20 GiB in float32."""
    from vislora.jobs.datasets import images_at_once

    assert [images_at_once(side) for side in (64, 256, 512, 768, 1024)] == [8, 8, 2, 1, 1]
