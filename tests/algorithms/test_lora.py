"""LoRA's own mathematics: written out by hand, its initial draw, its dropout, and bad slots."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.layers import CASES, drawn
from vislora.algorithms.base import InitOptions, LayerSpec, apply_weight, scale_of
from vislora.algorithms.lora import LORA
from vislora.errors import AdapterFileError, ConfigError


def test_delta_of_a_linear_is_b_times_a():
    down = torch.tensor([[1.0, 2.0, 3.0]])
    up = torch.tensor([[1.0], [-1.0]])
    delta = LORA.delta({"down": down, "up": up}, 0.5, None)
    assert torch.equal(delta, torch.tensor([[0.5, 1.0, 1.5], [-0.5, -1.0, -1.5]]))


def test_delta_of_tucker_is_the_chain_of_three_convs():
    layer = nn.Conv2d(4, 6, 3, padding=1, dtype=torch.float64)
    slots = drawn(layer, LORA, tucker=True)
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    chain = F.conv2d(F.conv2d(F.conv2d(x, slots["down"]), slots["mid"], padding=1), slots["up"])
    torch.testing.assert_close(F.conv2d(x, LORA.delta(slots, 1.0, None), padding=1), chain, rtol=0, atol=1e-12)


def test_tucker_is_for_kernels_larger_than_one_pixel_and_ungrouped_convs():
    options = InitOptions(2, tucker=True)
    assert set(LORA.init(LayerSpec("conv", (6, 4, 3, 3)), options)) == {"down", "up", "mid"}
    assert set(LORA.init(LayerSpec("conv", (6, 4, 1, 1)), options)) == {"down", "up"}
    assert set(LORA.init(LayerSpec("conv", (6, 4, 3, 3), groups=2), options)) == {"down", "up"}
    assert set(LORA.init(LayerSpec("linear", (6, 4)), options)) == {"down", "up"}


@pytest.mark.parametrize("groups", [1, 2])
def test_a_tucker_file_works_on_grouped_convs_too(groups):
    layer = nn.Conv2d(4, 6, 3, padding=1, groups=groups, dtype=torch.float64)
    spec = LayerSpec("conv", tuple(layer.weight.shape))
    generator = torch.Generator().manual_seed(0)
    shapes = {name: slot.shape for name, slot in LORA.init(spec, InitOptions(2, tucker=True)).items()}
    slots = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    x = torch.randn(2, 4, 5, 5, generator=generator, dtype=torch.float64)
    merged = apply_weight(layer, x, layer.weight + LORA.delta(slots, 0.7, None), layer.bias)
    torch.testing.assert_close(LORA.forward(x, layer(x), slots, 0.7, layer, 0.0), merged, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["conv2d-1x1", "linear"])
def test_slots_of_a_1x1_conv_and_of_a_linear_are_exchangeable(name):
    layer, x = CASES[name].layer(torch.float64), CASES[name].input(torch.float64)
    slots = drawn(layer, LORA)
    axes = [] if name == "conv2d-1x1" else [1, 1]
    other = {key: slot.reshape(*slot.shape[:2], *axes) for key, slot in slots.items()}
    out = LORA.forward(x, layer(x), slots, 0.7, layer, 0.0)
    assert torch.equal(LORA.forward(x, layer(x), other, 0.7, layer, 0.0), out)


def test_scale():
    assert scale_of(4.0, 16) == 0.25
    assert scale_of(None, 16) == 1.0
    assert scale_of(None, 16, "alpha/sqrt(r)") == 4.0
    assert scale_of(8.0, 16, "alpha/sqrt(r)") == 2.0
    assert scale_of(8.0, 16, "none") == scale_of(8.0, 16, "constraint") == scale_of(8.0, 16, "ignored") == 1.0


def test_kaiming_draw_is_uniform_within_the_bound_of_the_fan_in():
    spec = LayerSpec("conv", (8, 16, 3, 3))
    down = LORA.init(spec, InitOptions(64, generator=torch.Generator().manual_seed(0)))["down"]
    bound = 1 / math.sqrt(16 * 9)  # sqrt(6 / ((1 + 5) fan_in))
    assert down.abs().max() <= bound
    assert down.abs().max() > 0.99 * bound
    assert abs(down.mean()) < 0.05 * bound
    assert down.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_gaussian_draw_has_a_deviation_of_one_over_the_rank():
    generator = torch.Generator().manual_seed(0)
    slots = LORA.init(LayerSpec("linear", (8, 1000)), InitOptions(16, init="gaussian", generator=generator))
    assert slots["down"].std() == pytest.approx(1 / 16, rel=0.02)
    assert abs(slots["down"].mean()) < 0.002
    assert slots["up"].abs().max() == 0.0


def test_an_unknown_draw_is_an_error():
    with pytest.raises(ConfigError, match="kaiming, gaussian"):
        LORA.init(LayerSpec("linear", (8, 10)), InitOptions(4, init="orthogonal"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "label", ["linear", "linear-tokens-no-bias", "conv1d", "conv2d-grouped", "conv3d", "embedding"]
)
def test_rank_dropout_keeps_the_expectation(label):
    case = CASES[label]
    layer, x = case.layer(), case.input()
    x = x[:1].expand(6000, *x.shape[1:])
    slots = drawn(layer, LORA)
    zero = torch.zeros_like(layer(x))
    expected = LORA.forward(x, zero, slots, 1.0, layer, 0.0)[0]
    torch.manual_seed(0)
    dropped = LORA.forward(x, zero, slots, 1.0, layer, 0.4)
    error = dropped.std(0) / math.sqrt(len(x))
    assert ((dropped.mean(0) - expected).abs() < 5 * error + 1e-6).all()
    assert dropped.std(0).max() > 0.1 * expected.abs().max()


def test_rank_dropout_leaves_out_whole_channels_of_each_sample_its_own():
    layer = nn.Linear(4, 8, bias=False)
    slots = {"down": torch.ones(8, 4), "up": torch.eye(8)}
    x = torch.ones(500, 3, 4)
    torch.manual_seed(0)
    effect = LORA.forward(x, torch.zeros(500, 3, 8), slots, 1.0, layer, 0.25)
    torch.testing.assert_close(effect.unique(), torch.tensor([0.0, 4 / 0.75]))
    assert (effect == effect[:, :1]).all()  # one mask for all tokens of a sample
    assert len(effect[:, 0].unique(dim=0)) > 50
    assert (effect == 0).float().mean() == pytest.approx(0.25, abs=0.03)


def test_rank_dropout_of_an_unbatched_conv_leaves_out_channels_not_rows():
    layer = nn.Conv2d(1, 8, 1, bias=False)
    slots = {"down": torch.ones(8, 1, 1, 1), "up": torch.eye(8).view(8, 8, 1, 1)}
    torch.manual_seed(0)
    effect = LORA.forward(torch.ones(1, 5, 5), torch.zeros(8, 5, 5), slots, 1.0, layer, 0.5)
    assert (effect == effect[:, :1, :1]).all()
    assert 0 < (effect == 0).float().mean() < 1


@pytest.mark.parametrize(
    "slots",
    [
        {"down": torch.zeros(2, 6), "up": torch.zeros(5, 4)},
        {"down": torch.zeros(2, 6, 1, 1), "up": torch.zeros(5, 2, 1, 1), "mid": torch.zeros(2, 3, 3, 3)},
        {"embedding_down": torch.zeros(2, 7), "embedding_up": torch.zeros(5, 3)},
    ],
)
def test_slots_of_different_ranks_are_an_error_that_names_the_shapes(slots):
    with pytest.raises(AdapterFileError, match=r"not of one rank: .*\(2, "):
        LORA.shape(slots)


def test_what_layers_are_described():
    assert LayerSpec.of(nn.Linear(3, 2)) == LayerSpec("linear", (2, 3))
    assert LayerSpec.of(nn.Conv2d(4, 6, (1, 3), groups=2)) == LayerSpec("conv", (6, 2, 1, 3), 2)
    assert LayerSpec.of(nn.Embedding(7, 5)) == LayerSpec("embedding", (7, 5))
    for other in (nn.LayerNorm(3), nn.ConvTranspose2d(3, 3, 1), nn.Bilinear(2, 2, 2), nn.Embedding(7, 5, max_norm=1.0)):
        assert LayerSpec.of(other) is None


def test_no_lora_on_other_layers():
    slots = {"down": torch.zeros(2, 6), "up": torch.zeros(5, 2)}
    with pytest.raises(TypeError, match="LayerNorm"):
        LORA.forward(torch.zeros(1, 6), torch.zeros(1, 5), slots, 1.0, nn.LayerNorm(6), 0.0)
    with pytest.raises(TypeError, match="LayerNorm"):
        apply_weight(nn.LayerNorm(6), torch.zeros(1, 6), torch.zeros(6), None)
