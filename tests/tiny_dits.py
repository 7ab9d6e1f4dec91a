"""Tiny pipelines of the newer DiTs, whose text encoders are language models: real classes, random weights.

See `tests.tiny`, which has the older families and lists these in `PIPELINES`.
"""

from __future__ import annotations

from typing import Any

import torch

from tests import tiny
from tests.tiny import seeded

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IMAGE = "<|image_pad|>"
_SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}


def qwen_tokenizer(length: int = 2048) -> Any:
    """Return a byte-level BPE tokenizer of single bytes and a few whole words, with a chat template."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", IMAGE]
    vocab = ["<|endoftext|>", *special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges: list[tuple[str, str]] = []
    for word in tiny.WORDS:
        pieces = list(word)
        while len(pieces) > 1:
            if (pieces[0], pieces[1]) not in merges:
                merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    vocab += [left + right for left, right in merges]
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(dict.fromkeys(vocab))},
        merges=merges,
        additional_special_tokens=special,
        model_max_length=length,
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def qwen2_vl(seed: int = 0) -> Any:
    """Return a `Qwen2_5_VLForConditionalGeneration` of two layers, width 16, as Qwen-Image has."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {**_SIZES, "vocab_size": len(qwen_tokenizer()), "num_hidden_layers": 2}
    rope = {"type": "mrope", "mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 10000.0}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    place, start = qwen_tokenizer().convert_tokens_to_ids([IMAGE, "<|vision_start|>"])
    config = Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=place,
        vision_start_token_id=start,
    )
    return seeded(lambda: Qwen2_5_VLForConditionalGeneration(config), seed).eval()


def qwen3(seed: int = 0, layers: int = 2, kind: str = "Qwen3Model") -> Any:
    """Return a Qwen 3 of width 16: `Qwen3Model` as Z-Image has, `Qwen3ForCausalLM` as FLUX.2 klein has."""
    import transformers

    sizes = {**_SIZES, "vocab_size": len(qwen_tokenizer()), "num_hidden_layers": layers, "head_dim": 8}
    config = transformers.Qwen3Config(**sizes)
    return seeded(lambda: getattr(transformers, kind)(config), seed).eval()


class SeesImages:
    """Does what `Qwen2VLProcessor` does with texts and pictures; that one wants torchvision for videos."""

    def __call__(self, text: list[str], images: Any, padding: bool, return_tensors: str) -> Any:
        from transformers import BatchFeature, Qwen2VLImageProcessorPil

        shown = images if isinstance(images, list) else [images]
        seen = Qwen2VLImageProcessorPil()(images=shown, return_tensors=return_tensors)
        counts = (seen["image_grid_thw"].prod(1) // 4).tolist()
        texts = [one.replace(IMAGE, IMAGE * counts[index]) for index, one in enumerate(text)]
        tokens = qwen_tokenizer(4096)(texts, padding=padding, return_tensors=return_tensors)
        return BatchFeature({**tokens, **seen})


def qwen_image_pipeline(seed: int = 0, kind: str = "QwenImagePipeline") -> Any:
    """Return a whole `QwenImagePipeline` with Qwen 2.5 VL: its VAE makes latents of half the sides, 4 channels.

    One of Edit is without its processor: set `SeesImages()`.
    """
    import diffusers

    def transformer() -> Any:
        return diffusers.QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 6, 6),
        )

    def vae() -> Any:
        return diffusers.AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[-0.5, 0.25, 0.0, 0.75],
            latents_std=[2.5, 1.5, 2.0, 3.0],
        )

    return getattr(diffusers, kind)(
        **({} if kind == "QwenImagePipeline" else {"processor": None}),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        vae=seeded(vae, seed).eval(),
        text_encoder=qwen2_vl(seed),
        tokenizer=qwen_tokenizer(),
        transformer=seeded(transformer, seed).eval(),
    )


def z_image_pipeline(seed: int = 0, shift: float = 3.0) -> Any:
    """Return a whole `ZImagePipeline` with Qwen 3; Turbo has a shift of 3, the model it was distilled from one of 6."""
    import diffusers

    def transformer() -> Any:
        return diffusers.ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[4, 6, 6],
            axes_lens=[1024, 64, 64],
        )

    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=tiny.scaled_vae(seed),
        text_encoder=qwen3(seed),
        tokenizer=qwen_tokenizer(),
        transformer=seeded(transformer, seed).eval(),
    )


def flux2_transformer(seed: int = 0, text: int = 48, guidance_embeds: bool = False) -> Any:
    """Return a `Flux2Transformer2DModel` with one double and one single block."""
    from diffusers import Flux2Transformer2DModel

    def build() -> Any:
        return Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=text,
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=guidance_embeds,
        )

    return seeded(build, seed).eval()


def flux2_vae(seed: int = 0) -> Any:
    """Return an `AutoencoderKLFlux2` that halves the sides, with running statistics that are not those of a new one."""
    from diffusers import AutoencoderKLFlux2

    def build() -> Any:
        made = AutoencoderKLFlux2(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=16,
        )
        made.bn.running_mean.copy_(torch.randn(16) * 0.1)
        made.bn.running_var.copy_(torch.rand(16) + 0.5)
        return made

    return seeded(build, seed).eval()


def flux2_pipeline(seed: int = 0, is_distilled: bool = False) -> Any:
    """Return a whole `Flux2KleinPipeline` with Qwen 3."""
    import diffusers

    return diffusers.Flux2KleinPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=flux2_vae(seed),
        text_encoder=qwen3(seed, 28, "Qwen3ForCausalLM"),  # three of its layers are read, the last is the 27th
        tokenizer=qwen_tokenizer(),
        transformer=flux2_transformer(seed),
        is_distilled=is_distilled,
    )


def sana_pipeline(seed: int = 0) -> Any:
    """Return a whole `SanaPipeline` with Gemma 2: images of 64 x 64 pixels, as sides are a 32nd of them in latents."""
    import diffusers

    def transformer() -> Any:
        return diffusers.SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=32,
            sample_size=2,
        )

    def vae() -> Any:
        return diffusers.AutoencoderDC(
            latent_channels=4,
            attention_head_dim=8,
            encoder_block_types="ResBlock",
            decoder_block_types="ResBlock",
            encoder_block_out_channels=(8,) * 6,
            decoder_block_out_channels=(8,) * 6,
            encoder_layers_per_block=(1,) * 6,
            decoder_layers_per_block=(1,) * 6,
            encoder_qkv_multiscales=((),) * 6,
            decoder_qkv_multiscales=((),) * 6,
            scaling_factor=0.41407,
        )

    return diffusers.SanaPipeline(
        tokenizer=tiny.t5_tokenizer(2048),
        text_encoder=tiny.gemma2(seed),
        vae=seeded(vae, seed).eval(),
        transformer=seeded(transformer, seed).eval(),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )
