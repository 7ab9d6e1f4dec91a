"""Images made while training, with the adapter as it is: the same call as `generate`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import cycle
from pathlib import Path

from PIL import Image

from vislora.files import replacing
from vislora.inject.trained import AdapterSet
from vislora.jobs.plan import Plan
from vislora.jobs.sources import read_source
from vislora.models.base import Family
from vislora.models.sampling import Sampling, Shot, make_images, own_sampling
from vislora.reports.sheet import contact_sheet


def preview(
    family: Family,
    adapters: Collection[AdapterSet],
    plan: Plan,
    captions: Sequence[str],
    sources: Sequence[Path],
    path: Path,
) -> None:
    """Make one image per prompt of `[sample]` (or per caption) and write them as one sheet, with dropouts off.

    Of a slider there are three rows, at strengths -1, 0 and 1.
    `sources`: the images that those of the captions start from, or none; the prompts take them in turn.
    """
    sample, step = plan.config.sample, f"step {int(path.stem)}"
    prompts = sample.prompts or captions
    shots = [Shot(prompt, sample.negative_prompt, sample.seed + number) for number, prompt in enumerate(prompts)]
    how = own_sampling(family, plan.resolution)
    strengths = {f"{step}, at {at}": at for at in (-1, 0, 1)} if plan.config.slider.more else {step: 1}
    rows = []
    for strength in strengths.values():
        with _sampled(adapters, strength):
            rows.append(_images(family, shots, how, sources))
    sheet = contact_sheet(rows, list(strengths), list(prompts))
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")


@contextmanager
def _sampled(adapters: Collection[AdapterSet], strength: float) -> Iterator[None]:
    """Have the adapters act with this strength for a while, without dropouts."""
    with ExitStack() as stack:
        for each in adapters:
            stack.enter_context(each.at(strength))
            each.eval()
        yield
    for each in adapters:
        each.train()


def _images(family: Family, shots: Sequence[Shot], how: Sampling, sources: Sequence[Path]) -> list[Image.Image]:
    if not sources:
        return [image for batch in make_images(family, shots, how, len(shots)) for image in batch]
    pairs = [
        (shot, read_source(path, how.width, how.height)) for shot, path in zip(shots, cycle(sources), strict=False)
    ]
    return [image for shot, source in pairs for image in next(make_images(family, [shot], how, source=source))]
