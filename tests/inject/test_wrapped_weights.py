"""Weights that only look like one tensor, as torchao's do: adapters compute beside them, and say why."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vislora.errors import ConfigError
from vislora.inject.engines import explain, merge
from vislora.inject.injection import FileModule, eject, inject_modules
from vislora.inject.targets import Target
from vislora.inject.trained import FreshOptions, inject_fresh

torch.set_num_threads(1)


class Int8Weight(Tensor):
    """Whole numbers and a scale per output; it knows how to multiply, to be moved and to be detached, no more."""

    @staticmethod
    def __new__(cls, numbers, scales, dtype):
        return Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=dtype, device=numbers.device)

    def __init__(self, numbers, scales, dtype):
        self.numbers, self.scales = numbers, scales

    @staticmethod
    def of(weight):
        scales = weight.abs().amax(1, keepdim=True) / 127
        return Int8Weight((weight / scales).round().to(torch.int8), scales, weight.dtype)

    def __tensor_flatten__(self):
        return ["numbers", "scales"], self.dtype

    @staticmethod
    def __tensor_unflatten__(parts, dtype, size, stride):
        return Int8Weight(parts["numbers"], parts["scales"], dtype)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.numbers.to(x.dtype) * weight.scales, *bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return Int8Weight(args[0].numbers, args[0].scales, args[0].dtype)
        raise NotImplementedError(f"{func} of an Int8Weight")


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(8, 6))
    made[0].weight = nn.Parameter(Int8Weight.of(made[0].weight.detach()), requires_grad=False)
    return made


def lora(scale=1.0):
    return [FileModule("0", "lora", {"down": torch.randn(2, 8), "up": torch.randn(6, 2)}, scale)]


def test_an_adapter_computes_beside_it(model):
    x = torch.randn(3, 8)
    base = model(x)
    modules = lora(0.5)
    inject_modules(model, "style", modules, 0.8)
    slots = modules[0].slots
    assert torch.allclose(model(x), base + 0.4 * x @ slots["down"].T @ slots["up"].T, atol=1e-6)
    merge(model)
    assert torch.allclose(model(x), base + 0.4 * x @ slots["down"].T @ slots["up"].T, atol=1e-6)
    assert explain("denoiser", model) == ["denoiser: style: 1 layers stacked: the weight is kept as Int8Weight"]
    eject(model, "style")
    assert torch.equal(model(x), base)


def test_it_can_be_trained_on(model):
    adapters = inject_fresh(model, "fresh", {"0": Target("", 2)}, FreshOptions())
    model(torch.randn(3, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in adapters.parameters())


def test_what_needs_the_weight_says_that_it_is_not_there(model):
    with pytest.raises(ConfigError, match="does not keep as it is"):
        inject_fresh(model, "fresh", {"0": Target("", 2)}, FreshOptions(dora=True))
