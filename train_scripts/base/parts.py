"""The models of the embedded base, in the standard Stable Diffusion layout, and its folder on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SIZE, FACTOR, WIDTH, LENGTH = 64, 4, 128, 77
START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
DEFAULTS = {
    "resolution": SIZE,
    "steps": 20,
    "guidance_scale": 3.0,
    "learning_rate": 0.002,
    "train_steps": 600,
    "batch_size": 8,
}


def train_tokenizer(texts: list[str], folder: Path, size: int = 4096) -> None:
    """Train CLIP's byte-pair encoding on `texts` and write vocab.json and merges.txt."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=WORD_END, continuing_subword_prefix="", unk_token=END))
    tokenizer.normalizer = normalizers.Lowercase()
    words = pre_tokenizers.Split(_regex(CLIP_WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, end_of_word_suffix=WORD_END, initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    _write_vocabulary(letters, [tuple(merge) for merge in model["merges"]], folder)


def _regex(pattern: str) -> Any:
    from tokenizers import Regex

    return Regex(pattern)


def _write_vocabulary(letters: list[str], merges: list[tuple[str, str]], folder: Path) -> None:
    """Write CLIP's two files: letters, letters that end a word, merges, and the two marks, in this order."""
    tokens = [*letters, *(letter + WORD_END for letter in letters), *(first + second for first, second in merges)]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys([*tokens, START, END]))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_tokenizer(folder: Path) -> CLIPTokenizer:
    """Return the tokenizer of `train_tokenizer`."""
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=[tuple(line.split(" ")) for line in lines],
        bos_token=START,
        eos_token=END,
        pad_token=END,
        unk_token=END,
        model_max_length=LENGTH,
    )


def make_vae() -> AutoencoderKL:
    """Return a fresh VAE: factor 4, 4 latent channels."""
    return AutoencoderKL(
        sample_size=SIZE,
        block_out_channels=(24, 48, 96),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )


def make_unet() -> UNet2DConditionModel:
    """Return a fresh denoiser: attention at 8 x 8 and 4 x 4."""
    return UNet2DConditionModel(
        sample_size=SIZE // FACTOR,
        block_out_channels=(64, 128, 160),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=(2, 4, 5),
        norm_num_groups=16,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return a fresh text encoder for this vocabulary."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


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


def pipeline(vae: AutoencoderKL, unet: nn.Module, text: nn.Module, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """Return the pipeline of these parts."""
    return StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=text,
        tokenizer=tokenizer,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def write_base(pipe: StableDiffusionPipeline, tokenizer_files: Path, folder: Path) -> None:
    """Write a pipeline as a diffusers folder in half precision, which old and new versions load in float32."""
    pipe.save_pretrained(folder)
    for part, name in (("vae", "diffusion_pytorch_model"), ("unet", "diffusion_pytorch_model")):
        _write_half(getattr(pipe, part).state_dict(), folder / part / f"{name}.safetensors")
    # transformers 5 has no module `text_model`; with the prefix older versions load the file, too
    state = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in _state(pipe.text_encoder)}
    _write_half(state, folder / "text_encoder" / "model.safetensors")
    _set(folder / "text_encoder" / "config.json", dtype="float32")
    for name in ("vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).write_bytes((tokenizer_files / name).read_bytes())
    (folder / "vislora.json").write_text(json.dumps(DEFAULTS, indent=2) + "\n", encoding="utf-8")


def _state(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(key, value) for key, value in module.state_dict().items() if "position_ids" not in key]


def _write_half(state: Mapping[str, torch.Tensor], path: Path) -> None:
    half = {key: value.detach().to("cpu", torch.float16).contiguous() for key, value in state.items()}
    save_file(half, path, {"format": "pt"})


def _set(path: Path, **values: Any) -> None:
    config = {**json.loads(path.read_text(encoding="utf-8")), **values}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
