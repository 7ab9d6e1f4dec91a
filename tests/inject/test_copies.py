"""Copies, files, dtypes, compiled and parametrized layers of adapted models."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from tests import tiny
from tests.inject.helpers import Picture, file_modules, loaded, randomise, training
from vislora.errors import AdapterMismatchError
from vislora.inject.engines import merge
from vislora.inject.injection import FileModule, eject, inject_modules
from vislora.inject.layer import AdapterLayer
from vislora.inject.stack import existing_stack, stack_of
from vislora.inject.targets import Target, adaptable, select


def saved_and_loaded(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", ["cnn", "unet", "clip"])
@torch.no_grad()
def test_a_copy_is_equal_and_independent(how, name):
    model = tiny.model(name)
    before = tiny.output(model, name)
    loaded(model, name, "a", seed=1)
    loaded(model, name, "b", seed=2)
    merge(model)
    stack_of(model).set_strength("b", 0.4)
    out = tiny.output(model, name)
    other = COPIES[how](model)
    assert torch.equal(tiny.output(other, name), out)
    assert not {id(module) for module in other.modules()} & {id(module) for module in model.modules()}
    stack_of(other).set_strength("a", -1.0)
    assert torch.equal(tiny.output(model, name), out)
    eject(model, "a")
    eject(model, "b")
    assert torch.equal(tiny.output(model, name), before)
    stack_of(other).set_strength("a", 1.0)
    assert torch.allclose(tiny.output(other, name), out, atol=1e-5)
    eject(other, "a")
    eject(other, "b")
    assert torch.equal(tiny.output(other, name), before)
    assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
    assert existing_stack(other) is None


def test_a_model_copied_together_with_its_parameters_trains_on_its_own():
    model = tiny.model("cnn")
    adapters = randomise(training(model, "cnn"))
    out = tiny.output(model, "cnn")
    other, others = copy.deepcopy((model, adapters))
    randomise(others, seed=5)
    assert torch.equal(tiny.output(model, "cnn"), out)
    assert not torch.allclose(tiny.output(other, "cnn"), out, atol=1e-4)
    tiny.output(other, "cnn").sum().backward()
    assert all(parameter.grad is not None for parameter in others.parameters())
    assert all(parameter.grad is None for parameter in adapters.parameters())
    eject(other, "fresh")
    assert all(parameter.requires_grad for parameter in other.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_the_model_changes_its_dtype_under_an_adapter(dtype):
    model, plain = tiny.model("cnn"), tiny.model("cnn")
    expected = tiny.output(loaded(model, "cnn"), "cnn")
    out = tiny.output(model.to(dtype), "cnn")
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)
    eject(model, "a")
    assert torch.equal(tiny.output(model, "cnn"), tiny.output(plain.to(dtype), "cnn"))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 0.15)])
def test_a_cast_keeps_the_meaning_of_the_adapter(dtype, tolerance):
    model = nn.Sequential(nn.Linear(8, 8))
    slots = {"down": torch.randn(2, 8), "up": torch.randn(8, 2)}
    inject_modules(model, "a", [FileModule("0", "lora", slots, 0.5)])
    model.to(dtype)
    x = torch.randn(4, 8, dtype=dtype)
    out = model(x)
    assert out.dtype == dtype
    weight = model[0].weight.double() + 0.5 * slots["up"].double() @ slots["down"].double()
    expected = nn.functional.linear(x.double(), weight, model[0].bias.double())
    torch.testing.assert_close(out.double(), expected, rtol=min(tolerance, 0.05), atol=tolerance)


def test_half_and_bfloat16_methods():
    for change in (nn.Module.half, nn.Module.bfloat16, nn.Module.double):
        model = change(loaded(tiny.model("cnn"), "cnn"))
        active = tiny.output(model, "cnn")
        eject(model, "a")
        assert not torch.allclose(active.float(), tiny.output(model, "cnn").float(), atol=1e-2)


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.quick("False")
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("runs_first", [True, False])
@torch.no_grad()
def test_compiled_before_injection(runs_first):
    model = tiny.model("cnn")
    compiled = torch.compile(model, backend="eager")
    before = tiny.output(compiled if runs_first else model, "cnn")
    loaded(model, "cnn")
    adapted = tiny.output(model, "cnn")
    assert not torch.allclose(adapted, before, atol=1e-4)
    torch.testing.assert_close(tiny.output(compiled, "cnn"), adapted, rtol=1e-5, atol=1e-6)
    stack_of(model).set_strength("a", 0.0)
    assert torch.equal(tiny.output(compiled, "cnn"), before)
    stack_of(model).set_strength("a", 0.5)
    half = tiny.output(model, "cnn")
    torch.testing.assert_close(tiny.output(compiled, "cnn"), half, rtol=1e-5, atol=1e-6)
    merge(model)
    torch.testing.assert_close(tiny.output(compiled, "cnn"), half, rtol=1e-3, atol=1e-4)
    eject(model, "a")
    assert torch.equal(tiny.output(compiled, "cnn"), before)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@torch.no_grad()
def test_a_compiled_block_of_a_unet():
    """The whole UNet takes dynamo ten seconds."""
    model = tiny.model("unet")
    before = tiny.output(model, "unet")
    model.down_blocks[0].compile(backend="eager")
    loaded(model, "unet")
    expected = tiny.output(loaded(tiny.model("unet"), "unet"), "unet")
    assert torch.allclose(tiny.output(model, "unet"), expected, atol=1e-6)
    eject(model, "a")
    assert torch.allclose(tiny.output(model, "unet"), before, atol=1e-6)


@pytest.mark.usefixtures("compiler")
@torch.no_grad()
def test_compiled_after_injection():
    model = tiny.model("cnn")
    before = tiny.output(model, "cnn")
    loaded(model, "cnn")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(tiny.output(compiled, "cnn"), tiny.output(model, "cnn"), rtol=1e-5, atol=1e-6)
    eject(model, "a")
    assert torch.equal(tiny.output(compiled, "cnn"), before)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@torch.no_grad()
def test_layers_compiled_in_place():
    model = tiny.model("cnn")
    for layer in model:
        layer.compile(backend="eager")
    before = tiny.output(model, "cnn")
    loaded(model, "cnn")
    adapted = tiny.output(model, "cnn")
    assert torch.equal(adapted, tiny.output(loaded(tiny.model("cnn"), "cnn"), "cnn"))
    for how in COPIES.values():
        assert torch.equal(tiny.output(how(model), "cnn"), adapted)
    eject(model, "a")
    assert torch.equal(tiny.output(model, "cnn"), before)


@pytest.mark.usefixtures("compiler")
@torch.no_grad()
def test_what_torch_compile_returns_has_the_paths_and_the_stack_of_the_model():
    model = tiny.model("vit")
    paths = list(adaptable(model))
    model.layers[0] = torch.compile(model.layers[0], backend="eager")
    compiled = torch.compile(model, backend="eager")
    picture = Picture.of(model)
    assert list(adaptable(compiled)) == list(adaptable(model)) == paths
    loaded(compiled, "vit")
    assert list(existing_stack(model).strengths) == ["a"]
    assert list(select(compiled, [Target("layers.0.mlp.fc1", 2)], "none", Target("", 2))) == ["layers.0.mlp.fc1"]
    eject(model, "a")
    assert existing_stack(compiled) is None
    picture.require_same(model)


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


@torch.no_grad()
def test_a_parametrized_layer():
    model = nn.Sequential(nn.Linear(6, 5))
    x = torch.randn(3, 6)
    parametrize.register_parametrization(model[0], "weight", Doubled())
    picture, before = Picture.of(model), model(x)
    inject_modules(model, "a", file_modules(model, "cnn"))
    active = model(x)
    assert not torch.allclose(active, before, atol=1e-3)
    merge(model)
    torch.testing.assert_close(model(x), active)
    other = copy.deepcopy(model)
    torch.testing.assert_close(other(x), active)
    eject(model, "a")
    assert torch.equal(model(x), before)
    picture.require_same(model)
    parametrize.remove_parametrizations(model[0], "weight", leave_parametrized=False)
    assert type(model[0]) is nn.Linear


def test_a_layer_with_weight_norm_trains_its_adapter():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)))
    picture, x = Picture.of(model), torch.randn(3, 6)
    before = model(x)
    adapters = randomise(training(model, "cnn"))
    slots = dict(adapters.named_parameters())
    out = model(x)
    torch.testing.assert_close(out, before + x @ slots["0:down"].T @ slots["0:up"].T, rtol=0, atol=1e-5)
    out.square().sum().backward()
    assert all(parameter.grad.any() for parameter in adapters.parameters())
    eject(model, "fresh")
    assert torch.equal(model(x), before)
    picture.require_same(model)


@torch.no_grad()
def test_a_layer_parametrized_over_an_adapter_stops_eject_until_that_is_undone():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    x = torch.randn(3, 6)
    picture, before = Picture.of(model), model(x)
    inject_modules(model, "a", file_modules(model, "cnn"))
    active = model(x)
    parametrize.register_parametrization(model[1], "weight", Doubled())
    with pytest.raises(AdapterMismatchError, match=r"layer '1' became a Parametrized.*remove_parametrizations"):
        eject(model, "a")
    assert all(isinstance(layer, AdapterLayer) for layer in model)
    parametrize.remove_parametrizations(model[1], "weight", leave_parametrized=False)
    assert torch.equal(model(x), active)
    eject(model, "a")
    assert torch.equal(model(x), before)
    assert Picture.of(model).classes == picture.classes


def test_layers_accept_their_input_by_name_and_subclasses_more_arguments():
    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
            return factor * super().forward(input)

    model = nn.Sequential(Scaled(6, 5))
    x = torch.randn(3, 6)
    base = model[0](x, factor=3.0)
    slots = {"down": torch.ones(2, 6), "up": torch.ones(5, 2)}
    inject_modules(model, "a", [FileModule("0", "lora", slots, 1.0)])
    effect = 2 * x.sum(1, keepdim=True).expand(3, 5)
    torch.testing.assert_close(model[0](input=x, factor=3.0) - base, effect)
    torch.testing.assert_close(model[0](x, 3.0) - base, effect)
