"""Merged weights: a second buffer, equal to the unmerged layers to rounding, gone when anything changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from tests import tiny
from tests.inject.helpers import Picture, chosen, file_modules, loaded, require_equal_states
from tests.layers import CASES, goes_on
from vislora.inject.engines import merge, unmerge
from vislora.inject.injection import eject, inject_modules
from vislora.inject.layer import state_of
from vislora.inject.stack import stack_of
from vislora.registry import ALGORITHMS


def merged_layers(model: nn.Module) -> int:
    states = [state_of(module) for module in model.modules()]
    return sum(state is not None and state.merged is not None for state in states)


FITTING = [
    (label, name)
    for label, case in CASES.items()
    for name in ALGORITHMS
    if "vector" not in label and goes_on(ALGORITHMS[name], case)
]


@pytest.mark.parametrize(("label", "algorithm"), FITTING)
def test_merged_equals_unmerged(label, algorithm):
    model = nn.Sequential(CASES[label].layer(torch.float64))
    x = CASES[label].input(torch.float64)
    base = model(x)
    inject_modules(model, "a", file_modules(model, "cnn", algorithm=algorithm), 0.6)
    inject_modules(model, "b", file_modules(model, "cnn", seed=1, algorithm=algorithm), -0.3)
    stacked = model(x)
    merge(model)
    assert merged_layers(model) == 1
    torch.testing.assert_close(model(x), stacked, rtol=0, atol=1e-12)
    assert not torch.allclose(stacked, base, atol=1e-3)
    unmerge(model)
    assert torch.equal(model(x), stacked)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_merging_a_model_leaves_its_weights_untouched(name):
    model = tiny.model(name)
    picture, before = Picture.of(model), tiny.output(model, name)
    loaded(model, name)
    stacked = tiny.output(model, name)
    merge(model)
    assert merged_layers(model) == len(chosen(model, name))
    torch.testing.assert_close(tiny.output(model, name), stacked, rtol=1e-3, atol=1e-4)
    require_equal_states(model.state_dict(), picture.state)
    unmerge(model)
    assert torch.equal(tiny.output(model, name), stacked)
    merge(model)
    eject(model, "a")
    assert torch.equal(tiny.output(model, name), before)
    picture.require_same(model)


def test_any_change_drops_the_merged_weight():
    model = tiny.model("cnn")
    loaded(model, "cnn", "a", seed=1)
    merge(model)
    loaded(model, "cnn", "b", seed=2)
    assert merged_layers(model) == 0
    merge(model)
    stack_of(model).set_strength("b", 0.5)
    assert merged_layers(model) == 0
    merge(model)
    eject(model, "a")
    assert merged_layers(model) == 0


def test_merging_twice_starts_from_the_pristine_weight():
    model = loaded(tiny.model("cnn"), "cnn")
    merge(model)
    once = tiny.output(model, "cnn")
    merge(model)
    assert torch.equal(tiny.output(model, "cnn"), once)


def test_merge_and_unmerge_without_adapters_do_nothing():
    model = tiny.model("cnn")
    picture = Picture.of(model)
    merge(model)
    unmerge(model)
    picture.require_same(model)


def test_a_bfloat16_weight_is_merged_with_one_rounding():
    model = nn.Sequential(nn.Linear(64, 32)).to(torch.bfloat16)
    modules = file_modules(model, "cnn")
    inject_modules(model, "a", modules)
    merge(model)
    slots = {key: slot.to(torch.bfloat16).float() for key, slot in modules[0].slots.items()}
    total = model[0].weight.float() + ALGORITHMS["lora"].delta(slots, 0.5, None)
    merged = state_of(model[0]).merged
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, total.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_merged_model_can_change_its_dtype(dtype):
    model = loaded(tiny.model("cnn"), "cnn")
    merge(model)
    expected = tiny.output(model, "cnn")
    out = tiny.output(model.to(dtype), "cnn")
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)


def test_layers_with_a_forward_of_their_own_and_one_byte_weights_stay_unmerged():
    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model = nn.Sequential(Doubled(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    model[2].weight.data = model[2].weight.data.to(torch.float8_e4m3fn)
    inject_modules(model, "a", file_modules(model, "cnn"))
    merge(model)
    assert [state_of(layer).merged is not None for layer in model] == [False, True, False]
    assert {slot.dtype for slot in state_of(model[2]).adapters["a"].slots.values()} == {torch.float32}


def other_state(model: nn.Module) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(5)
    state = model.state_dict()
    return {  # positive, as a variance must be
        key: 0.2 * torch.rand(value.shape, generator=draw) if value.is_floating_point() else value.clone()
        for key, value in state.items()
    }


def copy_in_place(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for key, value in [*model.named_parameters(), *model.named_buffers()]:
            value.copy_(state[key])


def replace_parameters(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    copy_in_place(model, state)  # buffers
    for key in dict(model.named_parameters()):
        parent, _, name = key.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Parameter(state[key].clone()))


WAYS: dict[str, Callable[[nn.Module, Mapping[str, Tensor]], object]] = {
    "load_state_dict": lambda model, state: model.load_state_dict(state),
    "assign": lambda model, state: model.load_state_dict(copy.deepcopy(state), assign=True),
    "copy_": copy_in_place,
    "setattr": replace_parameters,
}
LOADING = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@LOADING
@pytest.mark.parametrize("name", ["cnn", "unet"])
@torch.inference_mode()
def test_new_base_weights_are_merged_anew_and_stay_when_the_adapter_goes(way, name):
    with torch.inference_mode(False):
        model, expected = tiny.model(name), tiny.model(name)
        state = other_state(model)
        expected.load_state_dict(state)
        loaded(model, name)
        merge(model)
        old = tiny.output(model, name)
        way(model, state)
    out = tiny.output(model, name)
    assert merged_layers(model) == len(chosen(model, name))
    base = tiny.output(expected, name)
    merge(loaded(expected, name))
    assert torch.equal(out, tiny.output(expected, name))
    assert not torch.allclose(out, old, atol=1e-3)
    eject(model, "a")
    assert torch.equal(tiny.output(model, name), base)
    require_equal_states(model.state_dict(), state)


def test_what_is_merged_anew_in_inference_mode_serves_passes_with_gradients():
    model, x = nn.Sequential(nn.Linear(6, 5)), torch.ones(2, 6, requires_grad=True)
    inject_modules(model, "a", file_modules(model, "cnn"))
    merge(model)
    copy_in_place(model, other_state(model))
    with torch.inference_mode():
        model(x)
    model(x).sum().backward()
    torch.testing.assert_close(x.grad[0], state_of(model[0]).merged.sum(0))


def test_a_merged_weight_is_not_computed_again_without_need():
    model = loaded(tiny.model("cnn"), "cnn")
    merge(model)
    before = [state_of(model[index]).merged for index in (0, 1, 5)]
    tiny.output(model, "cnn")
    model.requires_grad_(False).train().eval()
    tiny.output(model, "cnn")
    assert all(state_of(model[index]).merged is merged for index, merged in zip((0, 1, 5), before, strict=True))


@torch.no_grad()
def test_weights_loaded_into_a_compiled_merged_model():
    torch._dynamo.reset()
    model, x = nn.Sequential(nn.Linear(6, 5)), torch.ones(2, 6)
    inject_modules(model, "a", file_modules(model, "cnn"))
    merge(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    old = compiled(x)
    model.load_state_dict(other_state(model))
    torch.testing.assert_close(compiled(x), model(x))
    assert not torch.allclose(compiled(x), old, atol=1e-3)
    torch._dynamo.reset()
