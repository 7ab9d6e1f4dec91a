"""How pipelines are called: guidance as each counts it, negative prompts, samplers that fit."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from tests import tiny, tiny_dits
from vislora.errors import ConfigError
from vislora.models.base import load_family
from vislora.models.flux2 import Flux2
from vislora.models.sampling import Sampling, Shot, cut_off, make_images
from vislora.models.schedulers import scheduler_for
from vislora.registry import FAMILIES

torch.set_num_threads(1)
CPU = torch.device("cpu")


@cache
def loaded(name):
    return load_family(tiny.saved(name), torch.float32, CPU)


def made(name, guidance_scale, negative="", scheduler="auto"):
    side = tiny.side(name)
    how = Sampling(3, guidance_scale, side, side, scheduler)
    return next(iter(make_images(loaded(name), [Shot("a red cat", negative, 0)], how)))[0].tobytes()


def passes(name, guidance_scale, negative=""):
    """Return how many prompts the denoiser sees in a step, one after the other or side by side."""
    seen = []
    hook = (
        loaded(name)
        .components["denoiser"]
        .register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(len(args[0] if args else kwargs["hidden_states"])), with_kwargs=True
        )
    )
    made(name, guidance_scale, negative)
    hook.remove()
    return sum(seen) / 3


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("sdxl-refiner", "flux", "flux2")])
def test_guidance_is_off_at_one_and_on_above(name):
    assert [passes(name, scale) for scale in (1.0, 3.0)] == [1, 2]


@pytest.mark.parametrize("name", ["z-image", "qwen-image"])
def test_the_scale_multiplies_the_difference_to_the_negative_prompt(name):
    """Of any scale, the prediction is the negative prompt's and so many times the step from there to the prompt's."""
    family = loaded(name)
    seen, steps = [], []
    hook = family.components["denoiser"].register_forward_hook(lambda _, args, out: seen.append(out[0]))
    scheduler = type(family.pipeline.scheduler)
    before = scheduler.step
    scheduler.step = lambda self, given, *args, **kwargs: (steps.append(given), before(self, given, *args, **kwargs))[1]
    try:
        made(name, 3.0, "the house")
    finally:
        hook.remove()
        scheduler.step = before
    if name == "z-image":  # both in one pass, with the sign turned
        first, second = (-given.squeeze(1)[None] for given in seen[0])
    else:
        first, second = seen[0], seen[1]
    expected = second + 3.0 * (first - second)
    if name == "qwen-image":  # brought to the length of the prompt's own prediction
        expected = expected * first.norm(dim=-1, keepdim=True) / expected.norm(dim=-1, keepdim=True)
    assert (steps[0] - expected).abs().max() < 1e-5


def test_qwen_image_guides_without_a_negative_prompt_too():
    assert made("qwen-image", 4.0) == made("qwen-image", 4.0, " ") != made("qwen-image", 1.0)


def test_what_a_base_is_used_with_when_nothing_is_said():
    names = ("z-image", "z-image-base", "flux2", "flux2-distilled", "qwen-image", "sana")
    traits = {name: loaded(name).traits for name in names}
    assert {name: (found.steps, found.guidance_scale) for name, found in traits.items()} == {
        "z-image": (8, 1.0),
        "z-image-base": (50, 5.0),
        "flux2": (50, 4.0),
        "flux2-distilled": (4, 1.0),
        "qwen-image": (50, 4.0),
        "sana": (20, 4.5),
    }
    assert traits["z-image"].tags["modelspec.architecture"] == "z-image-turbo/lora"


def test_sana_is_sampled_by_its_own_solver_and_others():
    own = made("sana", 1.0)
    assert own == made("sana", 1.0, scheduler="flow-dpm++")
    assert own != made("sana", 1.0, scheduler="flow-euler")
    assert scheduler_for(loaded("sana").pipeline, "flow-euler").config.shift == 3.0
    with pytest.raises(ConfigError, match=r"scheduler 'dpm\+\+' is of another kind of model; .* flow-dpm"):
        scheduler_for(loaded("sana").pipeline, "dpm++")
    with pytest.raises(ConfigError, match=r"scheduler 'flow-dpm\+\+' is of another kind of model"):
        scheduler_for(loaded("sd3").pipeline, "flow-dpm++")


@pytest.mark.parametrize("name", ["sana", "qwen-image", "z-image", "flux2"])
def test_the_end_of_a_long_prompt_is_told(name):
    family = loaded(name)
    long = "red cat " * 600
    assert cut_off(family, ["a red cat"]) == []
    assert cut_off(family, [long])[0].endswith("red cat")


def test_flux2_dev_predicts_as_its_pipeline_does_at_a_guidance_of_one():
    """Its text encoder (Mistral 3) wants torchvision, so the text features are given to both."""
    import diffusers

    klein = loaded("flux2").pipeline
    pipeline = diffusers.Flux2Pipeline(
        scheduler=klein.scheduler,
        vae=klein.vae,
        text_encoder=None,
        tokenizer=None,
        transformer=tiny_dits.flux2_transformer(guidance_embeds=True),
    )
    pipeline.set_progress_bar_config(disable=True)
    family = Flux2(pipeline, Flux2.describe(tiny.saved("flux2"), pipeline))
    assert family.traits.tags["modelspec.architecture"] == "flux-2-dev/lora"
    text = torch.randn(2, 512, 48, generator=torch.Generator().manual_seed(0))
    seen = []
    hook = pipeline.transformer.register_forward_hook(
        lambda _, args, kwargs, out: seen.append((kwargs["hidden_states"], kwargs["timestep"], out[0])),
        with_kwargs=True,
    )
    with torch.no_grad():
        pipeline(prompt_embeds=text, guidance_scale=1.0, num_inference_steps=2, width=16, height=16)
        hook.remove()
        for tokens, t, out in seen:
            given, expected = (rows.mT.reshape(2, 16, 4, 4) for rows in (tokens, out))
            assert (family.predict(given, t * 1000, {"prompt_embeds": text}) - expected).abs().max() < 1e-5
    assert len(seen) == 2
