"""Estimated memory of training on released models, counted at full size on the meta device: no weights, no GPU.

    python benchmarks/memory.py            the table of docs/families.md

The denoiser's configurations are those of the tests. Rank 16 on the preset attention-ff, AdamW, one image of the
model's own size, captions cached. Text encoders and VAE are not in it: `vislora train` says them for what is loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests import tiny
from tests.models import test_full_dits, test_full_size
from vislora.inject.targets import Target, select
from vislora.inject.trained import FreshOptions
from vislora.jobs.memory import GIB, Estimate, Step, bare_estimate
from vislora.models.base import load_family
from vislora.models.quantized import block_layers
from vislora.models.weightless import weightless, weightless_module
from vislora.training.loss import LossOptions
from vislora.training.memory import module_bytes

RANK = 16
BITS = {"int8": 8.0, "nf4": 4 + 8 / 64 + 32 / (64 * 256)}
"""Bits of a weight: of nf4 with the scale of each 64, in 8 bits, and the scale of 256 of those (tests hold them)."""


@dataclass(frozen=True)
class Case:
    """A released model: its family, where its configuration is, latents (channels, height, width), text features.

    `text`: name -> shape of one caption's features; `mask` and `pooled` where the family has them. `ragged`: a caption
    has its own length, here that of the longest usual one.
    """

    title: str
    family: str
    config: str
    latents: tuple[int, int, int]
    text: dict[str, tuple[int, ...]]
    ragged: bool = False


CASES = (
    Case("SD 1.5, 512 px", "sd", "sd15", (4, 64, 64), {"prompt_embeds": (77, 768)}),
    Case("SDXL, 1024 px", "sdxl", "sdxl", (4, 128, 128), {"prompt_embeds": (77, 2048), "pooled": (1280,)}),
    Case("SD3 medium, 1024 px", "sd3", "sd3", (16, 128, 128), {"prompt_embeds": (333, 4096), "pooled": (2048,)}),
    Case("SD3.5 large", "sd3", "sd35-large", (16, 128, 128), {"prompt_embeds": (333, 4096), "pooled": (2048,)}),
    Case("FLUX.1 dev", "flux", "flux-dev", (16, 128, 128), {"prompt_embeds": (512, 4096), "pooled": (768,)}),
    Case("FLUX.2 klein 4B", "flux2", "flux2 klein 4B", (128, 64, 64), {"prompt_embeds": (512, 7680)}),
    Case("FLUX.2 klein 9B", "flux2", "flux2 klein 9B", (128, 64, 64), {"prompt_embeds": (512, 12288)}),
    Case("FLUX.2 dev", "flux2", "flux2 dev", (128, 64, 64), {"prompt_embeds": (512, 15360)}),
    Case("Qwen-Image", "qwen-image", "qwen-image", (16, 128, 128), {"prompt_embeds": (128, 3584)}, ragged=True),
    Case("Z-Image", "z-image", "z-image", (16, 128, 128), {"prompt_embeds": (128, 2560)}, ragged=True),
    Case("Sana 1.6B", "sana", "sana 1.6B", (32, 32, 32), {"prompt_embeds": (300, 2304), "mask": (300,)}),
    Case("PixArt-sigma", "pixart", "pixart", (4, 128, 128), {"prompt_embeds": (300, 4096), "mask": (300,)}),
    Case("AuraFlow", "auraflow", "auraflow", (4, 128, 128), {"prompt_embeds": (256, 2048)}),
)


def denoiser(config: str, dtype: torch.dtype) -> nn.Module:
    """Return the model of a configuration, without weights."""
    known = test_full_size if config in test_full_size.CONFIGS else test_full_dits
    return weightless_module(known.built(config)).to(dtype)  # the tests keep theirs


def measured(case: Case, dtype: torch.dtype, checkpointing: bool) -> Estimate:
    """Return the estimate of one training step."""
    bare: Any = weightless(load_family(tiny.saved(case.family), dtype, torch.device("cpu")), [])
    model = denoiser(case.config, dtype)
    setattr(bare.pipeline, bare.card.attributes["denoiser"], model)
    bare.components = {"denoiser": model}
    model.requires_grad_(False)
    model.train(checkpointing)
    if checkpointing:
        model.enable_gradient_checkpointing()  # type: ignore[operator]
    text: dict[str, Any] = {
        name: torch.zeros(1, *shape, dtype=torch.long if name == "mask" else dtype, device="meta")
        for name, shape in case.text.items()
    }
    text = {name: list(rows) if case.ragged else rows for name, rows in text.items()}
    latents: Tensor = torch.zeros(1, *case.latents, device="meta")
    chosen = {"denoiser": select(model, [], "attention-ff", Target("", RANK))}
    step = Step(chosen, FreshOptions(), LossOptions(), {"latents": latents, "text": text}, "adamw")
    return bare_estimate(bare, step)


def quantized(model: nn.Module, kind: str) -> float:
    """Return the bytes of a model of which the linear layers of its blocks are in 8 or 4 bits."""
    weights = [cast(nn.Linear, model.get_submodule(path)).weight for path in block_layers(model)]
    scales = {"int8": 4 * sum(len(weight) for weight in weights), "nf4": 0}
    numbers = sum(weight.numel() for weight in weights)
    return module_bytes(model) - sum(weight.nbytes for weight in weights) + numbers * BITS[kind] / 8 + scales[kind]


def rows() -> Iterator[str]:
    """Yield the lines of the table."""
    head = f"| base | denoiser fp32 | bf16 | adapter, rank {RANK} | a step, bf16 | with checkpointing | bf16 in all "
    yield f"{head}| int8 in all | nf4 in all |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for case in CASES:
        plain, saving = (measured(case, torch.bfloat16, checkpointing) for checkpointing in (False, True))
        weights = plain.weights["denoiser"]
        small = (plain.adapter // 2, plain.activations, saving.activations)
        model = denoiser(case.config, torch.bfloat16)
        less = [quantized(model, kind) for kind in BITS]
        cells = [weights * 2, weights, *small, *(size + saving.step for size in (weights, *less))]
        yield f"| {case.title} | {' | '.join(f'{cell / GIB:.2f}' for cell in cells)} |"


if __name__ == "__main__":
    for row in rows():
        print(row, flush=True)
