"""FLUX.1 dev, schnell and Kontext: an MM-DiT over packed latents with CLIP and T5, trained as a rectified flow.

dev and Kontext were distilled to take the guidance scale as an input. An adapter is trained at 1, where that input is
neutral, and used at any (kohya-ss/sd-scripts, docs/flux_train_network.md, `--guidance_scale`). Kontext's source image
is a second run of tokens whose first position is 1 (FLUX.1 Kontext, arXiv 2506.15742, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from vislora.models.base import Card, Traits, quiet, read_traits
from vislora.models.dit import Dit, tags
from vislora.models.parts import grid_ids, image_step, pack, unpack

TRAINING_GUIDANCE = 1.0


class Flux(Dit):
    """A loaded `FluxPipeline` or `FluxKontextPipeline`. See `models.base.Family`."""

    card: ClassVar[Card] = Card(
        name="flux",
        pipelines=("FluxPipeline", "FluxKontextPipeline"),
        denoiser="FluxTransformer2DModel",
        attributes={"denoiser": "transformer", "te:clip_l": "text_encoder", "te:t5": "text_encoder_2"},
        negative_prompt=False,
        prompt_tokens=512,
        # Kontext would bring the picture and its source to sizes of its own choice
        always={"_auto_resize": False},
        area="max_area",
    )

    left_out: ClassVar[tuple[str, ...]] = ("image_encoder", "feature_extractor")  # of IP-adapters

    @classmethod
    def describe(cls, path: Path, pipeline: Any) -> Traits:
        """Return the traits; schnell takes four steps and no guidance."""
        resolution = pipeline.default_sample_size * pipeline.vae_scale_factor
        defaults: dict[str, Any] = (
            {"steps": 28} if pipeline.transformer.config.guidance_embeds else {"steps": 4, "guidance_scale": 1.0}
        )
        source = "latents" if _is_kontext(pipeline) else ""
        return read_traits(path, pipeline, resolution, image_step(pipeline), _tags(pipeline), source=source, **defaults)

    def encode_prompt(self, prompts: list[str]) -> dict[str, Tensor]:
        """Return `prompt_embeds` (batch, 512, width) of T5 and `pooled` (batch, width) of CLIP."""
        with quiet():  # of captions that are too long: `sampling.cut_off` tells it once
            embeds, pooled, _ = self.pipeline.encode_prompt(prompts)
        return {"prompt_embeds": embeds, "pooled": pooled}

    def predict(self, noisy: Tensor, t: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """Run the transformer; `source` latents (batch, channels, height, width) are what Kontext edits."""
        transformer, embeds = self.pipeline.transformer, conditioning["prompt_embeds"]
        tokens, ids = pack(noisy), grid_ids(noisy)
        count = tokens.shape[1]
        if "source" in conditioning:
            source = conditioning["source"].to(noisy.dtype)
            tokens, ids = torch.cat([tokens, pack(source)], 1), torch.cat([ids, grid_ids(source, first=1)])
        distilled = transformer.config.guidance_embeds
        predicted = transformer(
            hidden_states=tokens,
            timestep=t / 1000,
            guidance=torch.full((len(t),), TRAINING_GUIDANCE, device=t.device) if distilled else None,
            pooled_projections=conditioning["pooled"],
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=ids.device),
            img_ids=ids,
            return_dict=False,
        )[0]
        return unpack(predicted[:, :count], *noisy.shape[-2:])


def _is_kontext(pipeline: Any) -> bool:
    return "Kontext" in type(pipeline).__name__


def _tags(pipeline: Any) -> dict[str, str]:
    """The names are those of sd-scripts and ModelSpec (github.com/Stability-AI/ModelSpec)."""
    kind = "kontext" if _is_kontext(pipeline) else "dev" if pipeline.transformer.config.guidance_embeds else "schnell"
    return {**tags(f"flux-1-{kind}"), "ss_base_model_version": "flux1"}
