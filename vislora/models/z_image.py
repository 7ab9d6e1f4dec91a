"""Z-Image and Z-Image-Turbo: a DiT over one row of text and image tokens, conditioned on Qwen 3, a rectified flow.

Its time runs from noise at 0 to the picture at 1, and it predicts the velocity in that direction (arXiv 2511.22699).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from vislora.models.base import Card, Traits, quiet, read_traits
from vislora.models.dit import Dit, tags
from vislora.models.parts import image_step

TURBO_SHIFT = 3.0
"""The shift of Turbo's scheduler; that of the model it was distilled from is 6."""


class ZImage(Dit):
    """A loaded `ZImagePipeline`. See `models.base.Family`."""

    card: ClassVar[Card] = Card(
        name="z-image",
        pipelines=("ZImagePipeline",),
        denoiser="ZImageTransformer2DModel",
        attributes={"denoiser": "transformer", "te:llm": "text_encoder"},
        guidance_off=0.0,  # the pipeline adds a multiple of the difference to the prompt's prediction
        prompt_tokens=512,
    )

    @classmethod
    def describe(cls, path: Path, pipeline: Any) -> Traits:
        """Return the traits; Turbo takes eight steps and no guidance."""
        turbo = pipeline.scheduler.config.get("shift") == TURBO_SHIFT
        defaults = {"steps": 8, "guidance_scale": 1.0} if turbo else {"steps": 50, "guidance_scale": 5.0}
        names = tags("z-image-turbo" if turbo else "z-image")
        return read_traits(path, pipeline, 1024, image_step(pipeline), names, **defaults)

    def encode_prompt(self, prompts: list[str]) -> dict[str, list[Tensor]]:
        """Return `prompt_embeds`, for each prompt (tokens, width)."""
        with quiet():  # of captions that are too long: `sampling.cut_off` tells it once
            rows, _ = self.pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False)
        return {"prompt_embeds": rows}

    def predict(self, noisy: Tensor, t: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        """Run the transformer; return its velocity turned round, from picture to noise."""
        texts, time = list(conditioning["prompt_embeds"]), (1000 - t) / 1000
        predicted = self.pipeline.transformer(list(noisy.unsqueeze(2)), time, texts, return_dict=False)[0]
        return -torch.stack(list(predicted)).squeeze(2)
