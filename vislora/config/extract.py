"""Settings of `vislora extract`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from vislora.config.base import OneOf, Positional, Short
from vislora.config.limits import LimitedConfig


class ExtractConfig(LimitedConfig):
    """Make an adapter of what a fine-tuned model has and its base does not. Says what is lost of each layer."""

    tuned: Positional[Path]
    """The fine-tuned model: a diffusers folder or a .safetensors checkpoint."""
    base: Positional[Path]
    """What it was tuned from, of the same kind."""
    output: Annotated[Path, Short("-o")]
    """Where to write the adapter: a .safetensors file, or a folder for `peft`."""
    components: tuple[str, ...] = ()
    """Components to extract: denoiser, te:clip_l, ... Default: all that differ and adapter files have a place for."""
    exact: bool = False
    """Keep changes of norms and biases too, whole; those of embeddings are named and left out."""
    least: float = Field(1e-6, ge=0)
    """Layers that changed relatively less than this are left out: saving rounds."""
    to: Annotated[str, OneOf("vislora.registry:FORMATS")] = "kohya"
    """Format to write."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp16"
    """Precision of the tensors."""
    overwrite: bool = False
    """Replace the output when it exists."""
    report: Path | None = None
    """Write what became of every layer to this JSON file."""
