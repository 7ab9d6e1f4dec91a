"""PixArt-alpha and Sigma: a DiT with cross-attention to T5; epsilon prediction.

The transformer predicts the variance too, which adapters are not trained on (PixArt-sigma,
train_scripts/train_pixart_lora_hf.py: the first half of its channels alone enters the loss).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from vislora.diffusion import Objective
from vislora.models.base import Card, Traits, quiet, read_traits
from vislora.models.dit import Dit, tags
from vislora.models.parts import discrete_of, image_step


class PixArt(Dit):
    """A loaded `PixArtAlphaPipeline` or `PixArtSigmaPipeline`. See `models.base.Family`."""

    card: ClassVar[Card] = Card(
        name="pixart",
        pipelines=("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
        denoiser="PixArtTransformer2DModel",
        attributes={"denoiser": "transformer", "te:t5": "text_encoder"},
        prompt_tokens=300,
        # pictures have the size that was asked for, and captions are read as they stand
        always={"use_resolution_binning": False, "clean_caption": False},
    )

    @classmethod
    def describe(cls, path: Path, pipeline: Any) -> Traits:
        """Return the traits: its transformer knows the size, in latents, that it was made for."""
        kind = "sigma" if "Sigma" in type(pipeline).__name__ else "alpha"
        resolution = pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
        names = tags(f"pixart-{kind}", "epsilon")
        return read_traits(path, pipeline, resolution, image_step(pipeline), names)

    @staticmethod
    def read_objective(scheduler: Any) -> Objective:
        """Return the table of noise levels that the scheduler was made from."""
        return discrete_of(scheduler)

    def encode_prompt(self, prompts: list[str]) -> dict[str, Tensor]:
        """Return `prompt_embeds` (batch, tokens, width) and `mask` (batch, tokens): 120 (alpha) or 300 of them."""
        with quiet():  # of captions that are too long: `sampling.cut_off` tells it once
            embeds, mask, _, _ = self.pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds, "mask": mask}

    def predict(self, noisy: Tensor, t: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """Run the transformer, and return the half of its output that is the noise."""
        predicted = self.pipeline.transformer(
            noisy,
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_attention_mask=conditioning["mask"],
            timestep=t,
            added_cond_kwargs=self._sizes(noisy),
            return_dict=False,
        )[0]
        return predicted[:, : noisy.shape[1]]

    def _sizes(self, noisy: Tensor) -> dict[str, Tensor | None]:
        """Return the height and width in pixels, and their ratio, that alpha at 1024 is told (arXiv 2310.00426)."""
        if not self.pipeline.transformer.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        height, width = (side * self.pipeline.vae_scale_factor for side in noisy.shape[-2:])
        sizes = torch.tensor([height, width], device=noisy.device, dtype=noisy.dtype)
        ratio = torch.tensor([height / width], device=noisy.device, dtype=noisy.dtype)
        return {"resolution": sizes.repeat(len(noisy), 1), "aspect_ratio": ratio.repeat(len(noisy), 1)}
