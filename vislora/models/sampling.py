"""Making images with a loaded family: the one call behind `generate` and the previews of `train`."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image
from torch import nn

from vislora.errors import ConfigError
from vislora.models.base import Card, Family, quiet, tokenizers_of
from vislora.models.emphasis import as_read, emphasised
from vislora.models.parts import image_step
from vislora.models.schedulers import scheduler_for


@dataclass(frozen=True)
class Shot:
    """One image to make. Its noise depends on its own `seed` alone, never on the batch that it is in."""

    prompt: str
    negative_prompt: str
    seed: int


@dataclass(frozen=True)
class Sampling:
    """How images are made. `width`, `height`: pixels. `guidance_scale` 1 turns guidance off.

    `change`: of an image that they start from, how much of the schedule is run on it, in (0, 1]. `eta`: how much noise
    is added between steps, in [0, 1], by a sampler that can be told.
    """

    steps: int
    guidance_scale: float
    width: int
    height: int
    scheduler: str = "auto"
    change: float | None = None
    eta: float = 0.0


def make_images(
    family: Family, shots: Sequence[Shot], how: Sampling, batch_size: int = 1, source: Image | None = None
) -> Iterator[list[Image]]:
    """Yield the PIL images of each batch of `shots` in order. The family's own scheduler is put back afterwards.

    `source`: the image to edit or to start from, for every shot; where the text encoder sees it too, `batch_size` must
    be 1. Weights in prompts: see `models.emphasis`. Raises `ConfigError` as `pipeline_for` and `weighed` do.
    """
    pipeline = pipeline_for(family, source is not None, how)
    for start in range(0, len(shots), batch_size):
        batch = shots[start : start + batch_size]
        prompts = as_read(family, [shot.prompt for shot in batch])
        against = as_read(family, [shot.negative_prompt for shot in batch])
        with quiet(), torch.inference_mode(), _scheduler(family, how.scheduler), emphasised(family, prompts, against):
            pipeline.scheduler = family.pipeline.scheduler
            asked = {**_sized(family, pipeline, how), **_shown(how, source, len(batch))}
            asked |= _guided(family.card, [prompt.text for prompt in against], how)
            made = pipeline(
                prompt=[prompt.text for prompt in prompts],
                generator=[torch.Generator("cpu").manual_seed(shot.seed) for shot in batch],
                num_inference_steps=how.steps,
                **asked,
            )
        yield made.images


def pipeline_for(family: Family, given: bool, how: Sampling) -> Any:
    """Return the pipeline that makes images, from one that is `given` or from none.

    Raises `ConfigError` for an image that the base has no use for, or for none where it needs one.
    """
    kind, change = family.traits.source, how.change
    if not given and (kind == "latents and text" or not family.card.from_text):
        verb, samples = ("edits", "") if kind else ("refines", "; train without samples")
        raise ConfigError(
            f"this base {verb} images and makes none from a prompt alone: give one with --source{samples}"
        )
    if not given and change is not None:
        raise ConfigError("change: there is no image to start from: give one with --source")
    if kind and change is not None:
        raise ConfigError("change: this base edits the image of --source, and the prompt says how: leave it out")
    if kind or not given:
        return family.pipeline
    if how.steps * (change or 0.0) < 1.0:
        raise ConfigError(f"change: {change or 0:g} of {how.steps} steps is not one: give more of either")
    return _from_images(family)


def _from_images(family: Family) -> Any:
    """Return the pipeline of the same modules that starts from an image with noise on it, instead of noise alone.

    Meng et al., SDEdit (arXiv 2108.01073). Raises `ConfigError` for a family that diffusers has none for.
    """
    from diffusers import AutoPipelineForImage2Image

    if not family.card.from_text:
        return family.pipeline
    with quiet():
        try:
            made = AutoPipelineForImage2Image.from_pipe(family.pipeline)
        except ValueError:
            raise ConfigError(
                f"a base of family '{family.card.name}' makes images from prompts alone: leave --source out"
            ) from None
    made.set_progress_bar_config(disable=True)
    return made


def _sized(family: Family, pipeline: Any, how: Sampling) -> dict[str, Any]:
    """Return what every call is given, as far as the pipeline has it: size, noise, and the family's own."""
    known = inspect.signature(type(pipeline).__call__).parameters
    more = {**family.card.always, **family.traits.always, family.card.area: how.width * how.height}
    more |= {"width": how.width, "height": how.height, "eta": how.eta}
    return {name: value for name, value in more.items() if name in known}


def _shown(how: Sampling, source: Image | None, count: int) -> dict[str, Any]:
    """Return how a call is given the image."""
    if source is None:
        return {}
    return {"image": source} if how.change is None else {"image": [source] * count, "strength": how.change}


def _guided(card: Card, negative: Sequence[str], how: Sampling) -> dict[str, Any]:
    """Return the arguments that guide: the scale, counted as the pipeline counts it, and the negative prompts."""
    scale = max(0.0, how.guidance_scale - 1 + card.guidance_off)
    asked: dict[str, Any] = {card.guidance: scale}
    if card.negative_prompt and (any(negative) or (card.empty_negative and how.guidance_scale > 1)):
        asked["negative_prompt"] = [given or card.empty_negative for given in negative]
    return asked


def own_sampling(family: Family, resolution: int) -> Sampling:
    """Return how `family` makes images of its own accord: squares of about `resolution` pixels a side."""
    step, traits = picture_step(family), family.traits
    side = max(step, resolution // step * step)
    return Sampling(traits.steps, traits.guidance_scale, side, side)


def picture_step(family: Family) -> int:
    """Return the number of pixels that the sides of an image must be a multiple of."""
    return image_step(family.pipeline)


def cut_off(family: Family, prompts: Iterable[str]) -> list[str]:
    """Return, for each prompt that is too long for every text encoder of the base, the end of it that is not read."""
    longest = max(tokenizers_of(family.pipeline).values(), key=lambda part: part.model_max_length)
    limit = min(longest.model_max_length, family.card.prompt_tokens)
    found = []
    with quiet():
        for prompt in dict.fromkeys(prompts):
            ids = longest(prompt, truncation=False).input_ids
            if len(ids) > limit:
                found.append(longest.decode(ids[limit - 1 :], skip_special_tokens=True).strip())
    return found


@contextmanager
def vae_as(family: Family, dtype: torch.dtype) -> Iterator[None]:
    """Hold the VAE in `dtype` for a while: half-precision VAEs overflow, and training encodes each image only once."""
    vae = family.pipeline.vae
    own = vae.dtype
    if own == dtype:
        yield
        return
    nn.Module.to(vae, dtype=dtype)  # diffusers' own `to` warns of modules that this VAE does not have
    try:
        yield
    finally:
        nn.Module.to(vae, dtype=own)


@contextmanager
def _scheduler(family: Family, name: str) -> Iterator[None]:
    own = family.pipeline.scheduler
    family.pipeline.scheduler = scheduler_for(family.pipeline, name)
    try:
        yield
    finally:
        family.pipeline.scheduler = own
