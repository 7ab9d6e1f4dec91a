"""Lumina-Image 2.0: a DiT over one row of text and image tokens, conditioned on Gemma 2, trained as a rectified flow.

Its time runs from noise at 0 to the picture at 1, and it predicts the velocity in that direction (arXiv 2503.21758).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from vislora.models.base import Card, Traits, quiet, read_traits
from vislora.models.dit import Dit, tags
from vislora.models.parts import image_step


class Lumina2(Dit):
    """A loaded `Lumina2Pipeline`. See `models.base.Family`."""

    card: ClassVar[Card] = Card(
        name="lumina2",
        pipelines=("Lumina2Pipeline", "Lumina2Text2ImgPipeline"),
        denoiser="Lumina2Transformer2DModel",
        attributes={"denoiser": "transformer", "te:llm": "text_encoder"},
    )

    @classmethod
    def describe(cls, path: Path, pipeline: Any) -> Traits:
        """Return the traits: its transformer knows the size, in latents, that it was made for."""
        resolution = pipeline.default_sample_size * pipeline.vae_scale_factor
        return read_traits(path, pipeline, resolution, image_step(pipeline), tags("lumina-2"), steps=30)

    def encode_prompt(self, prompts: list[str]) -> dict[str, Tensor]:
        """Return `prompt_embeds` (batch, 256, width) and `mask` (batch, 256); the system prompt stands in front."""
        with quiet():  # of captions that are too long: `sampling.cut_off` tells it once
            embeds, mask, _, _ = self.pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds, "mask": mask}

    def predict(self, noisy: Tensor, t: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """Run the transformer; return its velocity turned round, from picture to noise."""
        return -self.pipeline.transformer(
            hidden_states=noisy,
            timestep=1 - t / 1000,
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_attention_mask=conditioning["mask"],
            return_dict=False,
        )[0]
