"""Bases that edit: what the denoiser and the text encoder see of the source image is what the pipeline shows them."""

from __future__ import annotations

import importlib
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

from tests import tiny, tiny_dits
from vislora.errors import ConfigError
from vislora.models import qwen_image
from vislora.models.base import load_family
from vislora.models.sampling import Sampling, Shot, make_images

torch.set_num_threads(1)
CPU = torch.device("cpu")
EDITS = {"qwen-image-edit": "pipeline_qwenimage_edit", "qwen-image-edit-plus": "pipeline_qwenimage_edit_plus"}
SIDE = 64


@cache
def loaded(name):
    family = load_family(tiny.saved(name), torch.float32, CPU)
    if name in EDITS:
        family.pipeline.processor = tiny_dits.SeesImages()
    return family


@pytest.fixture(params=["flux-kontext", "flux2", *EDITS])
def editor(request, monkeypatch):
    """Return a family; pipelines that would bring sources to a million pixels leave them as they are here."""
    name = request.param
    if name in EDITS:
        module = importlib.import_module(f"diffusers.pipelines.qwenimage.{EDITS[name]}")
        size = (SIDE, SIDE) if name.endswith("plus") else (SIDE, SIDE, None)
        monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio: size)
        monkeypatch.setattr(qwen_image, "SEEN", dict.fromkeys(qwen_image.SEEN, SIDE**2))
    return loaded(name)


def picture(seed):
    """Return an image, and its pixels (1, 3, height, width) in [-1, 1]."""
    values = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    return Image.fromarray(values), torch.tensor(values).permute(2, 0, 1)[None].float() / 127.5 - 1


def conditioning(family, pixels, prompt="a red cat"):
    with torch.no_grad():
        if family.traits.source == "latents and text":
            text = family.encode_prompt([prompt], pixels)
        else:
            text = family.encode_prompt([prompt])
        return {**text, "source": family.encode_image(pixels)}


def test_predict_is_what_the_pipeline_computes_from_a_source(editor):
    seen, noisy = [], []
    image, pixels = picture(0)
    scheduler = type(editor.pipeline.scheduler)
    how = Sampling(2, 1.0, SIDE, SIDE)
    before = scheduler.step

    def step(self, predicted, t, sample, *args, **kwargs):
        seen.append((predicted, t))
        noisy.append(sample)
        return before(self, predicted, t, sample, *args, **kwargs)

    scheduler.step = step
    try:
        next(make_images(editor, [Shot("a red cat", "", 0)], how, source=image))
    finally:
        scheduler.step = before
    given = conditioning(editor, pixels)
    shape = given["source"].shape
    for (predicted, t), tokens in zip(seen, noisy, strict=True):
        with torch.no_grad():
            mine = editor.predict(as_latents(editor, tokens, shape), t.expand(1), given)
        assert (mine - as_latents(editor, predicted, shape)).abs().max() < 1e-5
    with torch.no_grad():
        other = editor.predict(as_latents(editor, noisy[-1], shape), t.expand(1), conditioning(editor, picture(1)[1]))
    assert (mine - other).abs().max() > 1e-4


def as_latents(family, tokens, shape):
    from vislora.models.parts import unpack

    if family.card.name == "flux2":
        return tokens.transpose(1, 2).reshape(shape)
    return unpack(tokens, *shape[-2:])


@pytest.mark.parametrize("name", EDITS)
def test_the_text_encoder_sees_the_source(name, monkeypatch):
    monkeypatch.setattr(qwen_image, "SEEN", dict.fromkeys(qwen_image.SEEN, SIDE**2))
    family = loaded(name)
    with torch.no_grad():
        one, other = (family.encode_prompt(["a red cat"], picture(seed)[1])["prompt_embeds"][0] for seed in (0, 1))
        both = family.encode_prompt(["a red cat", "the house"], torch.cat([picture(0)[1], picture(1)[1]]))
    assert one.shape == other.shape
    assert not torch.equal(one, other)
    assert torch.equal(both["prompt_embeds"][0], one)
    assert len(both["prompt_embeds"][1]) != len(one)


@pytest.mark.parametrize(("area", "ratio"), [(1024**2, 1.0), (1024**2, 16 / 9), (384**2, 0.4)])
def test_the_size_that_the_text_encoder_sees_is_the_pipelines(area, ratio):
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_dimensions

    assert qwen_image.seen_size(area, ratio) == calculate_dimensions(area, ratio)[:2]


def test_a_source_that_is_of_no_use_or_missing_is_told():
    how = Sampling(1, 1.0, 16, 16)
    with pytest.raises(ConfigError, match="change: 0 of 1 steps is not one"):
        next(make_images(loaded("sd3"), [Shot("a", "", 0)], how, source=picture(0)[0]))
    how = Sampling(1, 1.0, 16, 16, change=1.0)
    with pytest.raises(ConfigError, match="'sana' makes images from prompts alone: leave --source out"):
        next(make_images(loaded("sana"), [Shot("a", "", 0)], how, source=picture(0)[0]))
    with pytest.raises(ConfigError, match="makes none from a prompt alone: give one with --source"):
        next(make_images(loaded("qwen-image-edit"), [Shot("a", "", 0)], Sampling(1, 1.0, 16, 16)))
