"""Stable Diffusion XL, base and refiner: a UNet that reads two CLIP texts (the refiner: one), a pooled text, and sizes.

Sizes (Podell et al., arXiv 2307.01952, sections 2.2 and 2.3): height and width of the original image, top and left of
the crop, height and width that are asked for. The refiner is told an aesthetic score in the place of the last two; 6 is
what its pipeline gives. In training they are those of each image (diffusers, train_text_to_image_lora_sdxl.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vislora.models.base import Card, Traits, absent_parts, quiet, read_traits
from vislora.models.parts import discrete_of, encode_scaled
from vislora.models.sd import spec

AESTHETIC_SCORE = 6.0
GUIDANCE_SCALE = 5.0


class StableDiffusionXL:
    """A loaded `StableDiffusionXLPipeline`. See `models.base.Family`."""

    card: ClassVar[Card] = Card(
        name="sdxl",
        pipelines=("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"),
        denoiser="UNet2DConditionModel",
        attributes={"denoiser": "unet", "te:clip_l": "text_encoder", "te:clip_g": "text_encoder_2"},
    )
    version: ClassVar[tuple[str, str]] = ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base")

    def __init__(self, pipeline: Any, traits: Traits) -> None:
        self.pipeline = pipeline
        self.traits = traits
        self.components: dict[str, nn.Module] = {
            name: getattr(pipeline, attribute) for name, attribute in self.card.attributes.items()
        }
        self.objective = discrete_of(pipeline.scheduler)

    @classmethod
    def load(cls, path: Path, dtype: torch.dtype, device: torch.device) -> StableDiffusionXL:
        """Load a diffusers folder; one without the first text encoder is the refiner's."""
        import diffusers

        absent = absent_parts(path)
        kind = StableDiffusionXLRefiner if "text_encoder" in absent else StableDiffusionXL
        loader = getattr(diffusers, kind.card.pipelines[0])
        parts = {**absent, "image_encoder": None, "feature_extractor": None}
        pipeline = loader.from_pretrained(path, dtype=dtype, add_watermarker=False, **parts).to(device)
        return kind(pipeline, kind.describe(path, pipeline))

    @classmethod
    def describe(cls, path: Path, pipeline: Any) -> Traits:
        """Return the traits: its UNet knows the size, in latents, that it was made for."""
        factor, unet = pipeline.vae_scale_factor, pipeline.unet.config
        size_step = factor * 2 ** (len(unet.block_out_channels) - 1)
        tags = spec(cls.version[0], "False", cls.version[1], _prediction(pipeline))
        defaults = {"steps": 30, "guidance_scale": GUIDANCE_SCALE}
        return read_traits(path, pipeline, unet.sample_size * factor, size_step, tags, **defaults)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Return the scaled mode of the VAE's posterior."""
        return encode_scaled(self.pipeline.vae, pixels)

    def encode_prompt(self, prompts: list[str]) -> dict[str, Tensor]:
        """Return `prompt_embeds` (batch, tokens, width) of all text encoders and `pooled` (batch, width) of CLIP-G."""
        with quiet():  # of captions that are too long: `sampling.cut_off` tells it once
            embeds, _, pooled, _ = self.pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds, "pooled": pooled}

    def predict(self, noisy: Tensor, t: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """Run the UNet. `conditioning` may have `sizes` (batch, 6); without them the image is whole, as it is made."""
        sizes = conditioning.get("sizes")
        if sizes is None:
            sides = [side * self.pipeline.vae_scale_factor for side in noisy.shape[-2:]]
            sizes = torch.tensor([[*sides, 0, 0, *sides]]).expand(len(noisy), -1)
        pooled = conditioning["pooled"]
        added = {"text_embeds": pooled, "time_ids": self.told(sizes.to(pooled.device, pooled.dtype))}
        embeds = conditioning["prompt_embeds"]
        predicted: Tensor = self.pipeline.unet(noisy, t, embeds, added_cond_kwargs=added, return_dict=False)[0]
        return predicted

    def told(self, sizes: Tensor) -> Tensor:
        """Return what the UNet is told of `sizes` (batch, 6)."""
        return sizes


class StableDiffusionXLRefiner(StableDiffusionXL):
    """A loaded `StableDiffusionXLImg2ImgPipeline` of the refiner, which makes no image without another image."""

    card: ClassVar[Card] = Card(
        name="sdxl-refiner",
        pipelines=("StableDiffusionXLImg2ImgPipeline",),
        denoiser="UNet2DConditionModel",
        attributes={"denoiser": "unet", "te:clip_g": "text_encoder_2"},
        from_text=False,
    )
    version: ClassVar[tuple[str, str]] = ("sdxl_refiner_v1-0", "stable-diffusion-xl-v1-refiner")

    def told(self, sizes: Tensor) -> Tensor:
        """Return the first four, and the aesthetic score."""
        return torch.cat([sizes[:, :4], torch.full_like(sizes[:, :1], AESTHETIC_SCORE)], 1)


def _prediction(pipeline: Any) -> str:
    return "v" if pipeline.scheduler.config.get("prediction_type") == "v_prediction" else "epsilon"
