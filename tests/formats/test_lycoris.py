"""Adapters that LyCORIS saved, against the weight deltas that its own forward applies."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from tests.formats.format_helpers import fixture, same_tensors
from vislora import formats
from vislora.algebra.compare import compare
from vislora.errors import AdapterFileError


@pytest.mark.parametrize("name", ["locon", "locon_tucker", "loha", "lokr"])
def test_deltas_are_those_of_lycoris(name):
    adapter = formats.load(fixture(f"lycoris_tiny/{name}.safetensors"))
    truth = load_file(fixture(f"lycoris_tiny/{name}.truth_delta.safetensors"))
    base = load_file(fixture("lycoris_tiny/base_subset.safetensors"))
    assert {f"{item.path}.weight" for item in adapter.modules} == truth.keys()
    for key, expected in truth.items():
        delta = adapter.delta(key.removesuffix(".weight"), base[key])
        # the truth is float32(W + delta) - W, so its own rounding is relative to W
        assert torch.linalg.vector_norm(delta - expected) <= 5e-8 * torch.linalg.vector_norm(base[key].double())
        assert torch.linalg.vector_norm(delta - expected) <= 2e-6 * torch.linalg.vector_norm(delta)
        merged = (base[key].double() + delta).float()
        assert torch.equal(merged - base[key], expected) or torch.allclose(
            merged - base[key], expected, rtol=0, atol=3e-8
        )


@pytest.mark.parametrize(("name", "kinds"), [("full", {"full": 22}), ("norm", {"lora": 22, "norm": 10})])
def test_whole_weights_norms_and_biases_are_those_of_lycoris(name, kinds, tmp_path):
    source = fixture(f"lycoris_tiny/{name}.safetensors")
    adapter = formats.load(source)
    truth = load_file(fixture(f"lycoris_tiny/{name}.truth_delta.safetensors"))
    base = load_file(fixture("lycoris_tiny/base_subset.safetensors"))
    assert Counter(item.algo for item in adapter.modules) == kinds
    for key, expected in truth.items():
        path, _, part = key.rpartition(".")
        delta = adapter.delta(path, base[key]) if part == "weight" else adapter.bias_delta(path)
        assert torch.linalg.vector_norm(delta - expected) <= 5e-8 * torch.linalg.vector_norm(base[key].double()) + 1e-9
    changed = {f"{item.path}.weight" for item in adapter.modules}
    changed |= {f"{item.path}.bias" for item in adapter.modules if item.bias is not None}
    assert truth.keys() == changed
    formats.save(adapter, tmp_path / "a.safetensors", "kohya")
    renamed = {key.replace("lycoris_", "lora_unet_"): tensor for key, tensor in load_file(source).items()}
    same_tensors(tmp_path / "a.safetensors", renamed)
    assert compare(adapter, formats.load(tmp_path / "a.safetensors")).exact


def test_dora_is_that_of_lycoris_and_goes_through_every_format(tmp_path):
    source = fixture("lycoris_tiny/dora_out.safetensors")
    adapter = formats.load(source)
    truth = load_file(fixture("lycoris_tiny/dora_out.truth_delta.safetensors"))
    base = load_file(fixture("lycoris_tiny/base_subset.safetensors"))
    for key, expected in truth.items():
        delta = adapter.delta(key.removesuffix(".weight"), base[key])
        assert torch.linalg.vector_norm(delta - expected) <= 3e-7 * torch.linalg.vector_norm(base[key].double())
    with pytest.raises(AdapterFileError, match="depends on the base weight"):
        adapter.delta(adapter.modules[0])
    for name, place in (("diffusers", "a.safetensors"), ("peft", "b"), ("kohya", "c.safetensors")):
        formats.save(adapter, tmp_path / place, name)
        read = formats.load(tmp_path / place)
        assert compare(adapter, read).exact
        formats.save(read, tmp_path / "back.safetensors", "kohya")
        renamed = {key.replace("lycoris_", "lora_unet_"): tensor for key, tensor in load_file(source).items()}
        same_tensors(tmp_path / "back.safetensors", renamed)


def test_dora_on_some_modules_only_is_refused_by_peft(tmp_path):
    adapter = formats.load(fixture("lycoris_tiny/dora_out.safetensors"))
    adapter.modules[0].magnitude = None
    with pytest.raises(AdapterFileError, match="on all modules of a component or on none"):
        formats.save(adapter, tmp_path / "a", "peft")
    formats.save(adapter, tmp_path / "a.safetensors", "kohya")
