"""Stable Diffusion 1.x and 2.x: a UNet conditioned on one CLIP text encoder; epsilon or v prediction."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vislora.models.base import Card, Traits, quiet, read_traits
from vislora.models.parts import discrete_of, encode_scaled


class StableDiffusion:
    """A loaded `StableDiffusionPipeline`. See `models.base.Family`."""

    card: ClassVar[Card] = Card(
        name="sd",
        pipelines=("StableDiffusionPipeline",),
        denoiser="UNet2DConditionModel",
        attributes={"denoiser": "unet", "te:clip_l": "text_encoder"},
    )

    def __init__(self, pipeline: Any, traits: Traits) -> None:
        self.pipeline = pipeline
        self.traits = traits
        self.components: dict[str, nn.Module] = {"denoiser": pipeline.unet, "te:clip_l": pipeline.text_encoder}
        self.objective = discrete_of(pipeline.scheduler)

    @classmethod
    def load(cls, path: Path, dtype: torch.dtype, device: torch.device) -> StableDiffusion:
        """Load a diffusers folder, without its safety checker."""
        from diffusers import StableDiffusionPipeline

        parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = StableDiffusionPipeline.from_pretrained(path, dtype=dtype, **parts).to(device)
        return cls(pipeline, cls.describe(path, pipeline))

    @classmethod
    def describe(cls, path: Path, pipeline: Any) -> Traits:
        """Return the traits: its UNet knows the size, in latents, that it was made for."""
        factor, unet = pipeline.vae_scale_factor, pipeline.unet.config
        size_step = factor * 2 ** (len(unet.block_out_channels) - 1)
        resolution = unet.sample_size * factor
        return read_traits(path, pipeline, resolution, size_step, _tags(pipeline, resolution))

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Return the scaled mode of the VAE's posterior."""
        return encode_scaled(self.pipeline.vae, pixels)

    def encode_prompt(self, prompts: list[str]) -> dict[str, Tensor]:
        """Return `prompt_embeds` (batch, tokens, width)."""
        with quiet():  # of captions that are too long: `sampling.cut_off` tells it once
            embeds, _ = self.pipeline.encode_prompt(prompts, self.pipeline.device, 1, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds}

    def predict(self, noisy: Tensor, t: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """Run the UNet."""
        return self.pipeline.unet(noisy, t, conditioning["prompt_embeds"], return_dict=False)[0]


def _tags(pipeline: Any, resolution: int) -> dict[str, str]:
    """SD 2.x is told from 1.x by the width of its text features; the names are those of sd-scripts and ModelSpec."""
    v_prediction = pipeline.scheduler.config.get("prediction_type") == "v_prediction"
    prediction = "v" if v_prediction else "epsilon"
    if pipeline.unet.config.cross_attention_dim != 1024:
        return spec("sd_v1", "False", "stable-diffusion-v1", prediction)
    size = f"{resolution}-v" if v_prediction else str(resolution)
    return spec(f"sd_v2{'_v' if v_prediction else ''}", "True", f"stable-diffusion-v2-{size}", prediction)


def spec(version: str, is_v2: str, architecture: str, prediction: str) -> dict[str, str]:
    """Return metadata keys of sd-scripts and ModelSpec."""
    return {
        "ss_base_model_version": version,
        "ss_v2": is_v2,
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.prediction_type": prediction,
    }
