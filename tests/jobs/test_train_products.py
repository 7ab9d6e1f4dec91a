"""Training LoHa, LoKr and DoRA: what was trained is in the file, and what no file can hold is refused at once."""

from __future__ import annotations

import re
import shutil

import pytest
import torch

from tests import tiny
from tests.jobs.train_helpers import config, trained
from vislora import formats
from vislora.errors import ConfigError
from vislora.jobs.train import run


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_a_trained_adapter_is_in_its_file(kind, tmp_path):
    value, _ = trained(tmp_path, "sd", adapter__algorithm=kind, adapter__preset="all", loop__steps=2)
    read = formats.load(value.path)
    assert {item.algo for item in read.modules} == {kind}
    assert all(torch.isfinite(item.direction()).all() for item in read.modules)
    assert any(item.direction().any() for item in read.modules)
    assert read.metadata["ss_network_module"] == "lycoris.kohya"
    assert f'"algo": "{kind}"' in read.metadata["ss_network_args"]
    unet = tiny.model("unet")
    for item in read.modules:
        weight = unet.get_submodule(item.path).weight
        assert read.delta(item, weight).shape == weight.shape


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
        # at first they do, as what is trained of them is zero
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
