"""FLUX.1: guidance as an input, a shift that grows with the picture, and the source image of Kontext."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from PIL import Image

from tests import tiny
from tests.formats.dit_configs import OTHERS
from vislora.inject.targets import Target, select
from vislora.models.base import load_family
from vislora.models.parts import grid_ids, pack, unpack

torch.set_num_threads(1)
CPU = torch.device("cpu")
PROMPTS = ["a red cat", "the house"]


@cache
def loaded(name="flux"):
    return load_family(tiny.saved(name), torch.float32, CPU)


def calls_of(family, **settings):
    """Run the pipeline; return ((hidden states, output), t) of each step."""
    seen = []
    hook = family.components["denoiser"].register_forward_hook(
        lambda _, args, kwargs, out: seen.append((kwargs["hidden_states"], out[0])), with_kwargs=True
    )
    try:
        with torch.no_grad():
            family.pipeline(prompt=PROMPTS, num_inference_steps=3, output_type="latent", **settings)
    finally:
        hook.remove()
    assert len(seen) == 3
    return list(zip(seen, family.pipeline.scheduler.timesteps, strict=True))


def test_packing_is_that_of_the_pipeline():
    latents = torch.randn(2, 4, 6, 10, generator=torch.Generator().manual_seed(0))
    tokens = pack(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 2, 4, 6, 10))
    assert torch.equal(unpack(tokens, 6, 10), latents)
    ids = FluxPipeline._prepare_latent_image_ids(2, 3, 5, CPU, torch.float32)
    assert torch.equal(grid_ids(latents), ids)
    assert torch.equal(grid_ids(latents, first=1)[:, 0], torch.ones(15))


@pytest.mark.parametrize("side", [32, 64, 128, 192])
def test_the_shift_is_that_of_the_pipeline(side):
    family = loaded()
    mu = calculate_shift((side // 2) ** 2)
    sigma = family.pipeline.scheduler.time_shift(mu, 1.0, np.array([0.1, 0.5, 0.9]))
    shift = family.objective.shift.of(side, side)
    for u, expected in zip((0.1, 0.5, 0.9), sigma, strict=True):
        assert shift * u / (1 + (shift - 1) * u) == pytest.approx(expected, rel=1e-12)


def test_larger_pictures_are_trained_at_more_noise():
    objective = loaded().objective
    small, large = (
        objective.sample_t((4096, 16, side, side), torch.Generator().manual_seed(0)).median() for side in (32, 128)
    )
    assert large > small + 50


def test_schnell_has_no_guidance_and_takes_four_steps():
    family = loaded("flux-schnell")
    assert (family.traits.steps, family.traits.guidance_scale) == (4, 1.0)
    assert family.traits.tags["modelspec.architecture"] == "flux-1-schnell/lora"
    with torch.no_grad():
        conditioning = family.encode_prompt(PROMPTS)
    for (hidden, out), t in calls_of(family, width=16, height=16):
        with torch.no_grad():
            predicted = family.predict(unpack(hidden, 8, 8), t.expand(2), conditioning)
        assert (predicted - unpack(out, 8, 8)).abs().max() <= 1e-6


def test_dev_tells_its_pipeline_defaults():
    traits = loaded().traits
    assert (traits.steps, traits.guidance_scale, traits.size_step, traits.resolution) == (28, 3.5, 8, 16)


def test_kontext_sees_its_source_as_the_pipeline_shows_it():
    family = loaded("flux-kontext")
    assert family.traits.tags["modelspec.architecture"] == "flux-1-kontext/lora"
    source = Image.fromarray(np.arange(16 * 24 * 3, dtype=np.uint8).reshape(16, 24, 3))
    pixels = torch.tensor(np.asarray(source)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        conditioning = {**family.encode_prompt(PROMPTS), "source": family.encode_image(pixels).expand(2, -1, -1, -1)}
    calls = calls_of(family, image=source, guidance_scale=1.0, width=16, height=16, max_area=256, _auto_resize=False)
    for (hidden, out), t in calls:
        with torch.no_grad():
            predicted = family.predict(unpack(hidden[:, :16], 8, 8), t.expand(2), conditioning)
        assert hidden.shape[1] == 16 + 24
        assert (predicted - unpack(out[:, :16], 8, 8)).abs().max() <= 1e-5
    alone = family.predict(unpack(hidden[:, :16], 8, 8), t.expand(2), family.encode_prompt(PROMPTS))
    assert (alone - predicted).abs().max() > 1e-3


# 19 double blocks: 8 attention, 4 feed-forward and 2 modulation layers each; 38 single ones: 3, 2 and 1
LAYERS = {
    "attention": 19 * 8 + 38 * 3,
    "attention-ff": 19 * (8 + 4) + 38 * (3 + 2),
    "all": 19 * (8 + 4 + 2) + 38 * (3 + 2 + 1),
}


@pytest.mark.parametrize("preset", LAYERS)
def test_presets_at_full_size(preset):
    with torch.device("meta"):
        model = FluxTransformer2DModel(**OTHERS["flux"].config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_901_408_320
    assert len(select(model, [], preset, Target("", 8))) == LAYERS[preset]
