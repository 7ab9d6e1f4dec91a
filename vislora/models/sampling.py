"""Making images with a loaded family: the one call behind `generate` and the previews of `train`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vislora.models.base import Family
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


def make_images(family: Family, shots: Sequence[Shot], how: Sampling, batch_size: int = 1) -> Iterator[list[Any]]:
    """Yield the PIL images of each batch of `shots` in order. The family's own scheduler is put back afterwards."""
    for start in range(0, len(shots), batch_size):
        batch = shots[start : start + batch_size]
        with torch.inference_mode(), _scheduler(family, how.scheduler):
            made = family.pipeline(
                prompt=[shot.prompt for shot in batch],
                negative_prompt=[shot.negative_prompt for shot in batch],
                generator=[torch.Generator("cpu").manual_seed(shot.seed) for shot in batch],
                num_inference_steps=how.steps,
                guidance_scale=how.guidance_scale,
                width=how.width,
                height=how.height,
            )
        yield made.images


def picture_step(family: Family) -> int:
    """Return the number of pixels that the sides of an image must be a multiple of."""
    pipeline = family.pipeline
    return max(8, pipeline.vae_scale_factor * getattr(pipeline, "patch_size", 1))


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
