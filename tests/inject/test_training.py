"""Fresh adapters: their parameters' home, dropouts, precision, checkpointing, and Accelerate."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from tests import tiny
from tests.inject.helpers import chosen, randomise, training
from vislora.algorithms.base import LayerSpec
from vislora.errors import ConfigError
from vislora.inject.layer import state_of
from vislora.inject.parts import Dropout
from vislora.inject.targets import Target, adaptable, select
from vislora.inject.trained import FreshOptions, inject_fresh, summary


def test_parameters_have_names_without_dots_and_live_outside_the_base():
    model = tiny.model("unet")
    adapters = training(model, "unet")
    names = [name for name, _ in adapters.named_parameters()]
    assert "down_blocks/0/attentions/0/proj_in:down" in names
    assert not [name for name in names if "." in name]
    assert len(names) == 2 * len(adapters.trained) == len(adapters.state_dict())
    base = {id(parameter) for parameter in model.parameters()}
    assert not base & {id(parameter) for parameter in adapters.parameters()}
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in adapters.parameters())


def test_rank_alpha_and_rule_per_layer():
    model = tiny.model("cnn")
    targets = [Target("1", 4, 2.0), Target("2", 4)]
    layers = select(model, targets, "every-layer", Target("", 2, 1.0))
    adapters = inject_fresh(model, "fresh", layers, FreshOptions(rule="alpha/sqrt(r)"))
    scales = {path: state_of(model.get_submodule(path)).adapters["fresh"].scale for path in ("1", "2", "11")}
    assert scales == {"1": 1.0, "2": 2.0, "11": pytest.approx(1 / math.sqrt(2))}
    assert adapters.trained["2"].alpha == 4.0
    assert adapters.trained["1"].rule == "alpha/sqrt(r)"
    assert dict(adapters.named_parameters())["1:down"].shape == (4, 8)


def test_tucker_and_gaussian_reach_the_slots():
    model = tiny.model("unet")
    adapters = training(model, "unet", FreshOptions(tucker=True, init="gaussian"))
    convs = [path for path, layer in adaptable(model).items() if LayerSpec.of(layer).weight_shape[2:] == (3, 3)]
    mids = [name for name, _ in adapters.named_parameters() if name.endswith(":mid")]
    assert len(mids) == len(set(convs) & set(adapters.trained)) > 0
    downs = torch.cat([p.detach().flatten() for name, p in adapters.named_parameters() if name.endswith(":down")])
    assert downs.std() == pytest.approx(0.5, rel=0.05)  # 1 / rank


def test_a_seed_fixes_the_draw_whatever_was_drawn_before():
    states = []
    for seed, junk in ((1, 0), (1, 5), (2, 0)):
        torch.rand(junk)
        states.append(training(tiny.model("cnn"), "cnn", FreshOptions(seed=seed)).state_dict())
    one, again, other = states
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert not torch.equal(one["1:down"], other["1:down"])


def test_slots_are_detached_copies():
    adapters = training(tiny.model("cnn"), "cnn")
    for path, trained, slots, _ in adapters.modules_with_slots():
        assert trained == adapters.trained[path]
        for name, slot in slots.items():
            own = dict(adapters.named_parameters())[f"{path}:{name}"]
            assert torch.equal(slot, own)
            assert not slot.requires_grad
            assert slot.data_ptr() != own.data_ptr()


def test_parameters_loaded_into_the_set_reach_the_model():
    model = tiny.model("cnn")
    adapters = training(model, "cnn")
    before = tiny.output(model, "cnn")
    other = randomise(training(tiny.model("cnn"), "cnn")).state_dict()
    adapters.load_state_dict(other)
    assert not torch.allclose(tiny.output(model, "cnn"), before, atol=1e-4)
    adapters.to(torch.float64)
    assert next(iter(adapters.parameters())).dtype == torch.float64
    assert tiny.output(model, "cnn").dtype == torch.float32


def test_a_name_in_use_leaves_flags_as_they_were():
    model = tiny.model("cnn")
    adapters = training(model, "cnn")
    model.requires_grad_(True)
    with pytest.raises(ConfigError, match="loaded already"):
        training(model, "cnn")
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert len(list(adapters.parameters())) == 14


@pytest.mark.parametrize("name", ["unet", "sd3", "cnn"])
def test_a_bfloat16_base_with_float32_adapters_is_bit_equal_when_fresh(name):
    model = tiny.model(name).to(torch.bfloat16)
    inputs = {key: as_bfloat16(value) for key, value in tiny.MODELS[name][1]().items()}
    run = (lambda: model(inputs["input"])) if name == "cnn" else (lambda: model(**inputs)[0])
    before = run()
    adapters = training(model, name)
    assert torch.equal(run(), before)
    randomise(adapters)
    out = run()
    assert out.dtype == torch.bfloat16
    assert not torch.equal(out, before)
    out.float().square().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in adapters.parameters())


def as_bfloat16(value: torch.Tensor) -> torch.Tensor:
    return value.to(torch.bfloat16) if value.is_floating_point() else value


@pytest.mark.parametrize("name", tiny.MODELS)
def test_under_autocast_a_fresh_adapter_is_bit_equal_and_trains(name):
    frozen = tiny.model(name).requires_grad_(False)
    model = tiny.model(name)
    adapters = training(model, name)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tiny.output(model, name), tiny.output(frozen, name))
        out = tiny.output(model, name)
    out.float().square().sum().backward()
    assert all(p.grad is not None for key, p in adapters.named_parameters() if "add_q_proj" not in key)
    randomise(adapters)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(tiny.output(model, name), tiny.output(frozen, name))


@pytest.mark.parametrize("name", ["unet", "sd3", "clip", "vit"])
def test_gradient_checkpointing_gives_the_same_gradients(name):
    grads = []
    for checkpointed in (False, True):
        model = tiny.model(name).train()
        dropout = Dropout(input=0.1, rank=0.2, module=0.1)
        adapters = randomise(training(model, name, FreshOptions(dropout=dropout)))
        if checkpointed and hasattr(model, "enable_gradient_checkpointing"):
            model.enable_gradient_checkpointing()
        elif checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        tiny.output(model, name).square().sum().backward()
        grads.append({key: p.grad for key, p in adapters.named_parameters() if p.grad is not None})
    plain, checkpointed = grads
    assert plain.keys() == checkpointed.keys()
    for key in plain:
        torch.testing.assert_close(checkpointed[key], plain[key], rtol=1e-4, atol=1e-5)


DROPOUTS = pytest.mark.parametrize(
    "dropout", [Dropout(input=0.3), Dropout(rank=0.3), Dropout(module=0.3), Dropout(0.3, 0.3, 0.3)]
)


@DROPOUTS
def test_dropout_is_off_in_eval_and_on_in_training(dropout):
    model = tiny.model("cnn")
    adapters = randomise(training(model, "cnn", FreshOptions(dropout=dropout)))
    assert adapters.training
    torch.manual_seed(0)
    assert len({tuple(tiny.output(model, "cnn").flatten().tolist()) for _ in range(10)}) > 3
    assert adapters.eval() is adapters
    state = torch.get_rng_state()
    assert torch.equal(tiny.output(model, "cnn"), tiny.output(model, "cnn"))
    assert torch.equal(torch.get_rng_state(), state)
    without = tiny.model("cnn")
    randomise(training(without, "cnn"))
    assert torch.equal(tiny.output(model, "cnn"), tiny.output(without, "cnn"))


@DROPOUTS
def test_dropout_keeps_the_expectation(dropout):
    model = nn.Sequential(nn.Linear(6, 4)).double()
    adapters = randomise(training(model, "cnn", FreshOptions(dropout=dropout)))
    x = torch.randn(1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    base = nn.functional.linear(x, model[0].weight, model[0].bias)
    adapters.eval()
    effect = model(x) - base
    adapters.train()
    torch.manual_seed(0)
    with torch.no_grad():
        drawn = torch.cat([model(x) - base for _ in range(4000)])
    error = drawn.std(0) / math.sqrt(len(drawn))
    assert ((drawn.mean(0) - effect).abs() < 5 * error).all()
    assert (error > 0).all()


@pytest.fixture
def accelerate_state():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("accelerate_state")
def test_accelerate_trains_a_wrapper_of_model_and_adapters():
    class Wrapper(nn.Module):
        def __init__(self, base: nn.Module, adapters: nn.Module) -> None:
            super().__init__()
            self.__dict__["base"] = base  # not registered: only the adapters train
            self.adapters = adapters

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.base(tokens).square().mean()

    model = tiny.model("cnn")
    wrapper = Wrapper(model, training(model, "cnn"))
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(wrapper.parameters(), lr=1e-2)
    prepared, optimizer = accelerator.prepare(wrapper, optimizer)
    tokens, losses = tiny.cnn_inputs()["input"], []
    for _ in range(5):
        loss = prepared(tokens)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.99 * losses[0]
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.usefixtures("accelerate_state")
def test_accelerate_prepares_the_adapters_themselves():
    model = tiny.model("clip")
    adapters = training(model, "clip")
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(adapters, torch.optim.SGD(adapters.parameters(), lr=1.0))
    accelerator.backward(tiny.output(model, "clip").square().mean())
    before = {path: slots for path, _, slots, _ in adapters.modules_with_slots()}
    optimizer.step()
    after = {path: slots for path, _, slots, _ in accelerator.unwrap_model(prepared).modules_with_slots()}
    assert any(not torch.equal(before[path]["up"], after[path]["up"]) for path in before)
    # while the up projections are zero, no gradient reaches the down projections
    assert all(torch.equal(before[path]["down"], after[path]["down"]) for path in before)


def test_summary_counts_layers_and_parameters():
    model = tiny.model("cnn")
    layers = chosen(model, "cnn")
    adapters = training(model, "cnn")
    trainable = sum(parameter.numel() for parameter in adapters.parameters())
    base = sum(parameter.numel() for parameter in model.parameters())
    expected = f"denoiser: {len(layers)} layers, {trainable:,} trainable parameters ({100 * trainable / base:.2f} % of "
    assert summary({"denoiser": model}, {"denoiser": adapters}) == [f"{expected}{base:,})"]
