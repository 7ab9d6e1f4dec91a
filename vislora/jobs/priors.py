"""What prior preservation compares on: captions without the trigger, and pictures of them."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence

import torch
from accelerate import Accelerator

from vislora.config.train import PriorConfig
from vislora.data.buckets import assign
from vislora.data.cache import Cache
from vislora.data.captions import without_trigger
from vislora.data.dataset import TrainingSet, collate
from vislora.data.encode import View, views
from vislora.data.scan import Example
from vislora.errors import ConfigError
from vislora.jobs.drawing import draw_pictures
from vislora.jobs.plan import Plan
from vislora.jobs.run_folder import RunFolder
from vislora.models.base import Family
from vislora.records import Progress
from vislora.training.loss import DenoisingLoss

ANSWERS = 512
"""So many predictions of the base are kept to compare with: each is compared a few times in a run of usual length."""


def prior_captions(captions: Sequence[str], prior: PriorConfig) -> dict[str, list[str]] | None:
    """Return, for every caption, those to compare on: it without the trigger, and the same others for all of them.

    None when there are none. Raises `ConfigError` for a part that no caption has.
    """
    if not prior.replace and not prior.captions:
        return None
    lost = [part for part in prior.replace if not part or not any(part in caption for caption in captions)]
    if lost:
        example = f"; the first caption is {captions[0]!r}" if captions else ""
        raise ConfigError(f"prior.replace: no caption has {lost[0]!r} in it{example}")
    freed = {caption: without_trigger(caption, prior.replace) if prior.replace else [] for caption in captions}
    return {caption: [*others, *prior.captions] for caption, others in freed.items()}


def draw_priors(
    plan: Plan, family: Family, folder: RunFolder, cache: Cache, priors: Mapping[str, Sequence[str]] | None
) -> Generator[Progress, None, list[Example]]:
    """Have the base draw `prior.images` pictures of the captions; see `draw_pictures`.

    Raises `ConfigError` where there is no caption to draw, or a base that cannot.
    """
    count = plan.config.prior.images
    if not count:
        return []
    if priors is None:
        raise ConfigError(
            "prior.images: say in prior.replace what the captions of these pictures leave out, or give prior.captions"
        )
    if plan.config.data.sources is not None:
        raise ConfigError("prior.images: what is drawn has no source image; leave it 0 where data.sources is given")
    captions = [text for others in priors.values() for text in others]
    return (yield from draw_pictures(plan, family, folder.priors, cache, captions, count))


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


def prior_views(drawn: Sequence[Example], plan: Plan, family: Family, fingerprint: str) -> list[View]:
    """Return the one view of each picture."""
    buckets = assign(drawn, plan.resolution, family.traits.size_step)
    return [view for its_views in views(drawn, buckets, fingerprint=fingerprint) for view in its_views]
