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
    """How images are made. `width`, `height`: pixels. `guidance_scale` 1 turns guidance off."""

    steps: int
    guidance_scale: float
    width: int
    height: int
    scheduler: str = "auto"


def make_images(
    family: Family, shots: Sequence[Shot], how: Sampling, batch_size: int = 1, source: Image | None = None
) -> Iterator[list[Image]]:
    """Yield the PIL images of each batch of `shots` in order. The family's own scheduler is put back afterwards.

    `source`: the image to edit, for every shot; where the text encoder sees it too, `batch_size` must be 1.
    Raises `ConfigError` for a base that makes no images from prompts alone, or has no use for a source.
    """
    require_source(family, source is not None)
    if not family.card.from_text:
        raise ConfigError(
            f"a base of family '{family.card.name}' refines images and makes none from a prompt: train on it, and use "
            "the adapter in its own pipeline; images come from the base that it refines"
        )
    for start in range(0, len(shots), batch_size):
        batch = shots[start : start + batch_size]
        asked = {**_sized(family, how, source), **_guided(family.card, [shot.negative_prompt for shot in batch], how)}
        with quiet(), torch.inference_mode(), _scheduler(family, how.scheduler):
            made = family.pipeline(
                prompt=[shot.prompt for shot in batch],
                generator=[torch.Generator("cpu").manual_seed(shot.seed) for shot in batch],
                num_inference_steps=how.steps,
                **asked,
            )
        yield made.images


def require_source(family: Family, given: bool) -> None:
    """Raise `ConfigError` for an image to edit that the base has no use for, or for none where it needs one."""
    name, kind = family.card.name, family.traits.source
    if given and not kind:
        raise ConfigError(f"a base of family '{name}' edits no images: leave --source out, or give a base that does")
    if not given and kind == "latents and text":
        raise ConfigError("this base edits images and makes none from a prompt alone: give one with --source")


def _sized(family: Family, how: Sampling, source: Image | None) -> dict[str, Any]:
    """Return what every call is given: the size, the source, and the family's own as far as the pipeline has it."""
    known = inspect.signature(type(family.pipeline).__call__).parameters
    more = {**family.card.always, **family.traits.always, family.card.area: how.width * how.height}
    own = {name: value for name, value in more.items() if name in known}
    return {"width": how.width, "height": how.height, **own, **({} if source is None else {"image": source})}


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
