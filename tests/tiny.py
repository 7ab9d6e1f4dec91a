"""Tiny models of the real classes with random weights: built in well under a second, the same for the same seed.

Nothing is downloaded. Every builder returns a fresh object in eval mode; `saved` keeps one folder per process.
"""

from __future__ import annotations

import atexit
import copy
import shutil
import string
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 16
"""Length of a padded CLIP prompt."""

WORDS = ("a", "an", "the", "of", "cat", "dog", "house", "tree", "red", "blue", "ink", "outline", "blob", "drawing")


def seeded(build: Callable[[], Any], seed: int) -> Any:
    """Build with a fixed draw, and leave the global random state as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def clip_tokenizer() -> Any:
    """Return a byte-pair tokenizer of single characters and a few whole words."""
    from transformers import CLIPTokenizer

    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            left, right = pieces[0], pieces[1]
            if (left, right) not in merges:
                merges.append((left, right))
            pieces = [left + right, *pieces[2:]]
    tokens += [left + right for left, right in merges]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)


def t5_tokenizer(length: int = TOKENS) -> Any:
    """Return a unigram tokenizer of single characters and a few whole words."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    letters = [(letter, -5.0) for letter in string.ascii_letters + string.digits + string.punctuation]
    words = [(f"\u2581{word}", -3.0) for word in WORDS]
    return T5Tokenizer(vocab=[*special, *letters, *words], extra_ids=0, model_max_length=length)


def _clip_config(**changes: Any) -> Any:
    from transformers import CLIPTextConfig

    tokenizer = clip_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 1}
    length = {"vocab_size": len(tokenizer), "max_position_embeddings": TOKENS}
    return CLIPTextConfig(**{**sizes, **ids, **length, **changes})


def clip_text(seed: int = 0, hidden_act: str = "quick_gelu") -> Any:
    """Return a `CLIPTextModel` of two layers, width 16."""
    from transformers import CLIPTextModel

    return seeded(lambda: CLIPTextModel(_clip_config(hidden_act=hidden_act)), seed).eval()


def clip_text_projected(seed: int = 0, **changes: Any) -> Any:
    """Return a `CLIPTextModelWithProjection` of two layers, width 16, projected to 16."""
    from transformers import CLIPTextModelWithProjection

    return seeded(lambda: CLIPTextModelWithProjection(_clip_config(**{"projection_dim": 16, **changes})), seed).eval()


def t5_encoder(seed: int = 0) -> Any:
    """Return a gated `T5EncoderModel` of two layers, width 32, as SD3 and FLUX have."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=32,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    return seeded(lambda: T5EncoderModel(config), seed).eval()


def vae(seed: int = 0, latent_channels: int = 4, halvings: int = 1, **changes: Any) -> Any:
    """Return an `AutoencoderKL` that halves the sides, once unless said."""
    from diffusers import AutoencoderKL

    def build() -> Any:
        return AutoencoderKL(
            block_out_channels=(*[8] * halvings, 16),
            down_block_types=("DownEncoderBlock2D",) * (halvings + 1),
            up_block_types=("UpDecoderBlock2D",) * (halvings + 1),
            latent_channels=latent_channels,
            norm_num_groups=4,
            sample_size=16,
            **changes,
        )

    return seeded(build, seed).eval()


def unet(seed: int = 0, use_linear_projection: bool = False, **changes: Any) -> Any:
    """Return a `UNet2DConditionModel`: latents (batch, 4, 8, 8), text (batch, tokens, 16)."""
    from diffusers import UNet2DConditionModel

    def build() -> Any:
        settings = {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "layers_per_block": 1,
            "block_out_channels": (16, 32),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
            "norm_num_groups": 8,
            "use_linear_projection": use_linear_projection,
        }
        return UNet2DConditionModel(**{**settings, **changes})

    return seeded(build, seed).eval()


def sd3_transformer(seed: int = 0) -> Any:
    """Return an `SD3Transformer2DModel` of two blocks (the last without context): latents (batch, 4, 8, 8)."""
    from diffusers import SD3Transformer2DModel

    def build() -> Any:
        return SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=32,
            out_channels=4,
            pos_embed_max_size=16,
            dual_attention_layers=(),
            qk_norm=None,
        )

    return seeded(build, seed).eval()


def flux_transformer(seed: int = 0, **changes: Any) -> Any:
    """Return a `FluxTransformer2DModel` with one double and one single block."""
    from diffusers import FluxTransformer2DModel

    def build() -> Any:
        return FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(2, 2, 4),
            **{"pooled_projection_dim": 32, "guidance_embeds": False, **changes},
        )

    return seeded(build, seed).eval()


def dit(seed: int = 0) -> Any:
    """Return a class-conditional `DiTTransformer2DModel` of two blocks: latents (batch, 4, 8, 8), labels (batch,)."""
    from diffusers import DiTTransformer2DModel

    def build() -> Any:
        return DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=10,
        )

    return seeded(build, seed).eval()


def vit(seed: int = 0) -> Any:
    """Return a `ViTModel` of two layers: pixels (batch, 3, 16, 16)."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    return seeded(lambda: ViTModel(config), seed).eval()


