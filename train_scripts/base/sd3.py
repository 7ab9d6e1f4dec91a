"""The base in Stable Diffusion 3's layout: a tiny MM-DiT with two CLIP text encoders, without T5, a rectified flow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.embeddings import PatchEmbed
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from base.layout import Noised, text_config
from base.parts import DEFAULTS, FACTOR, SIZE
from vislora.models.joint import CountedJointAttention
from vislora.models.sd3 import ONE_FOR_ALL

WIDTH, HEADS, LAYERS, TEXT_WIDTH = 256, 4, 4, 96
PATCH = 2
SHIFTS = (-4, -2, 0, 2, 4)


class MovedPatches(PatchEmbed):
    """The library's patches, which may be told, in two more channels, by how many patches the picture was moved.

    Their places are then those in the picture as it was: where a patch lies on it changes from step to step.
    """

    def forward(self, latent: Tensor) -> Tensor:
        """Return the patches with their places (batch, patches, width)."""
        own = self.proj.in_channels
        if latent.shape[1] == own:
            return super().forward(latent)
        patches = self.proj(latent[:, :own]).flatten(2).transpose(1, 2)
        return (patches + self._places(latent[:, own:, 0, 0])).to(patches.dtype)

    def _places(self, moved: Tensor) -> Tensor:
        """Return sine and cosine of places further by `moved` (batch, 2), in patches across and down."""
        quarter = self.pos_embed.shape[-1] // 4
        rates = 10000.0 ** (-torch.arange(quarter, device=moved.device) / quarter)
        angle = moved[:, None, :, None] * rates
        sine, cosine = self.pos_embed.unflatten(-1, (2, 2, quarter)).unbind(-2)
        turned = (sine * angle.cos() + cosine * angle.sin(), cosine * angle.cos() - sine * angle.sin())
        return torch.stack(turned, -2).flatten(2)


class Both(nn.Module):
    """The transformer and the text encoders as one model.

    The pooled text is that of a caption of the same subject in any style, so that it comes to mean the subject alone. A
    transformer that finds the style there, too, learns each pair of both and hardly looks at the tokens.
    """

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.transformer = SD3Transformer2DModel(
            sample_size=SIZE // FACTOR,
            patch_size=PATCH,
            in_channels=4,
            out_channels=4,
            num_layers=LAYERS,
            attention_head_dim=WIDTH // HEADS,
            num_attention_heads=HEADS,
            joint_attention_dim=2 * TEXT_WIDTH,
            caption_projection_dim=WIDTH,
            pooled_projection_dim=2 * TEXT_WIDTH,
            pos_embed_max_size=SIZE // FACTOR // PATCH,
            qk_norm="rms_norm",
        )
        for name, module in self.transformer.named_modules():  # blocks begin as the identity (DiT, arXiv 2212.09748)
            if name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out")):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
        self.transformer.pos_embed = moved_patches(self.transformer.pos_embed)
        self.transformer.set_attn_processor(PlainAttention())
        config = text_config(tokenizer, TEXT_WIDTH)
        texts = [CLIPTextModelWithProjection(config) for _ in range(2)]
        for text in texts:
            text.set_attn_implementation("eager")
        self.texts = nn.ModuleList(texts)

    def forward(self, noisy: Tensor, t: Tensor, ids: Tensor, others: Tensor, moved: Tensor) -> Tensor:
        """Return the predicted velocity. noisy: (batch, 4, height, width); t: (batch,); ids, others: (batch, length).

        `ids` gives the tokens and `others` the pooled text. moved: (batch, 2), pixels to the left and up.
        """
        count = len(ids)
        found = [text(torch.cat([ids, others]), output_hidden_states=True) for text in self.texts]
        context = torch.cat([each.hidden_states[-2][:count] for each in found], -1)
        context = torch.cat([context, torch.zeros_like(context[:, :1])], 1)
        pooled = torch.cat([each.text_embeds[count:] for each in found], -1)
        counted = ONE_FOR_ALL["joint_attention_kwargs"]
        far = (moved / (FACTOR * PATCH))[..., None, None].expand(-1, -1, *noisy.shape[-2:])
        prediction: Tensor = self.transformer(
            torch.cat([noisy, far], 1), context, pooled, t, joint_attention_kwargs=counted, return_dict=False
        )[0]
        return prediction


def moved_patches(own: PatchEmbed) -> MovedPatches:
    """Return `own` as one that may be told how the picture was moved."""
    made = MovedPatches(
        height=own.height * own.patch_size,
        width=own.width * own.patch_size,
        patch_size=own.patch_size,
        in_channels=own.proj.in_channels,
        embed_dim=own.proj.out_channels,
        pos_embed_max_size=own.pos_embed_max_size,
    )
    made.load_state_dict(own.state_dict())
    return made


class PlainAttention(CountedJointAttention):
    """The library's, without torch's fused attention: compiled, two CPU cores train 197 pictures a second for 134."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, more: Tensor) -> Tensor:
        """Return softmax(query key / sqrt(width) + more) value."""
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + more
        return scores.softmax(-1).to(value.dtype) @ value


class StableDiffusion3:
    """See `base.layout.Layout`. Times are drawn logit-normal (arXiv 2403.03206, section 3.1)."""

    denoiser, length, texts = "transformer", 20, 2
    shifts = torch.cartesian_prod(torch.tensor(SHIFTS), torch.tensor(SHIFTS))
    # with less guidance an outline adapter loses its subject, and at twice the rate that of one DiT did
    defaults: Mapping[str, float] = DEFAULTS | {"guidance_scale": 2.5, "learning_rate": 0.0005}
    always: Mapping[str, Any] = ONE_FOR_ALL

    def model(self, tokenizer: CLIPTokenizer) -> Both:
        """Return fresh models."""
        return Both(tokenizer)

    def parts(self, model: Both) -> dict[str, nn.Module]:
        """Return the denoiser and the text encoders."""
        return {self.denoiser: model.transformer, "text_encoder": model.texts[0], "text_encoder_2": model.texts[1]}

    def noised(self, latents: Tensor) -> Noised:
        """Return (1 - s) x + s noise, 1000 s, noise - x and equal weights."""
        noise = torch.randn_like(latents)
        share = torch.randn(len(latents), device=latents.device).sigmoid()
        s = share.view(-1, 1, 1, 1)
        return Noised((1.0 - s) * latents + s * noise, 1000.0 * share, noise - latents, torch.ones_like(share))

    def pipeline(self, vae: AutoencoderKL, model: Both, tokenizer: CLIPTokenizer) -> StableDiffusion3Pipeline:
        """Return the pipeline."""
        vae.register_to_config(shift_factor=0.0)
        model.transformer.to(vae.device).eval()
        return StableDiffusion3Pipeline(
            **self.parts(model),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            text_encoder_3=None,
            tokenizer_3=None,
        )
