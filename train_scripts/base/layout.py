"""What a layout of the base is: its models, what they learn from, and the pipeline that they make."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTokenizer


class Noised(NamedTuple):
    """Noisy latents (batch, 4, height, width), timesteps (batch,), what to predict, and the weight of each (batch,)."""

    latents: Tensor
    t: Tensor
    target: Tensor
    weight: Tensor


class Layout(Protocol):
    """One file implements it for Stable Diffusion 1, one for Stable Diffusion 3."""

    denoiser: str
    """The name of the denoiser's folder."""
    length: int
    """How many tokens of a prompt the text encoders see."""
    texts: int
    """How many captions of a picture the model is given. The second is of the same subject, maybe in another style."""
    shifts: Tensor
    """(n, 2): by how many pixels to the left and up pictures are moved in training. The model is told, if n > 1."""
    defaults: Mapping[str, float]
    """What `vislora.json` says: how the base is sampled and trained on unless the user says otherwise."""
    always: Mapping[str, Any]
    """What else the pipeline is told whenever it draws."""

    def model(self, tokenizer: CLIPTokenizer) -> nn.Module:
        """Return fresh models as one: forward(noisy latents, t, *told) predicts the target."""

    def parts(self, model: Any) -> dict[str, nn.Module]:
        """Return what `model` consists of, by its names in the pipeline."""

    def noised(self, latents: Tensor) -> Noised:
        """Return scaled `latents` with noise, at random timesteps."""

    def pipeline(self, vae: AutoencoderKL, model: Any, tokenizer: CLIPTokenizer) -> DiffusionPipeline:
        """Return the pipeline of these parts."""


def start_from(base: Path, parts: Mapping[str, nn.Module]) -> None:
    """Give `parts` the weights that they have in the folder of a base of the same layout."""
    for name, part in parts.items():
        kind: Any = type(part)
        part.load_state_dict(kind.from_pretrained(base / name).state_dict())


def text_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    """Return the configuration of a text encoder of two layers for this vocabulary."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
