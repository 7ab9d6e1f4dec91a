"""Qwen-Image and Qwen-Image-Edit: an MM-DiT over packed latents, conditioned on Qwen 2.5 VL, a rectified flow.

Its autoencoder is one of videos, of which a picture is the only frame (arXiv 2508.02324). Edit has the image to edit as
a second run of tokens, and its text encoder looks at it beside the prompt (ibid., section 4.3).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from vislora.models.base import Card, Traits, quiet, read_traits
from vislora.models.dit import Dit, tags
from vislora.models.parts import image_step, pack, padded, unpack

TOKENS = 512
SEEN = {"QwenImageEditPipeline": 1024**2, "QwenImageEditPlusPipeline": 384**2}
"""Pixels of the image to edit as the text encoder of each pipeline sees it; sides are multiples of 32."""


class QwenImage(Dit):
    """A loaded `QwenImagePipeline`, or one of the two of Edit. See `models.base.Family`."""

    card: ClassVar[Card] = Card(
        name="qwen-image",
        pipelines=("QwenImagePipeline", *SEEN),
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
        edits = type(pipeline).__name__ in SEEN
        names, step = tags("qwen-image-edit" if edits else "qwen-image"), image_step(pipeline)
        defaults = {"steps": 50, "guidance_scale": 4.0, "source": "latents and text" if edits else ""}
        return read_traits(path, pipeline, resolution, step, names, **defaults)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Return the mode of the VAE's posterior, each channel with its own shift and scale."""
        vae = self.pipeline.vae
        with torch.no_grad():
            mode = vae.encode(pixels.to(vae.device, vae.dtype).unsqueeze(2)).latent_dist.mode().squeeze(2)
        shape = 1, -1, 1, 1
        mean, spread = (torch.tensor(vae.config[key]).view(shape) for key in ("latents_mean", "latents_std"))
        return (mode.float() - mean.to(mode.device)) / spread.to(mode.device)

    def encode_prompt(self, prompts: list[str], sources: Tensor | None = None) -> dict[str, list[Tensor]]:
        """Return `prompt_embeds`, for each prompt (tokens, width); see `models.base.ReadsSource`."""
        with quiet():  # of captions that are too long: `sampling.cut_off` tells it once
            if sources is None:
                encoded = self.pipeline.encode_prompt(prompts, max_sequence_length=TOKENS)
                return {"prompt_embeds": list(_texts(*encoded))}
            images = self.pipeline.image_processor.postprocess(sources, output_type="pil")
            return {"prompt_embeds": [self._seen(*pair) for pair in zip(prompts, images, strict=True)]}

    def _seen(self, prompt: str, image: Any) -> Tensor:
        area = SEEN[type(self.pipeline).__name__]
        width, height = seen_size(area, image.width / image.height)
        shown = self.pipeline.image_processor.resize(image, height, width)
        return next(iter(_texts(*self.pipeline.encode_prompt([prompt], [shown]))))

    def predict(self, noisy: Tensor, t: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        """Run the transformer; `source` latents (batch, channels, height, width) are what Edit edits."""
        embeds, mask = padded(conditioning["prompt_embeds"])
        tokens, shapes = pack(noisy), [_shape(noisy)]
        count = tokens.shape[1]
        if "source" in conditioning:
            source = conditioning["source"].to(noisy.dtype)
            tokens, shapes = torch.cat([tokens, pack(source)], 1), [*shapes, _shape(source)]
        predicted = self.pipeline.transformer(
            hidden_states=tokens,
            timestep=t / 1000,
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=mask,
            img_shapes=[shapes] * len(noisy),
            return_dict=False,
        )[0]
        return unpack(predicted[:, :count], *noisy.shape[-2:])


def seen_size(area: int, ratio: float) -> tuple[int, int]:
    """Return width and height of about `area` pixels, multiples of 32, with the aspect `ratio` of width to height."""
    width = math.sqrt(area * ratio)
    return round(width / 32) * 32, round(width / ratio / 32) * 32


def _texts(embeds: Tensor, mask: Tensor | None) -> Iterable[Tensor]:
    """Yield each text (tokens, width) without what was padded; without a mask nothing was."""
    return embeds if mask is None else (row[kept.bool()] for row, kept in zip(embeds, mask, strict=True))


def _shape(latents: Tensor) -> tuple[int, int, int]:
    return 1, latents.shape[-2] // 2, latents.shape[-1] // 2
