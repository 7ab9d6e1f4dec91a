"""Images made while training, with the adapter as it is: the same call as `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from PIL import Image
from torch import nn

from vislora.files import replacing
from vislora.jobs.plan import Plan
from vislora.jobs.sources import read_source
from vislora.models.base import Family
from vislora.models.sampling import Sampling, Shot, make_images, own_sampling
from vislora.reports.sheet import contact_sheet


def preview(
    family: Family, adapters: nn.Module, plan: Plan, captions: Sequence[str], sources: Sequence[Path], path: Path
) -> None:
    """Make one image per prompt of `[sample]` (or per caption) and write them as one sheet, with dropouts off.

    `sources`: the images that those of the captions start from, or none; the prompts take them in turn.
    """
    sample = plan.config.sample
    prompts = sample.prompts or captions
    shots = [Shot(prompt, sample.negative_prompt, sample.seed + number) for number, prompt in enumerate(prompts)]
    how = own_sampling(family, plan.resolution)
    adapters.eval()
    images = _images(family, shots, how, sources)
    adapters.train()
    sheet = contact_sheet([images], [f"step {int(path.stem)}"], list(prompts))
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")


def _images(family: Family, shots: Sequence[Shot], how: Sampling, sources: Sequence[Path]) -> list[Image.Image]:
    if not sources:
        return [image for batch in make_images(family, shots, how, len(shots)) for image in batch]
    pairs = [
        (shot, read_source(path, how.width, how.height)) for shot, path in zip(shots, cycle(sources), strict=False)
    ]
    return [image for shot, source in pairs for image in next(make_images(family, [shot], how, source=source))]
