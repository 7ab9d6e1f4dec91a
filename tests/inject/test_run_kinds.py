"""DoRA, changes of biases and norms, and whole new weights at run time: with every strength, merged, and taken out."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.models.t5.modeling_t5 import T5LayerNorm

from tests import tiny
from tests.inject.helpers import Picture, chosen
from tests.layers import CASES, drawn, goes_on
from vislora.algorithms.base import LayerSpec
from vislora.algorithms.dora import decomposed
from vislora.errors import AdapterMismatchError
from vislora.inject.engines import merge, unmerge
from vislora.inject.injection import FileModule, eject, inject_modules
from vislora.inject.layer import state_of
from vislora.inject.stack import settle, stack_of
from vislora.inject.strength import Strength
from vislora.inject.targets import index
from vislora.registry import ALGORITHMS


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dora(layer: nn.Module, axis: str, algorithm: str = "lora") -> FileModule:
    slots = drawn(layer, ALGORITHMS[algorithm])
    width = layer.weight.shape[0 if axis == "out" else 1]
    return FileModule("0", algorithm, slots, 0.5, magnitude=1.0 + 0.3 * numbers(width), axis=axis)


def set_strength(model: nn.Module, strength: object) -> None:
    stack_of(model).set_strength("a", strength)
    settle(model)


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


KINDS = [label for label in CASES if "grouped" not in label and "depthwise" not in label and "embedding" not in label]


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr"])
@pytest.mark.parametrize("label", ["linear-tokens-no-bias", "conv2d", "conv3d"])
@torch.no_grad()
def test_dora_is_the_weight_that_its_paper_tells(label, algorithm, axis):
    case = CASES[label]
    if not goes_on(ALGORITHMS[algorithm], case):
        pytest.skip("no such layer")
    model, x = nn.Sequential(case.layer(torch.float64)), case.input(torch.float64)
    plain = copy.deepcopy(model)
    module = dora(model[0], axis, algorithm)
    inject_modules(model, "a", [module], 0.7)
    stacked = model(x)
    merge(model)
    close(model(x), stacked)
    weight = plain[0].weight
    direction = ALGORITHMS[algorithm].delta(module.slots, 0.5, weight).reshape(weight.shape)
    plain[0].weight += 0.7 * decomposed(weight, direction, module.magnitude, axis)
    close(stacked, plain(x))


@pytest.mark.parametrize("label", KINDS)
@torch.no_grad()
def test_changes_of_biases(label):
    case = CASES[label]
    model, x = nn.Sequential(case.layer(torch.float64)), case.input(torch.float64)
    picture, before = Picture.of(model), model(x)
    bias = numbers(model[0].weight.shape[0])
    only = FileModule("0", "full", {}, 1.0, bias=bias)
    both = FileModule("0", "lora", drawn(model[0], ALGORITHMS["lora"]), 0.5, bias=bias)
    kernel = x.dim() - 2 if "unbatched" not in label else 2
    effect = bias if isinstance(model[0], nn.Linear) else bias.reshape(-1, *[1] * kernel)
    inject_modules(model, "a", [only], -0.5)
    close(model(x), before - 0.5 * effect)
    eject(model, "a")
    inject_modules(model, "a", [replace(both, bias=None)], 2.0)
    without = model(x)
    eject(model, "a")
    inject_modules(model, "a", [both], 2.0)
    close(model(x), without + 2.0 * effect)
    merge(model)
    close(model(x), without + 2.0 * effect)
    eject(model, "a")
    assert torch.equal(model(x), before)
    picture.require_same(model)


NORMS = {
    "layer": (nn.LayerNorm(6, eps=1e-3), (3, 4, 6)),
    "layer-no-bias": (nn.LayerNorm(6, bias=False), (3, 6)),
    "group": (nn.GroupNorm(2, 6), (3, 6, 4, 5)),
    "rms": (nn.RMSNorm(6), (3, 4, 6)),
    "t5": (T5LayerNorm(6), (3, 4, 6)),
}


@pytest.mark.parametrize("kind", ["norm", "set"])
@pytest.mark.parametrize(("norm", "size"), NORMS.values(), ids=NORMS)
@torch.no_grad()
def test_changes_of_norms(norm, size, kind):
    model, x = nn.Sequential(copy.deepcopy(norm).double()), numbers(*size, seed=1)
    model[0].weight.copy_(1 + 0.2 * numbers(6, seed=2))
    picture, before = Picture.of(model), model(x)
    own = getattr(model[0], "bias", None)
    plain = copy.deepcopy(model)
    given = numbers(6, seed=3)
    slots = {"w_norm": given} if kind == "norm" else {"set_weight": given}
    module = FileModule("0", kind, slots, 1.0, bias=None if own is None else numbers(6, seed=4))
    inject_modules(model, "a", [module], 0.5)
    plain[0].weight += 0.5 * (given if kind == "norm" else given - plain[0].weight)
    if own is not None:
        plain[0].bias += 0.5 * module.bias
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-6)  # T5's norm computes in float32
    changed = model(x)
    merge(model)
    assert torch.equal(model(x), changed)
    set_strength(model, [0.0, 0.5, 1.0])
    assert torch.equal(model(x)[0], before[0])
    close(model(x)[1], changed[1])
    eject(model, "a")
    assert torch.equal(model(x), before)
    picture.require_same(model)


def test_norms_of_real_models_are_found():
    for name in ("unet", "clip", "t5", "vit", "flux"):
        assert index(tiny.model(name)).norms, name
    assert all(LayerSpec.of_norm(module).kind == "norm" for module in index(tiny.model("flux")).norms.values())


@torch.no_grad()
def test_what_does_not_fit_is_named_with_both_sizes():
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5))
    for module, message in (
        (FileModule("0", "full", {}, 1.0, bias=numbers(6)), r"change of the bias is \(6,\), the layer has 5 outputs"),
        (FileModule("1", "norm", {"w_norm": numbers(6)}, 1.0), r"delta is \(6,\), the layer's weight \(5,\)"),
        (FileModule("0", "norm", {"w_norm": numbers(5)}, 1.0), r"delta is \(5,\), the layer's weight \(5, 6\)"),
        (FileModule("1", "lora", drawn(model[0], ALGORITHMS["lora"]), 1.0), "the layer's weight"),
        (FileModule("2", "full", {}, 1.0, bias=numbers(6)), "the model has no such layer"),
    ):
        with pytest.raises(AdapterMismatchError, match=message):
            inject_modules(model, "a", [module])
    assert state_of(model[0]) is state_of(model[1]) is None


@pytest.mark.parametrize(
    "algorithm", ["lora", "loha", "lokr", "full", "oft", "boft", "oft_peft", "ia3", "glora", "set"]
)
@torch.no_grad()
def test_every_algorithm_on_its_own_image_and_region(algorithm):
    """Rows with strengths of their own equal a call of their own; the masked half of a grid the other strength."""
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1)).double()
    x = numbers(3, 4, 4, 4)
    if algorithm == "set":
        slots = {"set_weight": numbers(8, 4, 3, 3, seed=5)}
    else:
        slots = drawn(model[0], ALGORITHMS[algorithm], rank=2)
    inject_modules(model, "a", [FileModule("0", algorithm, slots, 0.5)])
    alone = {}
    for strength in (1.0, -0.5):
        set_strength(model, strength)
        alone[strength] = model(x)
    set_strength(model, [1.0, None, -0.5])
    mixed = model(x)
    close(mixed[0], alone[1.0][0])
    close(mixed[2], alone[-0.5][2])
    set_strength(model, 0.0)
    base = model(x)
    assert torch.equal(mixed[1], base[1])
    set_strength(model, Strength(region=(0.0, 0.0, 0.5, 1.0)))
    masked = model(x)
    close(masked[..., :2], alone[1.0][..., :2])
    assert torch.equal(masked[..., 2:], base[..., 2:])
    unmerge(model)


@torch.no_grad()
def test_dora_of_a_real_file_is_the_base_with_its_delta():
    model = tiny.model("unet")
    plain = copy.deepcopy(model)
    layers = dict(model.named_modules())
    found = [
        replace(dora(layers[path], "out"), path=path)
        for path in chosen(model, "unet")
        if not isinstance(layers[path], nn.Embedding)
    ]
    inject_modules(model, "a", found, 0.8)
    for module in found:
        weight = dict(plain.named_modules())[module.path].weight
        delta = ALGORITHMS["lora"].delta({k: v.double() for k, v in module.slots.items()}, 0.5, None)
        change = decomposed(weight.double(), delta.reshape(weight.shape), module.magnitude, "out")
        weight.copy_(weight.double() + 0.8 * change)
    torch.testing.assert_close(tiny.output(model, "unet"), tiny.output(plain, "unet"), rtol=1e-3, atol=1e-4)
