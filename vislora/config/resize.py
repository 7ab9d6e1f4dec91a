"""Settings of `vislora resize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from vislora.config.base import OneOf, Positional
from vislora.config.limits import LimitedConfig


class ResizeConfig(LimitedConfig):
    """Make an adapter smaller: the nearest LoRA of a rank, or that keeps a share. Says what is lost of each module."""

    source: Positional[Path]
    """The adapter: a .safetensors file, or a PEFT folder."""
    destination: Positional[Path]
    """Where to write it: a .safetensors file, or a folder for `peft`."""
    to: Annotated[str, OneOf("vislora.registry:FORMATS")] = ""
    """Format to write. Default: the adapter's own, or kohya."""
    precision: Literal["fp32", "fp16", "bf16"] | None = None
    """Precision of the tensors. Default: as they were."""
    tolerance: float = Field(1e-6, ge=0)
    """The largest relative difference of a module, read back, that still counts as equal."""
    overwrite: bool = False
    """Replace the destination when it exists."""
    allow_pickle: bool = False
    """Take the tensors, and nothing else, out of a pickle (.pt, .ckpt, .bin)."""
    report: Path | None = None
    """Write what became of every module to this JSON file."""
