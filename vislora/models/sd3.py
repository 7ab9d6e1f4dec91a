"""Stable Diffusion 3 and 3.5: an MM-DiT with two CLIP text encoders and T5, trained as a rectified flow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from vislora.models.base import Card, Traits, quiet, read_traits
from vislora.models.dit import Dit


class StableDiffusion3(Dit):
    """A loaded `StableDiffusion3Pipeline`; T5 may be left out of the folder. See `models.base.Family`."""

    card: ClassVar[Card] = Card(
        name="sd3",
        pipelines=("StableDiffusion3Pipeline",),
        denoiser="SD3Transformer2DModel",
        attributes={
            "denoiser": "transformer",
            "te:clip_l": "text_encoder",
            "te:clip_g": "text_encoder_2",
            "te:t5": "text_encoder_3",
        },
    )

    @classmethod
    def describe(cls, path: Path, pipeline: Any) -> Traits:
        """Return the traits: its transformer knows the size, in latents, that it was made for."""
        factor, config = pipeline.vae_scale_factor, pipeline.transformer.config
        return read_traits(path, pipeline, config.sample_size * factor, factor * config.patch_size, _tags(pipeline))

    def encode_prompt(self, prompts: list[str]) -> dict[str, Tensor]:
        """Return `prompt_embeds` (batch, tokens, width) and `pooled` (batch, width)."""
        with quiet():  # of captions that are too long: `sampling.cut_off` tells it once
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


def _tags(pipeline: Any) -> dict[str, str]:
    """The names are those of sd-scripts and ModelSpec; the depth of the transformer tells the sizes apart."""
    depth = pipeline.transformer.config.num_layers
    dual = bool(pipeline.transformer.config.get("dual_attention_layers"))
    size = "3.5-medium" if dual else "3.5-large" if depth == 38 else "3-medium"
    return {
        "ss_base_model_version": f"sd{size.replace('-medium', '_m').replace('-large', '_l')}",
        "ss_v2": "False",
        "modelspec.architecture": f"stable-diffusion-{size}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.prediction_type": "flow",
    }
