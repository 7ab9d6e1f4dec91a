"""Settings of `vislora convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from vislora.config.base import Positional, Section


class ConvertConfig(Section):
    """Convert an adapter to another file format, and prove that every module still means the same."""

    source: Positional[Path]
    """The adapter: a .safetensors file, or a PEFT folder."""

    destination: Positional[Path]
    """Where to write it: a .safetensors file, or a folder for `peft`."""

    to: Literal["kohya", "diffusers", "peft"]
    """The format to write."""

    family: Literal["sd", "sd3"] | None = None
    """The model family that the adapter is for; needed only when the file does not tell."""

    tolerance: float = Field(default=1e-6, ge=0.0)
    """The largest relative difference of a module that still counts as equal (alpha may be rounded to float32)."""

    allow_loss: bool = False
    """Write what can be written, and say what was lost, when the format cannot hold everything."""

    overwrite: bool = False
    """Replace the destination when it exists."""

    report: Path | None = None
    """Write the comparison of every module to this JSON file."""