class Volume(nn.Module):
    """Adds a depth of two: (batch, channels, height, width) -> (batch, channels, 2, height, width)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x, -x], dim=2)


def cnn(seed: int = 0) -> nn.Sequential:
    """Return a plain CNN with every kind of layer that adapters go on: tokens (batch, 12) of 0..9 -> (batch, 5)."""

    def build() -> nn.Sequential:
        return nn.Sequential(
            nn.Embedding(10, 8, padding_idx=0),  # 0
            nn.Linear(8, 12),  # 1
            nn.Conv1d(12, 16, 3, padding=1),  # 2
            nn.GELU(),  # 3
            nn.Unflatten(2, (3, 4)),  # 4
            nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect", groups=4),  # 5
            nn.BatchNorm2d(16),  # 6
            nn.Conv2d(16, 8, 1),  # 7
            Volume(),  # 8
            nn.Conv3d(8, 4, (1, 3, 3), stride=(1, 1, 2), padding=(0, 1, 1), bias=False),  # 9
            nn.Flatten(1),  # 10
            nn.Linear(48, 5),  # 11
        )

    return seeded(build, seed).eval()


def sd_pipeline(seed: int = 0) -> Any:
    """Return a whole `StableDiffusionPipeline`: images of 16 x 16 pixels."""
    from diffusers import DDPMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        vae=vae(seed),
        text_encoder=clip_text(seed),
        tokenizer=clip_tokenizer(),
        unet=unet(seed),
        scheduler=DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sdxl_unet(seed: int = 0, encoders: int = 2, sizes: int = 6, **changes: Any) -> Any:
    """Return a UNet that is told `sizes` numbers of 8 features each and a pooled text of 16, as those of SDXL are."""
    settings = {
        "use_linear_projection": True,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "cross_attention_dim": 16 * encoders,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 16 + 8 * sizes,
    }
    return unet(seed, **{**settings, **changes})


def sdxl_pipeline(seed: int = 0, refiner: bool = False) -> Any:
    """Return a whole `StableDiffusionXLPipeline`, or the Img2Img one of the refiner: images of 16 x 16 pixels."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

    parts = {
        "vae": vae(seed, scaling_factor=0.13025),
        "text_encoder": None if refiner else clip_text(seed),
        "tokenizer": None if refiner else clip_tokenizer(),
        "text_encoder_2": clip_text_projected(seed + 1),
        "tokenizer_2": clip_tokenizer(),
        "unet": sdxl_unet(seed, 1, 5) if refiner else sdxl_unet(seed),
        "scheduler": EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    }
    if refiner:
        pipeline = StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True, add_watermarker=False)
    else:
        pipeline = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sd3_pipeline(seed: int = 0) -> Any:
    """Return a whole `StableDiffusion3Pipeline` with both CLIP text encoders and T5: images of 16 x 16 pixels."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline(
        transformer=sd3_transformer(seed),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(seed, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_text_projected(seed),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text_projected(seed + 1),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(seed),
        tokenizer_3=t5_tokenizer(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def flux_pipeline(seed: int = 0, kind: str = "FluxPipeline", guidance_embeds: bool = True) -> Any:
    """Return a whole `FluxPipeline` or `FluxKontextPipeline` with CLIP and T5; schnell has no guidance embeds."""
    import diffusers

    pipeline = getattr(diffusers, kind)(
        transformer=flux_transformer(seed, guidance_embeds=guidance_embeds, pooled_projection_dim=16),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=scaled_vae(seed),
        text_encoder=clip_text(seed),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(seed),
        tokenizer_2=t5_tokenizer(512),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def scaled_vae(seed: int, **changes: Any) -> Any:
    """Return the `AutoencoderKL` of FLUX.1, which others have too."""
    plain = {"use_quant_conv": False, "use_post_quant_conv": False}
    return vae(seed, scaling_factor=0.3611, shift_factor=0.1159, **plain, **changes)


def umt5_encoder(seed: int = 0) -> Any:
    """Return a `UMT5EncoderModel` of two layers, width 32, as AuraFlow has."""
    from transformers import UMT5Config, UMT5EncoderModel

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = UMT5Config(vocab_size=len(t5_tokenizer()), feed_forward_proj="gated-gelu", **sizes)
    return seeded(lambda: UMT5EncoderModel(config), seed).eval()


def gemma2(seed: int = 0) -> Any:
    """Return a `Gemma2Model` of two layers, width 32, as Lumina 2 has."""
    from transformers import Gemma2Config, Gemma2Model

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma2Config(vocab_size=len(t5_tokenizer()), head_dim=8, num_key_value_heads=1, pad_token_id=0, **sizes)
    return seeded(lambda: Gemma2Model(config), seed).eval()


def pixart_pipeline(seed: int = 0, kind: str = "PixArtSigmaPipeline", sizes: bool = False) -> Any:
    """Return a whole PixArt pipeline with T5; `sizes`: one that is told the size of the picture, as alpha at 1024."""
    import diffusers

    def build() -> Any:
        return diffusers.PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=12 if sizes else 8,
            num_layers=2,
            cross_attention_dim=24 if sizes else 16,
            sample_size=128 if sizes else 8,
            caption_channels=32,
            use_additional_conditions=sizes,
        )

    return getattr(diffusers, kind)(
        tokenizer=t5_tokenizer(512),
        text_encoder=t5_encoder(seed),
        vae=vae(seed, scaling_factor=0.13025),
        transformer=seeded(build, seed).eval(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def lumina2_pipeline(seed: int = 0) -> Any:
    """Return a whole `Lumina2Pipeline` with Gemma 2."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

    def build() -> Any:
        return Lumina2Transformer2DModel(
            sample_size=2,
            in_channels=4,
            hidden_size=24,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(4, 4, 4),
            axes_lens=(300, 64, 64),
            cap_feat_dim=32,
        )

    return Lumina2Pipeline(
        transformer=seeded(build, seed).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=scaled_vae(seed, halvings=3),  # a number that the pipeline knows by heart
        text_encoder=gemma2(seed),
        tokenizer=t5_tokenizer(512),
    )


