"""Hooks, copies, casts, compilation, sharing: whatever other code does to a model, an adapter is on, then gone."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from accelerate import Accelerator
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.state import AcceleratorState
from diffusers.hooks import HookRegistry
from diffusers.hooks import ModelHook as DiffusersHook
from torch import Tensor, nn

from tests import tiny
from tests.inject.helpers import loaded, randomise, require_equal_states, training
from vislora.errors import AdapterMismatchError
from vislora.inject.injection import FileModule, FreshOptions, eject, inject_modules, merge
from vislora.inject.layer import Dropout
from vislora.inject.targets import adaptable


def with_accelerate(model: nn.Module, hook: Callable[[], ModelHook]) -> None:
    for layer in adaptable(model).values():
        add_hook_to_module(layer, hook())


def without_accelerate(model: nn.Module) -> None:
    remove_hook_from_module(model, recurse=True)


def with_diffusers(model: nn.Module) -> None:
    for layer in adaptable(model).values():
        HookRegistry.check_if_exists_or_initialize(layer).register_hook(DiffusersHook(), "test")


def without_diffusers(model: nn.Module) -> None:
    for layer in adaptable(model).values():
        HookRegistry.check_if_exists_or_initialize(layer).remove_hook("test")


HOOKS = {
    "accelerate": (lambda model: with_accelerate(model, ModelHook), without_accelerate),
    "accelerate-align": (
        lambda model: with_accelerate(model, lambda: AlignDevicesHook(execution_device="cpu")),
        without_accelerate,
    ),
    "diffusers": (with_diffusers, without_diffusers),
}
EVERY_HOOK = pytest.mark.parametrize("hooks", HOOKS)


@pytest.fixture
def expected() -> tuple[Tensor, Tensor]:
    """The outputs of the tiny UNet as it is and with the adapter."""
    return tiny.output(tiny.model("unet"), "unet"), tiny.output(loaded(tiny.model("unet"), "unet"), "unet")


@EVERY_HOOK
def test_hooked_first_then_adapted(hooks, expected):
    add, remove = HOOKS[hooks]
    model = tiny.model("unet")
    add(model)
    loaded(model, "unet")
    assert torch.equal(tiny.output(model, "unet"), expected[1])
    eject(model, "a")
    assert torch.equal(tiny.output(model, "unet"), expected[0])
    remove(model)
    assert torch.equal(tiny.output(model, "unet"), expected[0])


@EVERY_HOOK
def test_adapted_first_then_hooked(hooks, expected):
    add, remove = HOOKS[hooks]
    model = loaded(tiny.model("unet"), "unet")
    add(model)
    assert torch.equal(tiny.output(model, "unet"), expected[1])
    remove(model)
    assert torch.equal(tiny.output(model, "unet"), expected[1])
    eject(model, "a")
    assert torch.equal(tiny.output(model, "unet"), expected[0])


@EVERY_HOOK
def test_hooks_that_come_and_go_around_an_adapter(hooks, expected):
    add, remove = HOOKS[hooks]
    model = loaded(tiny.model("unet"), "unet")
    add(model)
    eject(model, "a")
    assert torch.equal(tiny.output(model, "unet"), expected[0])
    loaded(model, "unet")
    remove(model)
    assert torch.equal(tiny.output(model, "unet"), expected[1])
    eject(model, "a")
    assert torch.equal(tiny.output(model, "unet"), expected[0])


def test_a_forward_that_nobody_knows_is_refused_and_nothing_is_left():
    model = tiny.model("unet")
    layer = model.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    layer.forward = lambda x: x
    with pytest.raises(AdapterMismatchError, match=r"attn1\.to_q' has a forward of its own"):
        loaded(model, "unet")
    assert not any("_vislora" in key for module in model.modules() for key in module.__dict__)


def test_a_deep_copy_is_independent(expected):
    model = loaded(tiny.model("unet"), "unet")
    twin = copy.deepcopy(model)
    eject(model, "a")
    assert torch.equal(tiny.output(twin, "unet"), expected[1])
    eject(twin, "a")
    assert torch.equal(tiny.output(twin, "unet"), expected[0])
    assert {type(module) for module in twin.modules()} == {type(module) for module in model.modules()}


@pytest.mark.parametrize("way", ["pickle", "torch"])
def test_an_adapted_model_survives_pickling(way, expected):
    model = loaded(tiny.model("unet"), "unet")
    if way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        twin = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert torch.equal(tiny.output(twin, "unet"), expected[1])
    eject(twin, "a")
    assert torch.equal(tiny.output(twin, "unet"), expected[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_cast_after_loading(dtype):
    layer = nn.Sequential(nn.Linear(8, 8))
    slots = {"down": torch.randn(2, 8), "up": torch.randn(8, 2)}
    inject_modules(layer, "a", [FileModule("0", "lora", slots, 0.5)])
    layer.to(dtype)
    x = torch.randn(4, 8, dtype=dtype)
    out = layer(x)
    assert out.dtype == dtype
    wanted = x.double() @ (layer[0].weight.double() + 0.5 * (slots["up"] @ slots["down"]).double()).T
    assert torch.allclose(
        out.double(), wanted + layer[0].bias.double(), rtol=0.05, atol=0.15 if dtype != torch.float64 else 1e-5
    )


@pytest.mark.parametrize("compile_first", [True, False])
def test_compiled(compile_first, expected):
    model = tiny.model("unet")
    compiled = torch.compile(model, backend="eager")
    if compile_first:
        assert torch.allclose(tiny.output(compiled, "unet"), expected[0], atol=1e-6)
    loaded(model, "unet")
    assert torch.allclose(tiny.output(compiled, "unet"), expected[1], atol=1e-6)
    eject(model, "a")
    assert torch.allclose(tiny.output(compiled, "unet"), expected[0], atol=1e-6)


@pytest.mark.parametrize("name", ["unet", "sd3"])
def test_gradient_checkpointing_gives_the_same_gradients(name):
    found = []
    for checkpointing in (False, True):
        model = tiny.model(name)
        adapters = randomise(training(model, name))
        if checkpointing:
            model.enable_gradient_checkpointing()
        tiny.output(model, name).square().mean().backward()
        found.append(
            {key: parameter.grad for key, parameter in adapters.named_parameters() if parameter.grad is not None}
        )
    assert found[0].keys() == found[1].keys()
    assert found[0]
    assert all(torch.allclose(found[0][key], found[1][key], rtol=1e-4, atol=1e-7) for key in found[0])


def test_a_parametrized_layer():
    layer = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)))
    x, slots = torch.randn(3, 6), {"down": torch.randn(2, 6), "up": torch.randn(6, 2)}
    before = layer(x)
    inject_modules(layer, "a", [FileModule("0", "lora", slots, 1.0)])
    assert torch.allclose(layer(x), before + x @ slots["down"].T @ slots["up"].T, atol=1e-5)
    eject(layer, "a")
    assert torch.equal(layer(x), before)


def test_a_layer_at_two_paths_is_adapted_once():
    shared = nn.Linear(6, 6)
    model = nn.ModuleDict({"one": shared, "two": shared})
    slots = {"down": torch.randn(2, 6), "up": torch.randn(6, 2)}
    inject_modules(model, "a", [FileModule("two", "lora", slots, 1.0)])
    x = torch.randn(3, 6)
    assert torch.equal(model["one"](x), model["two"](x))
    assert not torch.equal(model["one"](x), nn.functional.linear(x, shared.weight, shared.bias))


def test_layers_that_share_a_weight_keep_their_own_adapters():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    before = model[1](torch.ones(1, 6))
    inject_modules(model, "a", [FileModule("0", "lora", {"down": torch.ones(1, 6), "up": torch.ones(6, 1)}, 1.0)])
    merge(model)
    assert torch.equal(model[1](torch.ones(1, 6)), before)
    assert torch.allclose(model[0](torch.ones(1, 6)) - model[0].bias, before - model[1].bias + 6.0, atol=1e-5)


def test_dropouts_are_on_in_training_only():
    model = tiny.model("cnn")
    adapters = randomise(training(model, "cnn", FreshOptions(dropout=Dropout(0.3, 0.3, 0.3))))
    first, second = tiny.output(model, "cnn"), tiny.output(model, "cnn")
    assert not torch.equal(first, second)
    adapters.eval()
    assert torch.equal(tiny.output(model, "cnn"), tiny.output(model, "cnn"))


def test_an_adapter_set_goes_through_accelerate():
    model = tiny.model("clip")
    adapters = training(model, "clip")
    assert not any("." in key for key, _ in adapters.named_parameters())
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(adapters, torch.optim.SGD(adapters.parameters(), lr=1.0))
    accelerator.backward(tiny.output(model, "clip").square().mean())
    before = {path: slots for path, _, slots in adapters.modules_with_slots()}
    optimizer.step()
    after = {path: slots for path, _, slots in accelerator.unwrap_model(prepared).modules_with_slots()}
    assert any(not torch.equal(before[path]["up"], after[path]["up"]) for path in before)
    require_equal_states(
        {path: slots["down"] for path, slots in before.items()}, {path: slots["down"] for path, slots in after.items()}
    )
    AcceleratorState._reset_state(reset_partial_state=True)
