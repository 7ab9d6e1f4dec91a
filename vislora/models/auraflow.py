"""AuraFlow: an MM-DiT conditioned on UMT5 (Pile-T5), trained as a rectified flow; padding is zero, not masked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from vislora.models.base import Card, Traits, quiet, read_traits
from vislora.models.dit import Dit, tags
from vislora.models.parts import image_step


class AuraFlow(Dit):
    """A loaded `AuraFlowPipeline`. See `models.base.Family`."""

    card: ClassVar[Card] = Card(
        name="auraflow",
        pipelines=("AuraFlowPipeline",),
        denoiser="AuraFlowTransformer2DModel",
        attributes={"denoiser": "transformer", "te:t5": "text_encoder"},
    )

    @classmethod
    def describe(cls, path: Path, pipeline: Any) -> Traits:
        """Return the traits: its transformer knows the size, in latents, that it was made for."""
        resolution = pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
        return read_traits(path, pipeline, resolution, image_step(pipeline), tags("auraflow"), steps=50)

    def encode_prompt(self, prompts: list[str]) -> dict[str, Tensor]:
        """Return `prompt_embeds` (batch, 256, width)."""
        with quiet():  # of captions that are too long: `sampling.cut_off` tells it once
            embeds = self.pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)[0]
        return {"prompt_embeds": embeds}

    def predict(self, noisy: Tensor, t: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """Run the transformer."""
        embeds = conditioning["prompt_embeds"]
        return self.pipeline.transformer(noisy, embeds, timestep=t / 1000, return_dict=False)[0]
