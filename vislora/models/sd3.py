"""Stable Diffusion 3 and 3.5: an MM-DiT with two CLIP text encoders and T5, trained as a rectified flow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vislora.diffusion import Flow
from vislora.models.base import Defaults, read_defaults


class StableDiffusion3:
    """A loaded `StableDiffusion3Pipeline`; T5 may be left out of the folder. See `models.base.Family`."""

    name: ClassVar[str] = "sd3"
    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusion3Pipeline",)
    denoiser: ClassVar[str] = "SD3Transformer2DModel"
    attributes: ClassVar[Mapping[str, str]] = {
        "denoiser": "transformer",
        "te:clip_l": "text_encoder",
        "te:clip_g": "text_encoder_2",
        "te:t5": "text_encoder_3",
    }

    def __init__(self, pipeline: Any, defaults: Defaults) -> None:
        self.pipeline = pipeline
        self.defaults = defaults
        found = {name: getattr(pipeline, attribute) for name, attribute in self.attributes.items()}
        self.components: dict[str, nn.Module] = {name: module for name, module in found.items() if module is not None}
        self.objective = Flow(shift=float(pipeline.scheduler.config.shift))

    @classmethod
    def load(cls, path: Path, dtype: torch.dtype, device: torch.device) -> StableDiffusion3:
        """Load a diffusers folder."""
        from diffusers import StableDiffusion3Pipeline

        pipeline = StableDiffusion3Pipeline.from_pretrained(path, dtype=dtype).to(device)
        factor, patch = pipeline.vae_scale_factor, pipeline.transformer.config.patch_size
        resolution = pipeline.transformer.config.sample_size * factor
        return cls(pipeline, read_defaults(path, pipeline, resolution, factor * patch))

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Return the shifted and scaled mode of the VAE's posterior."""
        vae = self.pipeline.vae
        with torch.no_grad():
            mode = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
        return ((mode - vae.config.shift_factor) * vae.config.scaling_factor).float()

    def encode_prompt(self, prompts: list[str]) -> dict[str, Tensor]:
        """Return `prompt_embeds` (batch, tokens, width) and `pooled` (batch, width)."""
        embeds, _, pooled, _ = self.pipeline.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds, "pooled": pooled}

    def predict(self, noisy: Tensor, t: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """Run the transformer."""
        return self.pipeline.transformer(
            hidden_states=noisy,
            timestep=t,
            encoder_hidden_states=conditioning["prompt_embeds"],
            pooled_projections=conditioning["pooled"],
            return_dict=False,
        )[0]
