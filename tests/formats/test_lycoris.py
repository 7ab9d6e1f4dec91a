"""Adapters that LyCORIS saved, against the weight deltas that its own forward applies."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.formats.format_helpers import fixture
from vislora import formats
from vislora.algebra.compare import compare
from vislora.errors import AdapterFileError
from vislora.formats.adapter_file import not_supported


@pytest.mark.parametrize("name", ["locon", "locon_tucker"])
def test_deltas_are_those_of_lycoris(name):
    adapter = formats.load(fixture(f"lycoris_tiny/{name}.safetensors"))
    truth = load_file(fixture(f"lycoris_tiny/{name}.truth_delta.safetensors"))
    base = load_file(fixture("lycoris_tiny/base_subset.safetensors"))
    assert {f"{item.path}.weight" for item in adapter.modules} == truth.keys()
    for key, expected in truth.items():
        delta = adapter.delta(key.removesuffix(".weight"))
        # the truth is float32(W + delta) - W, so its own rounding is relative to W
        assert torch.linalg.vector_norm(delta - expected) <= 5e-8 * torch.linalg.vector_norm(base[key].double())
        assert torch.linalg.vector_norm(delta - expected) <= 2e-6 * torch.linalg.vector_norm(delta)
        merged = (base[key].double() + delta).float()
        assert torch.equal(merged - base[key], expected) or torch.allclose(
            merged - base[key], expected, rtol=0, atol=3e-8
        )


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [("loha", "loha", 22), ("lokr", "lokr", 22), ("full", "full", 22), ("norm", "norm", 10), ("dora_out", "dora", 22)],
)
def test_kinds_without_an_algorithm_are_loaded_kept_and_named(name, kind, count, tmp_path):
    adapter = formats.load(fixture(f"lycoris_tiny/{name}.safetensors"))
    assert all(item.path for item in adapter.modules)
    odd = [item for item in adapter.modules if item.unsupported]
    if not odd:
        pytest.skip(f"{kind} is supported")
    assert len(odd) == count
    assert not_supported(adapter.modules)[0].startswith(f"{count} modules of kind {kind}")
    held = sum(len(item.tensors) + (item.bias is not None) + (item.magnitude is not None) for item in adapter.modules)
    alphas = sum(item.alpha is not None for item in adapter.modules)
    assert held + alphas == len(load_file(fixture(f"lycoris_tiny/{name}.safetensors")))
    with pytest.raises(AdapterFileError, match="not supported yet"):
        adapter.delta(odd[0])
    with pytest.raises(AdapterFileError, match=f"{count} modules of kind {kind}"):
        formats.save(adapter, tmp_path / "a.safetensors", "kohya")
    with pytest.raises(AdapterFileError, match="not supported yet"):
        compare(adapter, adapter)
