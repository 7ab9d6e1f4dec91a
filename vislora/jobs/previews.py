"""Images made while training, with the adapter as it is: the same call as `generate`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from PIL import Image

from vislora.files import replacing
from vislora.models.sampling import Sampling, Shot, make_images, picture_step
from vislora.records import Note
from vislora.reports.sheet import contact_sheet

if TYPE_CHECKING:
    from vislora.jobs.train import Run


def preview(job: Run, step: int) -> Iterator[Note]:
    """Make the samples of a step and write them as one sheet `samples/NNNNNN.png`; dropouts are off meanwhile."""
    if not job.accelerator.is_main_process:
        return
    sample, traits = job.config.sample, job.family.traits
    prompts = sample.prompts or tuple(example.caption for example in job.data.examples[:4])
    shots = [Shot(prompt, sample.negative_prompt, sample.seed + number) for number, prompt in enumerate(prompts)]
    step_px = picture_step(job.family)
    side = max(step_px, job.plan.resolution // step_px * step_px)
    how = Sampling(traits.steps, traits.guidance_scale, side, side)
    job.module.eval()
    images: list[Image.Image] = []
    for batch in make_images(job.family, shots, how):
        images += batch
    job.module.train()
    path = job.folder.samples / f"{step:06d}.png"
    with replacing(path) as temporary:
        contact_sheet([images], [f"step {step}"], list(prompts)).save(temporary, format="PNG")
    yield Note(f"samples: {path}")
