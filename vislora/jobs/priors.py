"""What prior preservation compares on: captions without the trigger, and pictures of them."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import torch
from accelerate import Accelerator

from vislora.config.train import PriorConfig
from vislora.data.buckets import assign
from vislora.data.cache import Cache
from vislora.data.captions import without_trigger
from vislora.data.dataset import TrainingSet, collate
from vislora.data.encode import View, views
from vislora.data.scan import Example, scan
from vislora.errors import ConfigError
from vislora.jobs.drawing import draw_pictures
from vislora.jobs.plan import Plan
from vislora.jobs.run_folder import RunFolder
from vislora.models.base import Family
from vislora.records import Note, Progress, Record
from vislora.training.loss import DenoisingLoss

ANSWERS = 512
"""So many predictions of the base are kept to compare with: each is compared a few times in a run of usual length."""


def prior_captions(captions: Sequence[str], prior: PriorConfig) -> dict[str, list[str]] | None:
    """Return, for every caption, those to compare on: it without the trigger, and the same others for all of them.

    None when there are none, or images that have their own. Raises `ConfigError` for a part that no caption has.
    """
    if prior.regularization or not prior.is_on:
        return None
    lost = [part for part in prior.replace if not part or not any(part in caption for caption in captions)]
    if lost:
        example = f"; the first caption is {captions[0]!r}" if captions else ""
        raise ConfigError(f"prior.replace: no caption has {lost[0]!r} in it{example}")
    freed = {caption: without_trigger(caption, prior.replace) if prior.replace else [] for caption in captions}
    return {caption: [*others, *prior.captions] for caption, others in freed.items()}


def prior_pictures(
    plan: Plan, family: Family, folder: RunFolder, cache: Cache, priors: Mapping[str, Sequence[str]] | None
) -> Generator[Record, None, list[Example]]:
    """Return what is compared on: `prior.regularization`, or pictures of the captions that the base draws, or none.

    Raises `ConfigError` where there is no caption to draw, or a base that edits; `DataError` for bad images.
    """
    prior = plan.config.prior
    if plan.config.data.sources is not None and (prior.images or prior.regularization):
        name = "images" if prior.images else "regularization"
        raise ConfigError(f"prior.{name}: these have no source images; leave it out where data.sources is given")
    if prior.regularization:
        return (yield from _given(prior.regularization, prior.captions))
    if not prior.images:
        return []
    if priors is None:
        raise ConfigError(
            "prior.images: say in prior.replace what the captions of these pictures leave out, or give prior.captions"
        )
    captions = [text for others in priors.values() for text in others]
    return (yield from draw_pictures(plan, family, folder.priors, cache, captions, prior.images))


def _given(folder: Path, captions: Sequence[str]) -> Generator[Note, None, list[Example]]:
    """Return the images of a folder; those without a caption have the given ones in turn."""
    found = scan(folder, allow_missing_captions=bool(captions))
    yield from (Note(f"priors: {line}") for line in found.notes)
    yield Note(f"{len(found.examples)} images of {folder} are compared on")
    others = cycle(captions)
    return [each if each.caption else replace(each, caption=next(others)) for each in found.examples]


def ask_base(plan: Plan, dataset: TrainingSet, module: DenoisingLoss, accelerator: Accelerator) -> Iterator[Progress]:
    """Ask the base beforehand what it predicts on its own pictures: cheaper than in every step, and the same again."""
    pictures = len(dataset.prior_views)
    if not pictures:
        return
    wanted = min(ANSWERS, plan.steps * plan.config.loop.gradient_accumulation * plan.batch_size)
    numbers = [number % pictures for number in range(max(pictures, wanted))]
    for start in range(0, len(numbers), plan.batch_size):
        batch = collate([dataset.prior_picture(number) for number in numbers[start : start + plan.batch_size]])
        generator = torch.Generator().manual_seed((plan.config.seed * 1_000_003 + start) % 2**63)
        with accelerator.autocast():
            module.ask_base(batch, generator)
        yield Progress("asking the base", min(start + plan.batch_size, len(numbers)), len(numbers))


def prior_views(pictures: Sequence[Example], plan: Plan, family: Family, fingerprint: str) -> list[View]:
    """Return one view of each picture: its middle, a square, so that all go into one batch."""
    buckets = assign(pictures, plan.resolution, family.traits.size_step, max_aspect=1.0)
    background = plan.config.data.background_rgb
    shown = views(pictures, buckets, fingerprint=fingerprint, background=background)
    return [view for its_views in shown for view in its_views]
