"""Offload hooks that put a `forward` into a layer: the adapter is active in both orders, and gone after eject."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import (
    AlignDevicesHook,
    ModelHook,
    add_hook_to_module,
    attach_align_device_hook,
    remove_hook_from_module,
)
from diffusers.hooks import HookRegistry, apply_group_offloading
from diffusers.hooks import ModelHook as DiffusersHook
from diffusers.hooks.layerwise_casting import apply_layerwise_casting
from torch import nn

from tests import tiny
from tests.inject.helpers import Picture, loaded, randomise, training
from vislora.errors import AdapterMismatchError
from vislora.inject.engines import merge
from vislora.inject.injection import eject
from vislora.inject.layer import STATE
from vislora.inject.stack import STACK

Change = Callable[[nn.Module], object]


class Passing(DiffusersHook):
    """Replaces the forward, and calls the one that it replaced."""

    def new_forward(self, module: nn.Module, *args: object, **kwargs: object) -> object:
        return self.fn_ref.original_forward(*args, **kwargs)


def leaves(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding))]


def diffusers_on(model: nn.Module, *hooks: type[DiffusersHook]) -> None:
    for layer in leaves(model):
        registry = HookRegistry.check_if_exists_or_initialize(layer)
        for hook in hooks:
            registry.register_hook(hook(), f"test-{hook.__name__}")


def diffusers_off(model: nn.Module, *hooks: type[DiffusersHook]) -> None:
    for layer in leaves(model):
        for hook in hooks:
            layer._diffusers_hook.remove_hook(f"test-{hook.__name__}")


def accelerate_on(model: nn.Module) -> None:
    for layer in leaves(model):
        add_hook_to_module(layer, ModelHook())


def accelerate_off(model: nn.Module) -> None:
    remove_hook_from_module(model, recurse=True)


def both_on(model: nn.Module) -> None:
    accelerate_on(model)
    diffusers_on(model, DiffusersHook)


def both_off(model: nn.Module) -> None:
    diffusers_off(model, DiffusersHook)
    accelerate_off(model)


HOOKS: dict[str, tuple[Change, Change]] = {
    "accelerate": (accelerate_on, accelerate_off),
    "accelerate-twice": (
        lambda model: [add_hook_to_module(x, ModelHook(), append=True) for x in leaves(model) * 2],
        accelerate_off,
    ),
    "accelerate-align": (
        lambda model: attach_align_device_hook(model, execution_device=torch.device("cpu")),
        accelerate_off,
    ),
    "accelerate-offload": (lambda model: cpu_offload(model, torch.device("cpu")), accelerate_off),
    "accelerate-offload-buffers": (
        lambda model: cpu_offload(model, torch.device("cpu"), offload_buffers=True),
        accelerate_off,
    ),
    "diffusers": (lambda m: diffusers_on(m, DiffusersHook), lambda m: diffusers_off(m, DiffusersHook)),
    "diffusers-new-forward": (lambda m: diffusers_on(m, Passing), lambda m: diffusers_off(m, Passing)),
    "diffusers-two": (
        lambda m: diffusers_on(m, DiffusersHook, Passing),
        lambda m: diffusers_off(m, DiffusersHook, Passing),
    ),
    "accelerate-then-diffusers": (both_on, both_off),
}
BOTH = pytest.mark.parametrize(("on", "off"), HOOKS.values(), ids=HOOKS)


def require_clean(model: nn.Module) -> None:
    plain = (nn.Linear, nn.Conv2d, nn.Embedding)
    assert all(type(layer) in plain for layer in leaves(model))
    assert all(inspect.unwrap(layer.forward) == MethodType(type(layer).forward, layer) for layer in leaves(model))
    assert not any(STATE in module.__dict__ or STACK in module.__dict__ for module in model.modules())


@pytest.fixture(scope="module")
def expected() -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of the UNet without and with the adapter."""
    with torch.no_grad():
        model = tiny.model("unet")
        return tiny.output(model, "unet"), tiny.output(loaded(model, "unet"), "unet")


@BOTH
@pytest.mark.parametrize(
    "steps",
    [
        "hook load eject unhook",
        "load hook unhook eject",
        "hook load unhook eject",
        "load hook eject load unhook eject",
    ],
)
@torch.no_grad()
def test_active_while_loaded_and_gone_after(on, off, steps, expected):
    model = tiny.model("unet")
    base, adapted = expected
    actions = {"hook": on, "unhook": off, "load": lambda m: loaded(m, "unet"), "eject": lambda m: eject(m, "a")}
    active = False
    for step in steps.split():
        actions[step](model)
        active = step == "load" or (active and step != "eject")
        assert torch.equal(tiny.output(model, "unet"), adapted if active else base), step
    require_clean(model)


@BOTH
@torch.no_grad()
def test_eject_under_hooks_that_came_after(on, off, expected):
    model = loaded(tiny.model("unet"), "unet")
    on(model)
    assert torch.equal(tiny.output(model, "unet"), expected[1])
    eject(model, "a")
    assert torch.equal(tiny.output(model, "unet"), expected[0])
    require_clean(model)
    loaded(model, "unet")
    assert torch.equal(tiny.output(model, "unet"), expected[1])
    eject(model, "a")
    off(model)
    assert torch.equal(tiny.output(model, "unet"), expected[0])
    require_clean(model)


