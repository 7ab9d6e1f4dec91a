"""Settings of `vislora generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from vislora.config.base import Repeatable
from vislora.config.stack import ComposedStackConfig


class GenerateConfig(ComposedStackConfig):
    """Make images with any number of stacked adapters. `<lora:name:0.8>` in a prompt adds one for that prompt."""

    prompt: Repeatable[tuple[str, ...]] = ()
    """A prompt; repeat the flag for more."""
    prompts: Path | None = None
    """File with one prompt per line; empty lines and lines with # are passed over."""
    adapter: Repeatable[tuple[str, ...]] = ()
    """An adapter and its strength, `style.safetensors:0.8` (or a name found in --adapters); repeat for a stack."""
    embedding: Repeatable[tuple[Path, ...]] = ()
    """A textual inversion embedding; the name of its file is a word for prompts then. Repeat for more."""
    output: Path = Path("outputs")
    """Folder for the images."""
    base: str = ""
    """Base model: a diffusers folder, a hub name, a .safetensors file, or `icons-dit`. Default: the embedded UNet."""
    base_parts: str = ""
    """For a base in one file: a diffusers folder with its configs and what the file does not hold."""
    source: Path | None = None
    """An image to start from, or to edit for a base that edits (FLUX.1 Kontext, ...); cut to the picture's size."""
    change: float | None = Field(None, gt=0, le=1)
    """How much of the source changes: 1 keeps next to nothing of it. Default: 0.6; a base that edits takes none."""
    negative_prompt: str = ""
    """What the images should not show."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the first image; the next ones count up."""
    count: int = Field(1, ge=1, le=10_000)
    """Images per prompt."""
    steps: int | None = Field(None, ge=1, le=1000)
    """Denoising steps. Default: the base's."""
    guidance_scale: float | None = Field(None, ge=0, le=100)
    """How strictly to follow the prompt; 1 turns guidance off. Default: the base's."""
    scheduler: str = "auto"
    """Sampler: auto, dpm++, ddim, euler, euler-a, lcm, flow-euler, ...; an unknown name lists those of the base."""
    eta: float | None = Field(None, ge=0, le=1)
    """Noise that the samplers ddim and tcd add between steps. Default: their own, 0 and 0.3."""
    width: int | None = Field(None, ge=16, le=16384, multiple_of=8)
    """Width in pixels. Default: the base's."""
    height: int | None = Field(None, ge=16, le=16384, multiple_of=8)
    """Height in pixels. Default: the base's."""
    batch_size: int = Field(1, ge=1, le=1024)
    """Images made at once."""
    sheet: bool = False
    """Also make each image with the base and each adapter alone, and lay them out in `sheet.png` (`sheet-2.png`)."""
    compositions: bool = False
    """With `sheet`: the stack under every composition that it can have, too."""
    explain: bool = False
    """Say for every stack how its adapters are computed (merged, stacked, per image), and why."""
    like: Path | None = None
    """Repeat the image of this PNG from its recipe; other settings but --output and --device are not used."""
    allow_partial: bool = False
    """Use an adapter of which some modules do not fit the base."""
    allow_pickle: bool = False
    """Take the tensors, and nothing else, out of adapters that are pickles (.pt, .ckpt, .bin)."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to run."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the base; auto: fp32 on a CPU, bf16 on a GPU."""
    quantize: Literal["no", "int8", "nf4"] = "no"
    """Bits of the base's large weights, for a half or a quarter of their memory (extra `quantize`)."""
