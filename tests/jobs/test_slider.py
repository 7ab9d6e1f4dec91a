"""Sliders: what their settings refuse, the loss by its formula, runs that lead to either end."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import vislora
from tests import tiny
from tests.jobs.train_helpers import notes, trained
from vislora.config.train import TrainConfig
from vislora.data.captions import at_end
from vislora.errors import ConfigError
from vislora.inject.targets import Target, select
from vislora.inject.trained import FreshOptions, inject_fresh
from vislora.models.base import load_family
from vislora.training.loss import DenoisingLoss, LossOptions

torch.set_num_threads(1)
CPU = torch.device("cpu")
SLIDER = {"more": "{caption}, blue", "less": "a red {caption}", "captions": ["a cat", "a house"], "pictures": 3}


def test_a_caption_stands_within_an_end():
    assert at_end("a cat", "old {caption}, {caption}!") == "old a cat, a cat!"
    assert at_end("", "{caption}, ink") == "ink"
    assert at_end("a cat", "{caption}") == "a cat"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "data.folder: required, but not given"),
        ({"slider": {"more": "{caption}, x"}}, "data.folder: required, but not given"),
        ({"slider": {"captions": ["a cat"]}}, "slider: more is required"),
        ({"slider": {"more": "smiling", "captions": ["a cat"]}}, "slider: more must have {caption}"),
        ({"slider": {"more": "{caption}", "captions": ["a cat"]}}, "more and less are the same"),
        ({"slider": SLIDER, "data": {"folder": "x"}}, "slider.captions: are drawn where there is no data.folder"),
        ({"slider": SLIDER, "data": {"masks": "x"}}, "data.masks: is for the images of data.folder"),
        ({"slider": SLIDER, "prior": {"captions": ["x"]}}, "prior: a slider learns from the base's own predictions"),
    ],
)
def test_settings_that_go_with_no_slider_are_told(settings, told):
    with pytest.raises(ConfigError) as caught:
        TrainConfig.of(settings)
    assert told in str(caught.value)


def test_the_target_is_the_base_moved_by_the_difference_of_both_ends():
    family = load_family(tiny.saved("sd"), torch.float32, CPU)
    denoiser = family.components["denoiser"]
    draw = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 4, 8, 8, generator=draw)
    captions = {"": ["a cat", "a dog"], "more_": ["a blue cat", "a blue dog"], "less_": ["a red cat", "ink"]}
    with torch.no_grad():
        texts = {of: family.encode_prompt(found) for of, found in captions.items()}
        draw = torch.Generator().manual_seed(5)
        noise = torch.randn(latents.shape, generator=draw)
        t = family.objective.sample_t(latents.shape, draw)
        noisy = family.objective.add_noise(latents, noise, t)
        here, more, less = (family.predict(noisy, t, text) for text in texts.values())
        adapters = inject_fresh(denoiser, "t", select(denoiser, [], "all", Target("", 4)), FreshOptions(seed=1))
        for parameter in adapters.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
        mine = family.predict(noisy, t, texts[""])
        batch = {"latents": latents, **{f"{of}text": text for of, text in texts.items()}}
        batch |= {f"{of}captions": found for of, found in captions.items()}
        loss = DenoisingLoss(family, {"denoiser": adapters}, LossOptions(reach=1.7))(
            batch, torch.Generator().manual_seed(5)
        )
    assert loss.item() == pytest.approx((mine - here - 1.7 * (more - less)).square().mean().item(), rel=1e-4)


def slid(root, **settings):
    """Train a slider on the pictures that the tiny base draws."""
    return trained(root, "sd", data={}, slider={**SLIDER}, **settings)


@pytest.mark.quick("True")
@pytest.mark.parametrize("text_encoders", [False, True])
def test_strengths_lead_to_either_end(text_encoders, tmp_path):
    how = {"loop__steps": 60, "optimizer__learning_rate": 1e-2, "adapter__text_encoders": text_encoders}
    value, _ = slid(tmp_path, **how)
    family = load_family(tiny.saved("sd"), torch.float32, CPU)
    x, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([700])

    @torch.no_grad()
    def predicted(caption):
        return family.predict(x, t, family.encode_prompt([caption]))

    here, way = predicted("a cat"), predicted("a cat, blue") - predicted("a red a cat")
    for strength in (1.0, -1.0):
        vislora.load(family.pipeline, value.path, strength, "slider")
        gone = predicted("a cat") - here
        vislora.eject(family.pipeline, "slider")
        assert (gone - strength * way).norm() < 0.8 * way.norm()


def test_the_base_draws_what_is_learned_on_and_each_sample_has_both_ends(tmp_path):
    value, records = slid(tmp_path, sample={"every": 4, "prompts": ["a dog"]})
    run = value.path.parent
    assert len(list((run / "pictures").glob("*.png"))) == 3
    assert any("drawing pictures" in str(record) for record in records)
    with Image.open(run / "samples" / "000004.png") as sheet:
        assert sheet.height > 3 * 160
    assert not (run / "priors").exists()


def test_a_slider_goes_on_to_the_same_bits(tmp_path):
    constant = {"optimizer__schedule": "constant"}
    whole, _ = slid(tmp_path, output=tmp_path / "whole", **constant)
    parted = {"output": tmp_path / "parted", **constant}
    slid(tmp_path, loop__steps=2, **parted)
    parts, records = slid(tmp_path, resume=True, **parted)
    assert "going on from step 2 of 4" in notes(records)
    one, two = load_file(whole.path), load_file(parts.path)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    with pytest.raises(ConfigError, match=r"slider\.reach: 1\.0 in the checkpoint, 2\.0 now"):
        slid(tmp_path, resume=True, slider__reach=2.0, **parted)


def test_a_slider_learns_on_ones_own_images_too(tmp_path):
    more = {"more": "{caption}, blue"}
    settings = {"data__held_out": 0.25, "data__tag_orders": 2, "data__caption_dropout": 0.5}
    value, records = trained(tmp_path, "sd", slider=more, **settings)
    assert value.path.exists()
    assert "loss on held-out images at step 4" in notes(records)
    assert not (value.path.parent / "pictures").exists()