def auraflow_pipeline(seed: int = 0) -> Any:
    """Return a whole `AuraFlowPipeline` with UMT5."""
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

    def build() -> Any:
        return AuraFlowTransformer2DModel(
            sample_size=8,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pos_embed_max_size=64,
        )

    return AuraFlowPipeline(
        tokenizer=t5_tokenizer(512),
        text_encoder=umt5_encoder(seed),
        vae=vae(seed, scaling_factor=0.13025),
        transformer=seeded(build, seed).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


PIPELINES: dict[str, Callable[[], Any]] = {
    "sd": sd_pipeline,
    "sdxl": sdxl_pipeline,
    "sdxl-refiner": lambda: sdxl_pipeline(refiner=True),
    "sd3": sd3_pipeline,
    "flux": flux_pipeline,
    "pixart": pixart_pipeline,
    "lumina2": lumina2_pipeline,
    "auraflow": auraflow_pipeline,
    "sana": lambda: _newer("sana_pipeline"),
    "qwen-image": lambda: _newer("qwen_image_pipeline"),
    "z-image": lambda: _newer("z_image_pipeline"),
    "flux2": lambda: _newer("flux2_pipeline"),
}


def _newer(name: str, **changes: Any) -> Any:
    from tests import tiny_dits

    return getattr(tiny_dits, name)(**changes)


def sd_v_pipeline(seed: int = 0) -> Any:
    """Return a `StableDiffusionPipeline` that predicts v, as Stable Diffusion 2.x at 768 pixels does."""
    pipeline = sd_pipeline(seed)
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, prediction_type="v_prediction")
    return pipeline


VARIANTS: dict[str, Callable[[], Any]] = {
    "sd-v": sd_v_pipeline,
    "flux-schnell": lambda: flux_pipeline(guidance_embeds=False),
    "pixart-alpha": lambda: pixart_pipeline(kind="PixArtAlphaPipeline", sizes=True),
    "flux-kontext": lambda: flux_pipeline(kind="FluxKontextPipeline"),
    "qwen-image-edit": lambda: _newer("qwen_image_pipeline", kind="QwenImageEditPipeline"),
    "qwen-image-edit-plus": lambda: _newer("qwen_image_pipeline", kind="QwenImageEditPlusPipeline"),
    "z-image-base": lambda: _newer("z_image_pipeline", shift=6.0),
    "flux2-distilled": lambda: _newer("flux2_pipeline", is_distilled=True),
}
"""Further bases of these families."""

