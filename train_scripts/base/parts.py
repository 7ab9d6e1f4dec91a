"""What both layouts of the base share: the vocabulary, the VAE, and the folder on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTokenizer, PreTrainedModel

SIZE, FACTOR = 64, 4
START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
PRIVATE = 0xE000
"""The first of Unicode's signs for private use."""
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
DEFAULTS = {
    "resolution": SIZE,
    "steps": 20,
    "guidance_scale": 2.0,
    "learning_rate": 0.001,
    "train_steps": 700,
    "batch_size": 8,
}


def train_tokenizer(texts: list[str], folder: Path, size: int = 4096) -> None:
    """Train CLIP's byte-pair encoding on `texts` and write vocab.json and merges.txt, the same ones every time.

    While it trains, a letter that ends a word is one sign by itself: the trainer numbers its own ends of words in
    another order each time, and by that number it chooses between pairs that are equally frequent.
    """
    words = pre_tokenizers.Split(_regex(CLIP_WORDS), behavior="removed", invert=True)
    cut = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ends = {letter: chr(PRIVATE + number) for number, letter in enumerate(letters)}
    back = {ord(sign): letter + WORD_END for letter, sign in ends.items()}
    signed = [word[:-1] + ends[word[-1]] for text in texts for word, _ in cut.pre_tokenize_str(text.lower())]
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=[*letters, *ends.values()], show_progress=False)
    tokenizer.train_from_iterator(signed, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    _write_vocabulary(letters, [(one.translate(back), two.translate(back)) for one, two in merges], folder)


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


def read_tokenizer(folder: Path, length: int) -> CLIPTokenizer:
    """Return the tokenizer of `train_tokenizer`, which cuts prompts off at `length` tokens."""
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=[tuple(line.split(" ")) for line in lines],
        bos_token=START,
        eos_token=END,
        pad_token=END,
        unk_token=END,
        model_max_length=length,
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


def write_base(pipe: DiffusionPipeline, tokenizer_files: Path, folder: Path, defaults: Mapping[str, float]) -> None:
    """Write a pipeline as a diffusers folder in half precision, which old and new versions load in float32."""
    pipe.save_pretrained(folder)
    for name, part in pipe.components.items():
        if isinstance(part, PreTrainedModel):
            # transformers 5 has no module `text_model`; with the prefix older versions load the file, too
            _write_half({_old_name(key): value for key, value in _state(part)}, folder / name / "model.safetensors")
            _set(folder / name / "config.json", dtype="float32")
        elif isinstance(part, nn.Module):
            _write_half(dict(_state(part)), folder / name / "diffusion_pytorch_model.safetensors")
        elif isinstance(part, CLIPTokenizer):
            for file in ("vocab.json", "merges.txt"):
                (folder / name / file).write_bytes((tokenizer_files / file).read_bytes())
    (folder / "vislora.json").write_text(json.dumps(dict(defaults), indent=2) + "\n", encoding="utf-8")


def _old_name(key: str) -> str:
    plain = key.removeprefix("text_model.")
    return plain if plain.startswith("text_projection") else f"text_model.{plain}"


def _state(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(key, value) for key, value in module.state_dict().items() if "position_ids" not in key]


def _write_half(state: Mapping[str, torch.Tensor], path: Path) -> None:
    half = {key: value.detach().to("cpu", torch.float16).contiguous() for key, value in state.items()}
    save_file(half, path, {"format": "pt"})


def _set(path: Path, **values: Any) -> None:
    config = {**json.loads(path.read_text(encoding="utf-8")), **values}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
