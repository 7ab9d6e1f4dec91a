"""Images made while training, with the adapter as it is: the same call as `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import nn

from vislora.files import replacing
from vislora.jobs.plan import Plan
from vislora.models.base import Family
from vislora.models.sampling import Sampling, Shot, make_images, picture_step
from vislora.reports.sheet import contact_sheet


def preview(family: Family, adapters: nn.Module, plan: Plan, captions: Sequence[str], path: Path) -> None:
    """Make one image per prompt of `[sample]` (or per caption) and write them as one sheet, with dropouts off."""
    sample, traits = plan.config.sample, family.traits
    prompts = sample.prompts or captions
    shots = [Shot(prompt, sample.negative_prompt, sample.seed + number) for number, prompt in enumerate(prompts)]
    step_px = picture_step(family)
    side = max(step_px, plan.resolution // step_px * step_px)
    how = Sampling(traits.steps, traits.guidance_scale, side, side)
    adapters.eval()
    images: list[Image.Image] = [image for batch in make_images(family, shots, how, len(shots)) for image in batch]
    adapters.train()
    sheet = contact_sheet([images], [f"step {int(path.stem)}"], list(prompts))
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")
