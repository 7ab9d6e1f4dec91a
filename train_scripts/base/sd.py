"""The base in Stable Diffusion 1's layout: a small UNet with one CLIP text encoder, which predicts the noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from base.layout import Noised, text_config
from base.parts import DEFAULTS, FACTOR, SIZE

WIDTH = 128
DROPOUT = 0.1
"""As for CIFAR-10 (Ho et al., arXiv 2006.11239, appendix B): two thousand pictures are learned by heart otherwise, and
pairs of subject and style that are not among them are drawn worse."""
SNR_LIMIT = 5.0


class Upsample(nn.Module):
    """The library's, with the nearest upsampling as a view: compiled, torch 2.13 loses gradients in `interpolate`."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, output_size: object = None) -> Tensor:
        """Return x at twice the size, convolved. output_size: not needed, as every size here halves without a rest."""
        batch, channels, height, width = x.shape
        twice = x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2)
        upsampled: Tensor = self.conv(twice.reshape(batch, channels, 2 * height, 2 * width))
        return upsampled


class Both(nn.Module):
    """The denoiser, with attention at 8 x 8 and 4 x 4, and the text encoder as one model."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel(
            sample_size=SIZE // FACTOR,
            block_out_channels=(64, 128, 160),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=(2, 4, 5),
            norm_num_groups=16,
        )
        for block in self.unet.up_blocks[:-1]:
            block.upsamplers[0] = Upsample(block.upsamplers[0].conv)
        for module in self.unet.modules():
            if isinstance(module, ResnetBlock2D):
                module.dropout.p = DROPOUT  # not in the configuration: who trains an adapter wants none
        self.text = CLIPTextModel(text_config(tokenizer, WIDTH))
        if not torch.cuda.is_available():  # on a CPU the backward pass of fused attention takes a third of the time
            self.unet.set_attn_processor(AttnProcessor())
            self.text.set_attn_implementation("eager")

    def forward(self, noisy: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """Return the predicted noise. noisy: (batch, 4, height, width); t: (batch,); ids: (batch, length)."""
        prediction: Tensor = self.unet(noisy, t, self.text(ids)[0]).sample
        return prediction


class StableDiffusion1:
    """See `base.layout.Layout`."""

    denoiser, length, texts = "unet", 77, 1
    shifts = torch.zeros(1, 2, dtype=torch.long)
    defaults: Mapping[str, float] = DEFAULTS | {"timestep_shift": 1.7}  # adapters learn more of a style
    always: Mapping[str, Any] = {}

    def __init__(self) -> None:
        self.alphas = make_scheduler().alphas_cumprod

    def model(self, tokenizer: CLIPTokenizer) -> Both:
        """Return fresh models."""
        return Both(tokenizer)

    def parts(self, model: Both) -> dict[str, nn.Module]:
        """Return the denoiser and the text encoder."""
        return {self.denoiser: model.unet, "text_encoder": model.text}

    def noised(self, latents: Tensor) -> Noised:
        """Return noisy latents, the noise, and weights (min-SNR, arXiv 2303.09556 eq. 5)."""
        t = torch.randint(len(self.alphas), (len(latents),), device=latents.device)
        noise, share = torch.randn_like(latents), self.alphas.to(t.device)[t]
        alpha, snr = share.view(-1, 1, 1, 1), share / (1.0 - share)
        noisy = alpha.sqrt() * latents + (1.0 - alpha).sqrt() * noise
        return Noised(noisy, t, noise, snr.clamp(max=SNR_LIMIT) / snr)

    def pipeline(self, vae: AutoencoderKL, model: Both, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
        """Return the pipeline of these parts."""
        return StableDiffusionPipeline(
            **self.parts(model),
            vae=vae,
            tokenizer=tokenizer,
            scheduler=make_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def make_scheduler() -> DDIMScheduler:
    """Return Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