@pytest.mark.parametrize("first", ["hook", "load"])
@torch.no_grad()
def test_merged_under_offload_stays_unmerged_where_the_weight_is_away(first, expected):
    model = tiny.model("unet")
    if first == "load":
        loaded(model, "unet")
    cpu_offload(model, torch.device("cpu"))
    if first == "hook":
        loaded(model, "unet")
    merge(model)
    assert torch.equal(tiny.output(model, "unet"), expected[1])


@torch.no_grad()
def test_merged_before_offload_stays_active(expected):
    model = loaded(tiny.model("unet"), "unet")
    merge(model)
    merged = tiny.output(model, "unet")
    cpu_offload(model, torch.device("cpu"))
    assert torch.equal(tiny.output(model, "unet"), merged)
    eject(model, "a")
    assert torch.equal(tiny.output(model, "unet"), expected[0])


@pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
@pytest.mark.parametrize("first", ["hook", "load", "merge"])
@torch.no_grad()
def test_group_offloading(first, level, disk, tmp_path, expected):
    """Without a stream it runs from the CPU to the CPU; on the disk, weights in memory are noise between forwards."""
    model, out = tiny.model("unet"), expected[1]
    if first != "hook":
        loaded(model, "unet")
    if first == "merge":
        merge(model)
        out = tiny.output(model, "unet")
    where = {"onload_device": torch.device("cpu"), "offload_to_disk_path": str(tmp_path) if disk else None}
    apply_group_offloading(model, offload_type=level, num_blocks_per_group=1, **where)
    if first == "hook":
        loaded(model, "unet")
    for _ in range(2):
        assert torch.equal(tiny.output(model, "unet"), out)
        merge(model)  # with the weights away that changes nothing
    eject(model, "a")
    assert torch.equal(tiny.output(model, "unet"), expected[0])
    assert bool(list(tmp_path.iterdir())) == disk
    require_clean(model)


@pytest.mark.parametrize("first", ["hook", "load"])
@torch.no_grad()
def test_weights_kept_in_eight_bits(first):
    model = tiny.model("unet")
    if first == "load":
        loaded(model, "unet")
    apply_layerwise_casting(model, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    if first == "hook":
        loaded(model, "unet")
    active = tiny.output(model, "unet")
    merge(model)
    assert torch.equal(tiny.output(model, "unet"), active)
    eject(model, "a")
    base = tiny.output(model, "unet")
    assert not torch.allclose(base, active, atol=1e-4)
    plain = tiny.model("unet")
    apply_layerwise_casting(plain, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert torch.equal(tiny.output(plain, "unet"), base)


@pytest.mark.parametrize(
    "on", [accelerate_on, lambda m: diffusers_on(m, DiffusersHook)], ids=["accelerate", "diffusers"]
)
def test_gradients_reach_the_adapter_under_hooks(on):
    grads = []
    for change in (lambda _: None, on):
        model = tiny.model("unet")
        change(model)
        adapters = randomise(training(model, "unet"))
        tiny.output(model, "unet").square().sum().backward()
        grads.append([parameter.grad for parameter in adapters.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def own_function(layer: nn.Module) -> None:
    layer.forward = lambda x: x


def own_method(layer: nn.Module) -> None:
    layer.forward = MethodType(lambda self, x: x, layer)


def wrapper_of_the_captured_method(layer: nn.Module) -> None:
    captured = layer.forward
    layer.forward = functools.wraps(captured)(lambda x: 2 * captured(x))


def method_over_an_accelerate_hook(layer: nn.Module) -> None:
    add_hook_to_module(layer, AlignDevicesHook(torch.device("cpu")))
    own_function(layer)


FOREIGN = [own_function, own_method, wrapper_of_the_captured_method, method_over_an_accelerate_hook]


@pytest.mark.parametrize("patch", FOREIGN)
def test_an_unknown_forward_is_refused_and_nothing_changed(patch):
    model = tiny.model("cnn")
    patch(model[7])
    forward, picture = model[7].forward, Picture.of(model)
    message = (
        r"layer '7' has a forward of its own \(from .*\) that would bypass an adapter; remove it, load the adapter"
    )
    with pytest.raises(AdapterMismatchError, match=message):
        loaded(model, "cnn")
    picture.require_same(model)
    assert model[7].forward == forward


@pytest.mark.parametrize("patch", FOREIGN)
def test_an_unknown_forward_put_over_an_adapter_stops_eject_before_it_begins(patch):
    model = loaded(tiny.model("cnn"), "cnn")
    patch(model[7])
    picture = Picture.of(model)
    with pytest.raises(AdapterMismatchError, match=r"layer '7' .*remove it, eject the adapter, then install it again"):
        eject(model, "a")
    with pytest.raises(AdapterMismatchError, match="remove it, load the adapter"):
        loaded(model, "cnn", "b")
    picture.require_same(model)
    model[7].__dict__.pop("forward")
    eject(model, "a")
    require_clean(model)
