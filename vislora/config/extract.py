"""Settings of `vislora extract`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from vislora.config.base import OneOf, Positional, Section, Short


class ExtractConfig(Section):
    """Make an adapter of what a fine-tuned model has and its base does not. Says what is lost of each layer."""

    tuned: Positional[Path]
    """The fine-tuned model: a diffusers folder or a .safetensors checkpoint."""
    base: Positional[Path]
    """What it was tuned from, of the same kind."""
    output: Annotated[Path, Short("-o")]
    """Where to write the adapter: a .safetensors file, or a folder for `peft`."""
    rank: int | None = Field(None, ge=1)
    """At most this rank."""
    energy: float | None = Field(None, gt=0, le=1)
    """For each layer the smallest rank that holds this share of its change's squared norm."""
    ratio: float | None = Field(None, ge=1)
    """For each layer the singular values that are at least the largest divided by this."""
    components: tuple[str, ...] = ()
    """Components to extract: denoiser, te:clip_l, ... Default: all that differ and adapter files have a place for."""
    exact: bool = False
    """Keep changes of norms, biases and embeddings too, whole."""
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

    @model_validator(mode="after")
    def _says_how_small(self) -> Self:
        if self.rank is None and self.energy is None and self.ratio is None:
            raise ValueError("say how small: give rank, energy or ratio")
        return self
