"""Declaring strengths: what the parts mean, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from vislora.errors import ConfigError
from vislora.inject.strength import Strength, covers, per_image


def test_the_parts_of_a_strength_are_multiplied():
    strength = Strength(0.8, components={"te": 0.5, "te:clip_g": 0.0}, layers={"mid_block": 0.25, "*.attn2.*": 2.0})
    assert strength.on("denoiser", "down_blocks.0.attn1.to_q") == 0.8
    assert strength.on("denoiser", "mid_block.attentions.0.attn2.to_q") == 0.8 * 0.25  # the first that fits
    assert strength.on("denoiser", "up_blocks.1.attn2.to_q") == 0.8 * 2.0
    assert strength.on("te:clip_l", "encoder.layers.0.mlp.fc1") == 0.8 * 0.5
    assert strength.on("te:clip_g", "encoder.layers.0.mlp.fc1") == 0.0
    assert strength.at(0.3) == 1.0
    assert not strength.is_plain
    assert strength.is_constant
    assert Strength(2).is_plain


@pytest.mark.parametrize(
    ("pattern", "path", "fits"),
    [
        ("down_blocks.1", "down_blocks.1.resnets.0.conv1", True),
        ("down_blocks.1", "down_blocks.10.resnets.0.conv1", False),
        ("down_blocks.*", "down_blocks.1.resnets.0.conv1", True),
        ("*.conv1", "down_blocks.1.resnets.0.conv1", True),
        ("re:.*resnets", "down_blocks.1.resnets.0.conv1", True),
        ("conv1", "down_blocks.1.resnets.0.conv1", False),
    ],
)
def test_a_pattern_covers_layers_and_blocks(pattern, path, fits):
    assert covers(pattern, path) is fits


def test_windows_share_every_step_out():
    first, second = Strength(steps=(0, 0.5)), Strength(steps=(0.5, 1))
    for step in range(11):
        assert first.at(step / 10) + second.at(step / 10) == 1.0
    assert (first.at(0.5), second.at(0.5), second.at(1.0)) == (0.0, 1.0, 1.0)


def test_ramps_are_lines_between_their_points_and_constant_outside():
    ramp = Strength(steps=[(0.2, 1.0), (0.6, 0.5), (0.8, 0.0)])
    found = [ramp.at(progress) for progress in (0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 1.0)]
    assert found == pytest.approx([1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0])
    assert Strength(steps=((0.5, 0.3),)).at(0.9) == 0.3


def test_steps_may_be_any_function_that_gives_numbers():
    assert Strength(steps=math.sin).at(0.5) == math.sin(0.5)
    with pytest.raises(ConfigError, match=r"steps\(0.5\) is nan"):
        Strength(steps=lambda progress: math.nan).at(0.5)


BAD = {
    "value is nan": {"value": math.nan},
    "value is 'x'": {"value": "x"},
    "value is 101": {"value": 101},
    "components is 0.5": {"components": 0.5},
    "components: 'te' is inf": {"components": {"te": math.inf}},
    "layers: 'mid_block' is None": {"layers": {"mid_block": None}},
    "layers: 3 is no name": {"layers": {3: 1.0}},
    "no valid regular expression": {"layers": {"re:(": 1.0}},
    "steps is 0.5": {"steps": 0.5},
    "0 <= from < to <= 1": {"steps": (0.5, 0.2)},
    "steps is ()": {"steps": ()},
    "every point is": {"steps": [(0, 1), (1, 2, 3)]},
    "rises from one to the next": {"steps": [(0.5, 1), (0.5, 0)]},
    "steps is nan": {"steps": (math.nan, 1)},
    "a box is": {"region": (0.5, 0, 0.5, 1)},
    "region is 'x.png'": {"region": "x.png"},
    "height x width": {"region": torch.zeros(2, 3, 5)},
    "numbers outside 0 to 1": {"region": torch.full((4, 4), 1.5)},
}


@pytest.mark.parametrize(("message", "given"), BAD.items(), ids=BAD)
def test_what_cannot_be_is_named(message, given):
    with pytest.raises(ConfigError) as caught:
        Strength(**given)
    assert message in str(caught.value)


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        Strength(math.nan, components={"te": math.nan}, steps=(1, 0))
    assert len(caught.value.problems) == 3


def test_a_region_is_a_box_or_a_mask_of_any_kind():
    array = np.zeros((4, 8), np.uint8)
    array[:, :4] = 255
    masks = [Strength(region=given).region for given in (array, torch.tensor(array), Image.fromarray(array))]
    masks.append(Strength(region=Image.fromarray(array).convert("RGB")).region)
    assert all(mask == masks[0] for mask in masks)
    box = Strength(region=(0, 0, 0.5, 1)).region
    assert torch.equal(box.sized(2, 3), torch.tensor([[1.0, 0.5, 0.0]] * 2))
    assert torch.equal(box.sized(4, 8), masks[0].sized(4, 8))
    assert torch.equal(masks[0].sized(2, 2), torch.tensor([[1.0, 0.0]] * 2))
    assert Strength(region=array) == Strength(region=array.copy()) != Strength(region=1 - array // 255)


def test_masks_of_another_shape_than_the_image_are_refused():
    region = Strength(region=np.ones((512, 512))).region
    region.require_shape(64, 64)
    with pytest.raises(ConfigError, match="mask is 512 x 512, the image has the shape 96 : 64"):
        region.require_shape(64, 96)


def test_strengths_per_image():
    assert per_image("a", 0.5) == (Strength(0.5),)
    assert per_image("a", [0.5, None, Strength(2.0)]) == (Strength(0.5), Strength(0.0), Strength(2.0))
    for bad in ([], [0.5, "x"], "0.5x", [math.nan]):
        with pytest.raises(ConfigError, match="strength of 'a'"):
            per_image("a", bad)


def test_names_that_are_not_there_are_told_with_the_nearest():
    known = {"denoiser": ["down_blocks.0.attn1.to_q", "mid_block.conv"], "te:clip_l": ["encoder.layers.0.mlp.fc1"]}
    Strength(components={"te": 0.5, "te:clip_l": 1}, layers={"encoder.layers.0": 0, "mid_block": 2}).require_known(
        "a", known
    )
    with pytest.raises(ConfigError) as caught:
        Strength(components={"te:clip": 1}, layers={"midblock": 2}).require_known("a", known)
    assert "'a': no component 'te:clip' (did you mean 'te:clip_l'?)" in str(caught.value)
    assert "'a': pattern 'midblock' matches no layer and no block; near misses: mid_block" in str(caught.value)
