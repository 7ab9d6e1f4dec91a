"""Images that start from an image: as diffusers makes them, for every family; adapters, recipes, what is refused."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image
from PIL import Image, ImageDraw

from tests import tiny
from tests.jobs.test_generate import adapters  # noqa: F401
from vislora.errors import ConfigError
from vislora.jobs.generate import generate
from vislora.jobs.recipes import read_recipe
from vislora.jobs.sources import read_source
from vislora.models.base import load_family
from vislora.models.sampling import Sampling, Shot, make_images
from vislora.models.schedulers import scheduler_for
from vislora.registry import FAMILIES

torch.set_num_threads(1)
CPU = torch.device("cpu")
NONE = {"pixart", "sana", "lumina2", "auraflow"}
"""Families that diffusers has no such pipeline for."""
EDIT = {"flux2"}
"""Families all of whose bases edit."""


@pytest.fixture
def source(tmp_path):
    image = Image.new("RGB", (48, 40), "white")
    ImageDraw.Draw(image).ellipse((8, 8, 30, 30), fill="red")
    image.save(tmp_path / "source.png")
    return tmp_path / "source.png"


def how(family, **more):
    side = tiny.side(family)
    return {"base": str(tiny.saved(family)), "device": "cpu", "width": side, "height": side, "steps": 4, **more}


def pixels(picture):
    return np.asarray(picture.image)


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - NONE - EDIT - {"sdxl-refiner"}))
def test_it_is_what_diffusers_makes(name, source, tmp_path):
    (made,) = generate(
        prompt=("a red cat",), output=tmp_path, source=source, change=0.5, guidance_scale=1.0, seed=3, **how(name)
    )
    family = load_family(tiny.saved(name), torch.float32, CPU)
    pipe = AutoPipelineForImage2Image.from_pipe(family.pipeline)
    pipe.set_progress_bar_config(disable=True)
    side = tiny.side(name)
    known = inspect.signature(type(pipe).__call__).parameters
    asked = {"width": side, "height": side, **family.card.always, family.card.guidance: family.card.guidance_off}
    pipe.scheduler = scheduler_for(family.pipeline, "auto")
    theirs = pipe(
        "a red cat",
        image=read_source(source, side, side),
        strength=0.5,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(3),
        **{key: value for key, value in asked.items() if key in known},
    ).images[0]
    assert np.array_equal(pixels(made), np.asarray(theirs))


@pytest.mark.parametrize("name", ["sd", "sdxl-refiner", "sd3"])
def test_a_batch_is_its_single_images_and_the_source_counts(name, source):
    family = load_family(tiny.saved(name), torch.float32, CPU)
    side = tiny.side(name)
    sampling = Sampling(4, 1.0, side, side, change=0.5)
    shots = [Shot("a red cat", "", 1), Shot("a house", "", 2)]
    shown = read_source(source, side, side)
    (both,) = make_images(family, shots, sampling, 2, shown)
    singly = [images[0] for images in make_images(family, shots, sampling, 1, shown)]
    for one, other in zip(both, singly, strict=True):
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1
    (others,) = make_images(family, shots, sampling, 2, Image.new("RGB", (side, side)))
    assert all(not np.array_equal(one, other) for one, other in zip(both, others, strict=True))


def test_an_image_is_made_again_from_its_recipe(source, tmp_path, adapters):  # noqa: F811
    stack = (f"{adapters}/sd-a.safetensors:0.7",)
    (made,) = generate(prompt=("a cat",), output=tmp_path / "out", source=source, adapter=stack, **how("sd"))
    recipe = read_recipe(made.path)
    assert (recipe.source.path, recipe.sampling.change) == (str(source), 0.6)
    assert "Denoising strength: 0.6" in Image.open(made.path).text["parameters"]
    (again,) = generate(like=made.path, output=tmp_path / "again", device="cpu")
    assert np.array_equal(pixels(made), pixels(again))
    (more,) = generate(prompt=("a cat",), output=tmp_path, source=source, change=1.0, adapter=stack, **how("sd"))
    assert not np.array_equal(pixels(made), pixels(more))
    Image.new("RGB", (40, 40)).save(source)
    with pytest.raises(ConfigError, match=r"source\.png, has changed since"):
        generate(like=made.path, output=tmp_path / "again", device="cpu")


def test_steps_count_from_the_beginning_of_the_schedule(source, tmp_path, adapters):  # noqa: F811
    def made(name, stack):
        given = {"prompt": ("a cat",), "source": source, "change": 0.5, "stack": stack}
        return pixels(generate(output=tmp_path / name, **given, **how("sd", steps=8))[0])

    row = {"adapter": f"{adapters}/sd-a.safetensors", "components": {"te": 0}}
    base = made("base", ())
    early, late = (made(name, ({**row, "steps": steps},)) for name, steps in (("a", [0, 0.4]), ("b", [0.5, 1])))
    assert np.array_equal(base, early)
    assert not np.array_equal(base, late)


@pytest.mark.parametrize("name", sorted(NONE))
def test_families_that_cannot_say_so(name, source, tmp_path):
    with pytest.raises(ConfigError, match=f"family '{name}' makes images from prompts alone"):
        generate(prompt=("a",), output=tmp_path / "out", source=source, **how(name))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("sd", {"change": 0.5}, "there is no image to start from"),
        ("sdxl-refiner", {}, "refines images and makes none from a prompt alone"),
        ("flux-kontext", {"source": "source.png", "change": 0.5}, "this base edits the image"),
        ("sd", {"source": "source.png", "change": 0.2}, "0.2 of 4 steps is not one"),
    ],
)
def test_what_does_not_go_together_is_told(name, given, message, source, tmp_path):
    given = {**given, **({"source": source} if "source" in given else {})}
    with pytest.raises(ConfigError, match=message):
        generate(prompt=("a",), output=tmp_path / "out", **given, **how(name))
    assert not (tmp_path / "out").exists()
