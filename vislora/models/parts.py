"""What several families share: latents of a VAE, latents as a row of tokens, the objective of a scheduler."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vislora.diffusion import Discrete, Flow, GrowingShift
from vislora.errors import ModelError

PATCH = 2
"""Side of the squares of latents that become one token."""


def encode_scaled(vae: Any, pixels: Tensor) -> Tensor:
    """Return the mode of an `AutoencoderKL`'s posterior as its denoiser wants it: shifted and scaled, float32."""
    with torch.no_grad():
        mode = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
    return ((mode - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor).float()


def pack(latents: Tensor) -> Tensor:
    """Return squares of latents as tokens: (batch, channels, height, width) -> (batch, height width / 4, 4 channels).

    A token holds its square channel by channel, as black-forest-labs/flux, src/flux/sampling.py `prepare` packs it.
    """
    batch, channels, height, width = latents.shape
    squares = latents.view(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH**2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Return tokens as latents (batch, channels, height, width): `pack` backwards."""
    squares = tokens.view(len(tokens), height // PATCH, width // PATCH, -1, PATCH, PATCH)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, height, width)


def grid_ids(latents: Tensor, first: int = 0) -> Tensor:
    """Return the position of each token that `pack` makes: (tokens, 3) with `first`, row, column."""
    rows, columns = (torch.arange(side // PATCH, device=latents.device) for side in latents.shape[-2:])
    picture = torch.full((1,), first, device=latents.device)
    return torch.cartesian_prod(picture, rows, columns).float()


def padded(rows: Iterable[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return texts (tokens, width) as (batch, longest, width), zero behind each, and where there is text.

    The mask (batch, longest) is None when all are of one length.
    """
    texts = list(rows)
    embeds = pad_sequence(texts, batch_first=True)
    lengths = torch.tensor([len(text) for text in texts], device=embeds.device)
    mask = torch.arange(embeds.shape[1], device=embeds.device) < lengths[:, None]
    return embeds, None if len({len(text) for text in texts}) == 1 else mask.long()


def flow_of(scheduler: Any, patch: int = PATCH) -> Flow:
    """Return the objective of a flow scheduler; timesteps are shifted in training as they are in sampling.

    `patch`: side of the squares of latents that count as one token where the shift grows with the picture.
    """
    config = scheduler.config
    if not config.get("use_dynamic_shifting"):
        return Flow(shift=float(config.shift))
    return Flow(
        shift=GrowingShift(
            tokens=(config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)),
            mu=(config.get("base_shift", 0.5), config.get("max_shift", 1.15)),
            patch=patch,
            exponential=config.get("time_shift_type", "exponential") == "exponential",
        )
    )


def discrete_of(scheduler: Any) -> Discrete:
    """Return the objective of a diffusion scheduler. Raises `ModelError` for a kind of prediction that is not known."""
    from diffusers import DDPMScheduler

    training = DDPMScheduler.from_config(scheduler.config)
    kinds: dict[str, Literal["epsilon", "v"]] = {"epsilon": "epsilon", "v_prediction": "v"}
    kind = training.config.prediction_type
    if kind not in kinds:
        raise ModelError(f"prediction_type '{kind}' of its scheduler is not supported; known: {', '.join(kinds)}")
    return Discrete(training.alphas_cumprod, kinds[kind])


def image_step(pipeline: Any) -> int:
    """Return the number of pixels that the sides of a pipeline's images must be a multiple of."""
    denoiser = pipeline.components.get("transformer") or pipeline.unet
    patch = pipeline.vae_scale_factor * denoiser.config.get("patch_size", 1)
    return max(8, patch, pipeline.image_processor.config.vae_scale_factor)
