"""Sana: a linear DiT with cross-attention to Gemma 2 over latents of a 32nd of the sides, trained as a rectified flow.

Its sampler is a diffusion solver on the flow's noise levels (arXiv 2410.10629, section 3.4), whose shift training has
too.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from vislora.diffusion import Flow, Objective
from vislora.models.base import Card, Traits, quiet, read_traits
from vislora.models.dit import Dit, tags
from vislora.models.parts import flow_of, image_step


class Sana(Dit):
    """A loaded `SanaPipeline`. See `models.base.Family`."""

    card: ClassVar[Card] = Card(
        name="sana",
        pipelines=("SanaPipeline",),
        denoiser="SanaTransformer2DModel",
        attributes={"denoiser": "transformer", "te:llm": "text_encoder"},
        prompt_tokens=300,
        # pictures have the size that was asked for, and captions are read as they stand
        always={"use_resolution_binning": False, "clean_caption": False},
    )

    @classmethod
    def describe(cls, path: Path, pipeline: Any) -> Traits:
        """Return the traits: its transformer knows the size, in latents, that it was made for."""
        resolution = pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
        return read_traits(path, pipeline, resolution, image_step(pipeline), tags("sana"))

    @staticmethod
    def read_objective(scheduler: Any) -> Objective:
        """Return the flow of the scheduler, whichever of the two kinds the base has."""
        if "flow_shift" in scheduler.config and scheduler.config.get("use_flow_sigmas"):
            return Flow(shift=float(scheduler.config.flow_shift))
        return flow_of(scheduler)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Return the scaled latents; this autoencoder has no posterior."""
        vae = self.pipeline.vae
        with torch.no_grad():
            latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent
        return (latents * vae.config.scaling_factor).float()

    def encode_prompt(self, prompts: list[str]) -> dict[str, Tensor]:
        """Return `prompt_embeds` (batch, 300, width) and `mask` (batch, 300), behind the pipeline's own instruction."""
        instruction = inspect.signature(type(self.pipeline).__call__).parameters["complex_human_instruction"].default
        with quiet():  # of captions that are too long: `sampling.cut_off` tells it once
            embeds, mask, _, _ = self.pipeline.encode_prompt(
                prompts, do_classifier_free_guidance=False, complex_human_instruction=instruction
            )
        return {"prompt_embeds": embeds, "mask": mask}

    def predict(self, noisy: Tensor, t: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """Run the transformer."""
        transformer = self.pipeline.transformer
        return transformer(
            noisy,
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_attention_mask=conditioning["mask"],
            timestep=t * transformer.config.timestep_scale,
            return_dict=False,
        )[0]
