"""Modules of a file on a model: what fits, what does not, and what is left when nothing was done."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests import tiny
from tests.inject.helpers import Picture, file_modules, loaded
from vislora.errors import AdapterMismatchError, ConfigError
from vislora.inject.engines import merge
from vislora.inject.injection import FileModule, inject_modules
from vislora.inject.layer import state_of
from vislora.inject.stack import existing_stack, stack_of
from vislora.inject.strength import Strength

SHAPED = {"down": torch.ones(2, 7), "up": torch.ones(5, 2)}


def test_misfits_are_counted_and_the_first_five_named_with_both_shapes():
    model = tiny.model("unet")
    picture = Picture.of(model)
    modules = file_modules(model, "unet")
    bad = [FileModule(f"nowhere.{index}", "lora", SHAPED, 1.0) for index in range(6)]
    bad.insert(1, replace(modules[1], slots=SHAPED))
    with pytest.raises(AdapterMismatchError) as caught:
        inject_modules(model, "ink", [*bad, modules[0], *modules[2:]])
    lines = str(caught.value).splitlines()
    assert lines[0] == "78 of 85 modules of adapter 'ink' fit UNet2DConditionModel; those that do not:"
    assert lines[1] == "  nowhere.0: the model has no such layer (the adapter's delta is (5, 7))"
    assert lines[2] == f"  {modules[1].path}: the adapter's delta is (5, 7), the layer's weight (16, 16)"
    assert lines[6:] == ["  ... and 2 more"]
    picture.require_same(model)


def test_allow_partial_loads_the_rest_and_returns_the_misfits():
    model = tiny.model("cnn")
    before = tiny.output(model, "cnn")
    modules = file_modules(model, "cnn")
    bad = [FileModule("nowhere", "lora", SHAPED, 1.0), replace(modules[1], slots=SHAPED)]
    found = inject_modules(model, "ink", [modules[0], *bad], allow_partial=True)
    assert found == [
        "nowhere: the model has no such layer (the adapter's delta is (5, 7))",
        "1: the adapter's delta is (5, 7), the layer's weight (12, 8)",
    ]
    assert stack_of(model).paths == {"ink": ["0"]}
    assert not torch.equal(tiny.output(model, "cnn"), before)


@pytest.mark.parametrize("modules", [[], [FileModule("nowhere", "lora", SHAPED, 1.0)]])
def test_nothing_that_fits_is_an_error_even_when_a_part_would_do(modules):
    model = tiny.model("cnn")
    picture = Picture.of(model)
    with pytest.raises(AdapterMismatchError, match=rf"0 of {len(modules)} modules of adapter 'ink' fit Sequential"):
        inject_modules(model, "ink", modules, allow_partial=True)
    picture.require_same(model)


@pytest.mark.parametrize("strength", [math.nan, math.inf, -math.inf, 1e9, -101, "much", None])
def test_a_strength_that_is_no_sensible_number_changes_nothing(strength):
    model = tiny.model("cnn")
    picture = Picture.of(model)
    with pytest.raises(ConfigError, match=r"strength of 'a' is .*: give a finite number between -100 and 100"):
        loaded(model, "cnn", strength=strength)
    picture.require_same(model)
    loaded(model, "cnn", strength=0.5)
    merged, out = stack_of(model), tiny.output(model, "cnn")
    with pytest.raises(ConfigError, match="strength of 'a'"):
        merged.set_strength("a", strength)
    assert merged.strengths == {"a": (Strength(0.5),)}
    assert torch.equal(tiny.output(model, "cnn"), out)


def test_a_name_in_use_changes_nothing():
    model = loaded(tiny.model("cnn"), "cnn", "a", seed=1)
    out = tiny.output(model, "cnn")
    with pytest.raises(ConfigError, match="'a' is loaded already; eject it first or choose another name"):
        loaded(model, "cnn", "a", seed=2)
    assert torch.equal(tiny.output(model, "cnn"), out)
    assert stack_of(model).strengths == {"a": (Strength(),)}


def test_an_unknown_algorithm_changes_nothing():
    model = tiny.model("cnn")
    picture = Picture.of(model)
    with pytest.raises(ConfigError, match=r"unknown algorithm 'lorra' \(did you mean 'lora'"):
        inject_modules(model, "a", [replace(file_modules(model, "cnn")[0], algorithm="lorra")])
    picture.require_same(model)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, (1, 1), stride=2), nn.Conv1d(4, 6, 1)])
def test_linear_slots_fit_a_conv_of_one_pixel(layer):
    axes = layer.weight.dim() - 2
    down, up = torch.randn(2, 4), torch.randn(6, 2)
    shaped = {"down": down.view(2, 4, *[1] * axes), "up": up.view(6, 2, *[1] * axes)}
    x = torch.randn(2, 4, *[5] * axes)
    outs = [run_with(layer, slots, x) for slots in ({"down": down, "up": up}, shaped)]
    assert torch.equal(*outs)
    assert not torch.equal(outs[0], layer(x))


def test_conv_slots_of_one_pixel_fit_a_linear():
    down, up, x = torch.randn(2, 4), torch.randn(6, 2), torch.randn(3, 4)
    layer = nn.Linear(4, 6)
    shaped = {"down": down.view(2, 4, 1, 1), "up": up.view(6, 2, 1, 1)}
    assert torch.equal(run_with(layer, {"down": down, "up": up}, x), run_with(layer, shaped, x))


def run_with(layer: nn.Module, slots: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    model = nn.Sequential(layer)
    inject_modules(model, "a", [FileModule("0", "lora", slots, 1.0)])
    try:
        return model(x)
    finally:
        stack_of(model).remove("a")


def test_a_larger_kernel_does_not_fit_one_pixel():
    model = nn.Sequential(nn.Conv2d(4, 6, 1))
    slots = {"down": torch.ones(2, 4, 3, 3), "up": torch.ones(6, 2, 1, 1)}
    with pytest.raises(AdapterMismatchError, match=r"delta is \(6, 4, 3, 3\), the layer's weight \(6, 4, 1, 1\)"):
        inject_modules(model, "a", [FileModule("0", "lora", slots, 1.0)])


def test_slots_of_another_kind_of_layer_do_not_fit_whatever_their_shape():
    model = nn.ModuleDict({"linear": nn.Linear(5, 7), "embedding": nn.Embedding(7, 5)})
    plain = {"down": torch.ones(2, 5), "up": torch.ones(7, 2)}
    embedding = {"embedding_down": torch.ones(2, 7), "embedding_up": torch.ones(5, 2)}
    modules = [FileModule("linear", "lora", embedding, 1.0), FileModule("embedding", "lora", plain, 1.0)]
    with pytest.raises(AdapterMismatchError) as caught:
        inject_modules(model, "a", modules)
    assert "linear: the adapter is for layers of the kind embedding, the layer is of the kind linear" in str(
        caught.value
    )
    assert "embedding: the adapter is for layers of the kind conv or linear" in str(caught.value)


def test_damaged_slots_are_a_misfit_of_their_module():
    model = nn.Sequential(nn.Linear(6, 5))
    slots = {"down": torch.ones(2, 6), "up": torch.ones(5, 3)}
    with pytest.raises(AdapterMismatchError, match=r"0: the slots are not of one rank: down \(2, 6\), up \(5, 3\)"):
        inject_modules(model, "a", [FileModule("0", "lora", slots, 1.0)])


@pytest.mark.parametrize("build", [tiny.clip_text, tiny.clip_text_projected])
def test_clip_paths_fit_with_and_without_the_level_text_model(build):
    model = build()
    own = "encoder.layers.1.mlp.fc1"
    found = next(path for path in stack_of(model).index.layers if path.endswith(own))
    slots = {"down": torch.ones(2, 16), "up": torch.ones(32, 2)}
    for name, path in (("a", own), ("b", f"text_model.{own}")):
        assert inject_modules(model, name, [FileModule(path, "lora", slots, 1.0)]) == []
        assert stack_of(model).paths[name] == [found]


def test_two_modules_of_a_file_for_one_layer_are_an_error():
    model = tiny.model("clip")
    picture = Picture.of(model)
    module = file_modules(model, "clip")[0]
    with pytest.raises(AdapterMismatchError, match="another module of the file is for the same layer, 'encoder"):
        inject_modules(model, "a", [module, replace(module, path=f"text_model.{module.path}")])
    picture.require_same(model)


def test_slots_take_the_dtype_of_a_floating_layer_and_no_gradient():
    model = nn.Sequential(nn.Linear(6, 5)).to(torch.bfloat16)
    slots = {"down": nn.Parameter(torch.ones(2, 6)), "up": torch.ones(5, 2)}
    inject_modules(model, "a", [FileModule("0", "lora", slots, 1.0)])
    held = state_of(model[0]).adapters["a"].slots
    assert all(slot.dtype == torch.bfloat16 and not slot.requires_grad for slot in held.values())
    assert slots["down"].requires_grad


def test_a_module_at_two_paths_is_one_layer_under_either_path():
    shared = nn.Linear(6, 6)
    model = nn.ModuleDict({"first": shared, "second": nn.Sequential(shared)})
    picture = Picture.of(model)
    slots = {"down": torch.ones(2, 6), "up": torch.ones(6, 2)}
    for path in ("first", "second.0"):
        inject_modules(model, path, [FileModule(path, "lora", slots, 1.0)])
        assert stack_of(model).paths[path] == ["first"]
    with pytest.raises(AdapterMismatchError, match="for the same layer, 'first'"):
        inject_modules(model, "c", [FileModule(path, "lora", slots, 1.0) for path in ("first", "second.0")])
    stack_of(model).remove("first")
    loaded_once = shared(torch.ones(1, 6))
    stack_of(model).remove("second.0")
    torch.testing.assert_close(loaded_once - shared(torch.ones(1, 6)), torch.full((1, 6), 12.0))
    assert existing_stack(model) is not None
    del model.__dict__["_vislora_stack"]
    picture.require_same(model)


def test_modules_that_share_a_weight_are_adapted_each_on_its_own():
    model = nn.ModuleDict({"tokens": nn.Embedding(7, 6), "head": nn.Linear(6, 7, bias=False)})
    model["head"].weight = model["tokens"].weight
    x = torch.arange(7)
    before = model["tokens"](x)
    slots = {"down": torch.ones(2, 6), "up": torch.ones(7, 2)}
    inject_modules(model, "a", [FileModule("head", "lora", slots, 1.0)])
    assert torch.equal(model["tokens"](x), before)
    assert not torch.equal(model["head"](before), nn.functional.linear(before, model["tokens"].weight))
    assert model["head"].weight is model["tokens"].weight
    merge(model)
    assert torch.equal(model["tokens"](x), before)
    effect = 2 * before.sum(1, keepdim=True).expand(7, 7)
    torch.testing.assert_close(model["head"](before) - before @ model["tokens"].weight.T, effect, rtol=0, atol=1e-5)
