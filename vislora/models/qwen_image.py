"""Qwen-Image: an MM-DiT over packed latents, conditioned on Qwen 2.5 VL, trained as a rectified flow (arXiv 2508.02324).

Its autoencoder is one of videos, of which a picture is the only frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from vislora.models.base import Card, Traits, quiet, read_traits
from vislora.models.dit import Dit, tags
from vislora.models.parts import image_step, pack, pad_rows, trimmed, unpack

TOKENS = 512


class QwenImage(Dit):
    """A loaded `QwenImagePipeline`. See `models.base.Family`."""

    card: ClassVar[Card] = Card(
        name="qwen-image",
        pipelines=("QwenImagePipeline",),
        denoiser="QwenImageTransformer2DModel",
        attributes={"denoiser": "transformer", "te:llm": "text_encoder"},
        guidance="true_cfg_scale",
        empty_negative=" ",
        prompt_tokens=TOKENS,
    )

    @classmethod
    def describe(cls, path: Path, pipeline: Any) -> Traits:
        """Return the traits; guidance is that of two prompts."""
        resolution = pipeline.default_sample_size * pipeline.vae_scale_factor
        names, defaults = tags("qwen-image"), {"steps": 50, "guidance_scale": 4.0}
        return read_traits(path, pipeline, resolution, image_step(pipeline), names, **defaults)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Return the mode of the VAE's posterior, each channel with its own shift and scale."""
        vae = self.pipeline.vae
        with torch.no_grad():
            mode = vae.encode(pixels.to(vae.device, vae.dtype).unsqueeze(2)).latent_dist.mode().squeeze(2)
        shape = 1, -1, 1, 1
        mean, spread = (torch.tensor(vae.config[key]).view(shape) for key in ("latents_mean", "latents_std"))
        return (mode.float() - mean.to(mode.device)) / spread.to(mode.device)

    def encode_prompt(self, prompts: list[str]) -> dict[str, Tensor]:
        """Return `prompt_embeds` (batch, 512, width), zero behind the text, and `mask` (batch, 512), which is 1 in it."""
        with quiet():  # of captions that are too long: `sampling.cut_off` tells it once
            embeds, mask = self.pipeline.encode_prompt(prompts, max_sequence_length=TOKENS)
        lengths = [embeds.shape[1]] * len(prompts) if mask is None else mask.sum(1).tolist()
        return pad_rows([row[:length] for row, length in zip(embeds, lengths, strict=True)], TOKENS)

    def predict(self, noisy: Tensor, t: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """Run the transformer over the text as far as the longest of the batch goes."""
        height, width = noisy.shape[-2:]
        embeds, mask = trimmed(conditioning)
        predicted = self.pipeline.transformer(
            hidden_states=pack(noisy),
            timestep=t / 1000,
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=None if bool(mask.all()) else mask,
            img_shapes=[[(1, height // 2, width // 2)]] * len(noisy),
            return_dict=False,
        )[0]
        return unpack(predicted, height, width)
