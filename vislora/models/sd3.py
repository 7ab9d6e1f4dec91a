"""Stable Diffusion 3 and 3.5: an MM-DiT with two CLIP text encoders and T5, trained as a rectified flow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from vislora.models.base import Card, Traits, quiet, read_traits
from vislora.models.dit import Dit

WITHOUT_T5 = 256
"""diffusers has so many tokens of zeros stand for a T5 that is left out."""
ONE_FOR_ALL = {"max_sequence_length": 1, "joint_attention_kwargs": {"last_counts": WITHOUT_T5}}
"""Arguments of the pipeline by which one of them counts for all: the same image, from fewer tokens."""


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

    def __init__(self, pipeline: Any, traits: Traits) -> None:
        super().__init__(pipeline, traits)
        if traits.always:
            from vislora.models.joint import CountedJointAttention

            pipeline.transformer.set_attn_processor(CountedJointAttention())

    @classmethod
    def describe(cls, path: Path, pipeline: Any) -> Traits:
        """Return the traits: its transformer knows the size, in latents, that it was made for."""
        factor, config = pipeline.vae_scale_factor, pipeline.transformer.config
        traits = read_traits(path, pipeline, config.sample_size * factor, factor * config.patch_size, _tags(pipeline))
        return traits if pipeline.text_encoder_3 is not None else replace(traits, always=ONE_FOR_ALL)

    def encode_prompt(self, prompts: list[str]) -> dict[str, Tensor]:
        """Return `prompt_embeds` (batch, tokens, width) and `pooled` (batch, width).

        One token of zeros stands for a T5 that is left out.
        """
        length = self.traits.always.get("max_sequence_length", WITHOUT_T5)
        with quiet():  # of captions that are too long: `sampling.cut_off` tells it once
            embeds, _, pooled, _ = self.pipeline.encode_prompt(
                prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=length
            )
        return {"prompt_embeds": embeds, "pooled": pooled}

    def predict(self, noisy: Tensor, t: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """Run the transformer."""
        embeds, always = conditioning["prompt_embeds"], self.traits.always
        if always:
            embeds = embeds[:, : self.pipeline.tokenizer_max_length + 1]  # a cache may hold all that stand for T5
        return self.pipeline.transformer(
            hidden_states=noisy,
            timestep=t,
            encoder_hidden_states=embeds,
            pooled_projections=conditioning["pooled"],
            joint_attention_kwargs=always.get("joint_attention_kwargs"),
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
