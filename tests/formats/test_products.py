"""LoHa and LoKr in files: round trips, refusals, damage, and a loaded file's effect on a model."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.formats.format_helpers import fixture, same_tensors
from tests.layers import CASES, drawn
from vislora import formats
from vislora.algebra.compare import compare
from vislora.algorithms.base import LayerSpec
from vislora.errors import AdapterFileError
from vislora.formats import AdapterFile, AdapterModule
from vislora.inject.engines import merge
from vislora.inject.injection import FileModule, inject_modules
from vislora.inject.targets import adaptable
from vislora.registry import ALGORITHMS

KINDS = pytest.mark.parametrize("kind", ["loha", "lokr"])


def adapter_of(model: torch.nn.Module, kind: str, tucker: bool = False) -> AdapterFile:
    """Make an adapter of this kind with an effect on some layers of a UNet, convs among them."""
    layers = {path: layer for path, layer in adaptable(model).items() if path.startswith(("mid_block", "conv_in"))}
    modules = [
        AdapterModule(
            component="denoiser",
            path=path,
            algo=kind,
            tensors=drawn(layer, ALGORITHMS[kind], 2, tucker, seed),
            alpha=3.0,
        )
        for seed, (path, layer) in enumerate(layers.items())
    ]
    return AdapterFile(modules=modules, family="sd")


def changed(model: torch.nn.Module, adapter: AdapterFile) -> torch.nn.Module:
    """Return a copy of `model` whose weights have the adapter's float64 deltas added."""
    result = copy.deepcopy(model)
    for item in adapter.modules:
        weight = result.get_submodule(item.path).weight.data
        weight += adapter.delta(item, weight)
    return result


@KINDS
def test_a_lycoris_file_comes_back_bit_for_bit(kind, tmp_path):
    source = fixture(f"lycoris_tiny/{kind}.safetensors")
    adapter = formats.load(source)
    formats.save(adapter, tmp_path / "a.safetensors", "kohya")
    renamed = {key.replace("lycoris_", "lora_unet_"): tensor for key, tensor in load_file(source).items()}
    same_tensors(tmp_path / "a.safetensors", renamed)
    assert compare(adapter, formats.load(tmp_path / "a.safetensors")).exact


@KINDS
def test_a_format_without_slots_refuses_by_name(kind, tmp_path):
    adapter = adapter_of(tiny.model("unet"), kind)
    with pytest.raises(AdapterFileError, match=r"modules with (hada_w1_a|lokr_w1) and .*, for which diffusers files"):
        formats.save(adapter, tmp_path / "a", "diffusers")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("kind", "tucker"),
    [
        *(("loha", tucker) for tucker in (False, True)),
        *(("lokr", tucker) for tucker in (False, True)),
        *((kind, False) for kind in ("full", "glora", "oft", "boft", "ia3")),
    ],
)
def test_a_file_on_a_model_equals_its_delta_added_to_the_weights(kind, tucker, tmp_path):
    model = tiny.model("unet").double()
    formats.save(adapter_of(model, kind, tucker), tmp_path / "a.safetensors", "kohya")
    read = formats.load(tmp_path / "a.safetensors")
    assert read.metadata["ss_network_module"] == "lycoris.kohya"
    inputs = {
        name: value.double() if value.is_floating_point() else value for name, value in tiny.unet_inputs().items()
    }
    expected = changed(model, read)(**inputs).sample
    modules = [FileModule(item.path, item.algo, item.tensors, item.scale) for item in read.modules]
    assert inject_modules(model, "a", modules) == []
    torch.testing.assert_close(model(**inputs).sample, expected, rtol=0, atol=1e-10)
    merge(model)
    torch.testing.assert_close(model(**inputs).sample, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rank", [2, 40])
def test_the_scale_of_lokr_counts_only_where_a_factor_is_a_product(rank):
    algorithm = ALGORITHMS["lokr"]
    layer = torch.nn.Linear(64, 48)
    slots = drawn(layer, algorithm, rank)
    module = AdapterModule(component="denoiser", path="a", algo="lokr", tensors=slots, alpha=9999999999.0)
    assert ("lokr_w2" in slots) == (rank == 40)
    assert slots["lokr_w1"].shape == (6, 8)
    assert module.scale == (1.0 if rank == 40 else 9999999999.0 / 2)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_a_flat_delta_is_compared_with_one_of_the_weights_shape(kind):
    layer = CASES["conv2d"].layer()
    module = AdapterModule(component="denoiser", path="a", algo=kind, tensors=drawn(layer, ALGORITHMS[kind], 1))
    full = module.direction().reshape(LayerSpec.of(layer).weight_shape)
    up, down = full.flatten(1), torch.eye(36).reshape(36, 4, 3, 3)
    lora = AdapterModule(
        component="denoiser", path="a", algo="lora", tensors={"up": up[:, :, None, None], "down": down}
    )
    assert compare(AdapterFile(modules=[lora]), AdapterFile(modules=[module])).ok(1e-12)


DAMAGED = {
    "hada_w2_b": (torch.ones(3, 7), "do not share a rank"),
    "hada_w1_b": (torch.ones(4), "fit no layer"),
    "hada_w1_a": (torch.ones(0, 4), "is empty"),
}


@pytest.mark.parametrize("slot", DAMAGED)
def test_damaged_pairs_are_named(slot, tmp_path):
    slots = {"hada_w1_a": (8, 4), "hada_w1_b": (4, 6), "hada_w2_a": (8, 4), "hada_w2_b": (4, 6)}
    tensors = {f"lora_unet_conv_in.{name}": torch.ones(size) for name, size in slots.items()}
    tensor, message = DAMAGED[slot]
    save_file({**tensors, f"lora_unet_conv_in.{slot}": tensor}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match=message):
        formats.load(tmp_path / "a.safetensors")


def test_products_of_different_shapes_fit_no_layer():
    slots = {
        "hada_w1_a": torch.ones(8, 4),
        "hada_w1_b": torch.ones(4, 6),
        "hada_w2_a": torch.ones(8, 4),
        "hada_w2_b": torch.ones(4, 5),
    }
    with pytest.raises(AdapterFileError, match="not two products of one shape"):
        ALGORITHMS["loha"].shape(slots)
    with pytest.raises(AdapterFileError, match="not the factors of one product"):
        ALGORITHMS["lokr"].shape(
            {"lokr_w1": torch.ones(2, 2), "lokr_w2_a": torch.ones(2, 3), "lokr_w2_b": torch.ones(2, 2)}
        )
