"""DoRA in training: no effect when fresh, PEFT's output and gradients, what files hold, and what cannot have it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vislora
from tests import tiny
from tests.inject.helpers import as_dora, training
from vislora.errors import ConfigError
from vislora.formats.adapter_file import DORA_ON
from vislora.inject.layer import state_of
from vislora.inject.targets import Target
from vislora.inject.trained import FreshOptions, inject_fresh
from vislora.jobs.modules import adapt, save_adapter
from vislora.registry import TRAINED

torch.set_num_threads(1)
DORA = FreshOptions(dora=True)


class Net(nn.Module):
    """A strided conv (batch, 3, 8, 8), a pointwise one, and two linear layers, one without a bias."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.point = nn.Conv2d(4, 4, 1)
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 5, bias=False)

    def forward(self, x):
        hidden = self.point(torch.relu(self.conv(x))).mean((2, 3))
        return self.second(torch.relu(self.first(hidden)))


LAYERS = ("conv", "point", "first", "second")
INPUT = tiny.seeded(lambda: torch.randn(2, 3, 8, 8), 1)


def net() -> Net:
    return tiny.seeded(Net, 0)


def on_net(options: FreshOptions = DORA, algorithm: str = "lora"):
    model = net()
    adapters = inject_fresh(model, "a", {path: Target("", 2, algorithm=algorithm) for path in LAYERS}, options)
    return model, adapters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["unet", "sd3"])
def test_a_fresh_one_leaves_the_output_bit_equal(name, dtype):
    model = tiny.model(name).to(dtype)
    inputs = {
        key: value.to(dtype) if value.is_floating_point() else value for key, value in tiny.MODELS[name][1]().items()
    }
    before = model(**inputs)[0]
    adapters = training(model, name, DORA)
    assert len(adapters.magnitudes()) == len(adapters.trained)
    assert all(magnitude.dtype == torch.float32 for magnitude in adapters.magnitudes())
    assert torch.equal(model(**inputs)[0], before)
    as_dora(adapters)
    assert not torch.equal(model(**inputs)[0], before)
    with adapters.resting():
        assert torch.equal(model(**inputs)[0], before)


def in_peft(adapters) -> nn.Module:
    """Return the same network in PEFT's hands, with the same slots and magnitudes."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=list(LAYERS), use_dora=True)
    other = peft.get_peft_model(net(), config)
    own = dict(adapters.named_parameters())
    with torch.no_grad():
        for path in LAYERS:
            layer = other.base_model.model.get_submodule(path)
            layer.lora_A.default.weight.copy_(own[f"{path}:down"])
            layer.lora_B.default.weight.copy_(own[f"{path}:up"])
            magnitude = layer.lora_magnitude_vector.default.weight
            torch.testing.assert_close(magnitude.flatten(), fresh_magnitude(path))
            magnitude.copy_(own[f"{path}:magnitude"].reshape(magnitude.shape))
    return other


def fresh_magnitude(path: str) -> torch.Tensor:
    return net().get_submodule(path).weight.detach().flatten(1).norm(dim=1)


def test_outputs_and_gradients_are_pefts():
    model, adapters = on_net()
    other = in_peft(as_dora(adapters))
    mine, theirs = model(INPUT), other(INPUT)
    torch.testing.assert_close(mine, theirs)
    for out in (mine, theirs):
        out.square().sum().backward()
    own = dict(adapters.named_parameters())
    for path in LAYERS:
        layer = other.base_model.model.get_submodule(path)
        pairs = {
            "down": layer.lora_A.default.weight,
            "up": layer.lora_B.default.weight,
            "magnitude": layer.lora_magnitude_vector.default.weight,
        }
        for slot, parameter in pairs.items():
            grad = own[f"{path}:{slot}"].grad
            assert grad.abs().max() > 0
            torch.testing.assert_close(grad, parameter.grad.reshape(grad.shape), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("algorithm", sorted(DORA_ON))
def test_the_effect_in_training_is_that_of_the_weight(algorithm):
    model, adapters = on_net(algorithm=algorithm)
    as_dora(adapters)
    trained = model(INPUT)
    merged = net()
    with torch.no_grad():
        for path in LAYERS:
            layer = merged.get_submodule(path)
            layer.weight += state_of(model.get_submodule(path)).adapters["a"].delta(layer.weight)
    torch.testing.assert_close(trained, merged(INPUT))


@pytest.mark.parametrize(
    ("algorithm", "dora"),  # five outputs are none for a butterfly
    [*((name, False) for name in TRAINED if name != "boft"), *((name, True) for name in sorted(DORA_ON))],
)
def test_under_autocast_a_layer_gives_the_type_that_it_gave(algorithm, dora):
    model, adapters = on_net(FreshOptions(dora=dora), algorithm)
    kinds = []
    for path in LAYERS:
        model.get_submodule(path).register_forward_hook(lambda layer, x, out: kinds.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(INPUT).float().sum().backward()
    assert kinds == [torch.bfloat16] * len(LAYERS)
    assert all(parameter.grad.dtype == torch.float32 for parameter in adapters.parameters())


def test_what_peft_reads_is_what_was_trained(tmp_path):
    peft = pytest.importorskip("peft")
    model = net()
    adapters = as_dora(adapt(model, LAYERS, 2, dora=True))
    trained = model(INPUT).detach()
    save_adapter(adapters, tmp_path / "a")
    torch.testing.assert_close(peft.PeftModel.from_pretrained(net(), tmp_path / "a")(INPUT), trained)
    again = net()
    vislora.load(again, tmp_path / "a")
    torch.testing.assert_close(again(INPUT), trained)


def test_a_strength_scales_the_whole_change():
    model, adapters = on_net()
    base = net()(INPUT)
    as_dora(adapters)
    layer = state_of(model.second).adapters["a"]
    hidden = tiny.seeded(lambda: torch.randn(3, 6), 2)
    whole = model.second(hidden) - net().second(hidden)
    layer.strengths = (0.5,)
    torch.testing.assert_close(model.second(hidden) - net().second(hidden), 0.5 * whole)
    assert not torch.allclose(model(INPUT), base)


def test_weight_decay_leaves_magnitudes_alone():
    from vislora.training.optim import ParameterGroup, make_optimizer

    _, adapters = on_net()
    as_dora(adapters)
    before = [magnitude.detach().clone() for magnitude in adapters.magnitudes()]
    slots = [slot.detach().clone() for slot in adapters.slots()]
    groups = [ParameterGroup(adapters.slots(), 0.1), ParameterGroup(adapters.magnitudes(), 0.1, decays=False)]
    optimizer = make_optimizer("adamw", groups, 0.5)
    for parameter in adapters.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(before, adapters.magnitudes(), strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(slots, adapters.slots(), strict=True))


def test_a_layer_of_another_kind_is_refused_and_nothing_stays():
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 2))
    with pytest.raises(ConfigError, match="'dora' fits layers of the kind conv or linear"):
        inject_fresh(model, "a", {"1": Target("", 2), "0": Target("", 2)}, DORA)
    assert type(model[1]) is nn.Linear
    assert all(parameter.requires_grad for parameter in model.parameters())