STAPLES = ("sd", "sd3", "flux")
"""Families on which whole jobs are tested: a UNet, latents as pictures and latents as tokens. tests/models has all."""


def side(family: str) -> int:
    """Return the pixels of a side of the images of a pipeline here."""
    return 64 if family == "sana" else 16


@cache
def saved(family: str) -> Path:
    """Return a folder with a pipeline of `PIPELINES` or `VARIANTS`, written once per process: read it only."""
    folder = Path(tempfile.mkdtemp(prefix=f"tiny-{family}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    pipeline = {**PIPELINES, **VARIANTS}[family]()
    pipeline.save_pretrained(folder)
    if "sample_size" not in (pipeline.components.get("transformer") or pipeline.unet).config:
        (folder / "vislora.json").write_text(
            f'{{"resolution": {side(family)}}}'
        )  # a size that no part of the pipeline tells
    return folder


def unet_inputs(batch: int = 2, seed: int = 7) -> dict[str, Tensor]:
    """Return keyword inputs of `unet`."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, 4, 8, 8, generator=draw),
        "timestep": torch.tensor([10, 700][:batch]),
        "encoder_hidden_states": torch.randn(batch, 5, 16, generator=draw),
    }


def sd3_inputs(batch: int = 2, seed: int = 7) -> dict[str, Tensor]:
    """Return keyword inputs of `sd3_transformer`."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 4, 8, 8, generator=draw),
        "timestep": torch.tensor([10.0, 700.0][:batch]),
        "encoder_hidden_states": torch.randn(batch, 5, 32, generator=draw),
        "pooled_projections": torch.randn(batch, 32, generator=draw),
    }


def flux_inputs(batch: int = 2, seed: int = 7) -> dict[str, Tensor]:
    """Return keyword inputs of `flux_transformer`: 4 image and 3 text tokens."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 4, 16, generator=draw),
        "timestep": torch.tensor([0.1, 0.7][:batch]),
        "encoder_hidden_states": torch.randn(batch, 3, 32, generator=draw),
        "pooled_projections": torch.randn(batch, 32, generator=draw),
        "img_ids": torch.tensor([[0.0, i // 2, i % 2] for i in range(4)]),
        "txt_ids": torch.zeros(3, 3),
    }


def dit_inputs(batch: int = 2, seed: int = 7) -> dict[str, Tensor]:
    """Return keyword inputs of `dit`."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 4, 8, 8, generator=draw),
        "timestep": torch.tensor([10, 700][:batch]),
        "class_labels": torch.tensor([1, 3][:batch]),
    }


def vit_inputs(batch: int = 2, seed: int = 7) -> dict[str, Tensor]:
    """Return keyword inputs of `vit`."""
    return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed))}


def clip_inputs(batch: int = 2) -> dict[str, Tensor]:
    """Return keyword inputs of `clip_text` and `clip_text_projected`."""
    prompts = ["a red cat", "the blue house of ink"][:batch]
    return dict(clip_tokenizer()(prompts, padding="max_length", truncation=True, return_tensors="pt"))


def t5_inputs(batch: int = 2) -> dict[str, Tensor]:
    """Return keyword inputs of `t5_encoder`."""
    prompts = ["a red cat", "the blue house of ink"][:batch]
    return dict(t5_tokenizer()(prompts, padding="max_length", truncation=True, return_tensors="pt"))


def cnn_inputs(batch: int = 2) -> dict[str, Tensor]:
    """Return keyword inputs of `cnn`."""
    return {"input": torch.arange(12 * batch).view(batch, 12) % 10}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    "unet": (unet, unet_inputs),
    "sd3": (sd3_transformer, sd3_inputs),
    "flux": (flux_transformer, flux_inputs),
    "dit": (dit, dit_inputs),
    "clip": (clip_text, clip_inputs),
    "t5": (t5_encoder, t5_inputs),
    "vit": (vit, vit_inputs),
    "cnn": (cnn, cnn_inputs),
}
"""name -> (builder, builder of its keyword inputs)."""


@cache
def _pristine(name: str) -> nn.Module:
    return MODELS[name][0]()


def model(name: str) -> nn.Module:
    """Return a fresh copy of a model of `MODELS`; copying is faster than building."""
    return copy.deepcopy(_pristine(name))


def output(module: nn.Module, name: str) -> Tensor:
    """Run `module`, a model of `MODELS`, on its inputs and return its main output."""
    inputs = MODELS[name][1]()
    if name == "cnn":
        return module(inputs["input"])
    return module(**inputs)[0]
