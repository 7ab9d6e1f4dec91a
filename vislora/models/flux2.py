"""FLUX.2 dev and klein: an MM-DiT over latents of a 16th of the sides, conditioned on layers of a language model.

dev was distilled to take the guidance scale as an input and is trained at 1, as FLUX.1 is (`models.flux`). Squares of
the VAE's latents are channels, brought to one scale by the statistics that it keeps. Source images are further runs of
tokens, whose first position is 10 (black-forest-labs/flux2, src/flux2/sampling.py `listed_prc_img`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pixel_unshuffle

from vislora.diffusion import Flow, GrowingShift, Objective
from vislora.models.base import Card, Traits, quiet, read_traits
from vislora.models.dit import Dit, tags
from vislora.models.flux import TRAINING_GUIDANCE
from vislora.models.parts import PATCH, image_step

SOURCE = 10
"""First position of the tokens of a source image."""


class Flux2(Dit):
    """A loaded `Flux2Pipeline` or `Flux2KleinPipeline`. See `models.base.Family`."""

    card: ClassVar[Card] = Card(
        name="flux2",
        pipelines=("Flux2Pipeline", "Flux2KleinPipeline"),
        denoiser="Flux2Transformer2DModel",
        attributes={"denoiser": "transformer", "te:llm": "text_encoder"},
        negative_prompt=False,
        prompt_tokens=512,
    )

    @classmethod
    def describe(cls, path: Path, pipeline: Any) -> Traits:
        """Return the traits; a distilled klein takes four steps and no guidance."""
        klein = "Klein" in type(pipeline).__name__
        distilled = klein and pipeline.config.is_distilled
        resolution = pipeline.default_sample_size * pipeline.vae_scale_factor
        names = tags(f"flux-2-{'klein' if klein else 'dev'}")
        defaults: dict[str, Any] = {"steps": 4, "guidance_scale": 1.0} if distilled else {"steps": 50}
        return read_traits(path, pipeline, resolution, image_step(pipeline), names, source="latents", **defaults)

    @staticmethod
    def read_objective(scheduler: Any) -> Objective:
        """Return the flow whose shift is what the pipeline's, which falls with the steps, comes to with many."""
        return Flow(shift=GrowingShift(patch=1))

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Return squares of the mode of the VAE's posterior as channels, by the running statistics of its norm."""
        vae = self.pipeline.vae
        with torch.no_grad():
            mode = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
        norm = vae.bn
        mean, variance = (given.view(1, -1, 1, 1).float() for given in (norm.running_mean, norm.running_var))
        return (pixel_unshuffle(mode, PATCH).float() - mean) / (variance + vae.config.batch_norm_eps).sqrt()

    def encode_prompt(self, prompts: list[str]) -> dict[str, Tensor]:
        """Return `prompt_embeds` (batch, 512, width): three layers of the text encoder side by side."""
        with quiet():  # of captions that are too long: `sampling.cut_off` tells it once
            embeds, _ = self.pipeline.encode_prompt(prompts)
        return {"prompt_embeds": embeds}

    def predict(self, noisy: Tensor, t: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """Run the transformer; `source` latents (batch, channels, height, width) are what it edits."""
        transformer, embeds = self.pipeline.transformer, conditioning["prompt_embeds"]
        tokens, ids = _tokens(noisy), _grid_ids(noisy, 0)
        count = tokens.shape[1]
        if "source" in conditioning:
            source = conditioning["source"].to(noisy.dtype)
            tokens, ids = torch.cat([tokens, _tokens(source)], 1), torch.cat([ids, _grid_ids(source, SOURCE)], 1)
        guided = transformer.config.guidance_embeds
        predicted = transformer(
            hidden_states=tokens,
            timestep=t / 1000,
            guidance=torch.full((len(t),), TRAINING_GUIDANCE, device=t.device) if guided else None,
            encoder_hidden_states=embeds,
            txt_ids=_text_ids(embeds),
            img_ids=ids,
            return_dict=False,
        )[0]
        return predicted[:, :count].transpose(1, 2).reshape(noisy.shape)


def _tokens(latents: Tensor) -> Tensor:
    return latents.flatten(2).transpose(1, 2)


def _grid_ids(latents: Tensor, first: int) -> Tensor:
    """Return `first`, row, column and 0 of each token: (batch, tokens, 4)."""
    rows, columns = (torch.arange(side, device=latents.device) for side in latents.shape[-2:])
    alone = rows.new_tensor([0])
    return torch.cartesian_prod(alone + first, rows, columns, alone).expand(len(latents), -1, -1)


def _text_ids(embeds: Tensor) -> Tensor:
    """Return the place of each token of the text: (batch, tokens, 4), the last of which counts."""
    ids = torch.zeros(*embeds.shape[:2], 4, dtype=torch.long, device=embeds.device)
    ids[..., 3] = torch.arange(embeds.shape[1], device=embeds.device)
    return ids
