"""Settings of `vislora merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from vislora.config.base import OneOf, Positional, Short
from vislora.config.stack import StackConfig

Precision = Literal["fp32", "fp16", "bf16"]


class MergeConfig(StackConfig):
    """Merge adapters into one that does what they do together, and prove it. Says how far it is from their sum."""

    adapter: Positional[tuple[str, ...]] = ()
    """Adapters with their strengths: `ink.safetensors:0.8 outline.safetensors:-0.5`; files, PEFT folders or names."""
    output: Annotated[Path, Short("-o")]
    """Where to write the merged adapter: a .safetensors file, or a folder for `peft`."""
    base: Path | None = None
    """Merge into this base instead: a diffusers folder or a .safetensors checkpoint; `output` is then such a one."""
    to: Annotated[str, OneOf("vislora.registry:FORMATS")] = ""
    """Format to write. Default: that of the first adapter, or kohya."""
    method: Literal["sum", "orthogonal", "magnitude", "ties", "dare", "ziplora"] = "sum"
    """sum: exact; orthogonal: without interference; magnitude, ties, dare: sparse; ziplora: learned on a base."""
    density: float = Field(0.5, gt=0, le=1)
    """Share of the numbers of each change that magnitude, ties and dare keep."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the numbers that dare drops."""
    prompts: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """ziplora: what each is asked for, by name: `{ink = ["a cat, ink style"], blob = ["a face, blobby style"]}`."""
    learn_on: str = ""
    """ziplora: the base to learn on: a diffusers folder, hub name or `icons-dit`. Default: the embedded UNet."""
    steps: int = Field(100, ge=1)
    """ziplora: steps of learning."""
    rank: int | None = Field(None, ge=1)
    """The nearest LoRA of at most this rank. What is lost is said."""
    energy: float | None = Field(None, gt=0, le=1)
    """The smallest rank that holds this share of a change's squared norm."""
    precision: Precision | None = None
    """Precision of the tensors. Default: that of the adapters where it is exact, else fp32."""
    tolerance: float = Field(1e-6, ge=0)
    """The largest relative difference of a module, read back, that still counts as equal."""
    overwrite: bool = False
    """Replace the output when it exists."""
    allow_pickle: bool = False
    """Take the tensors, and nothing else, out of pickles (.pt, .ckpt, .bin)."""
    report: Path | None = None
    """Write what became of every module to this JSON file."""

    @model_validator(mode="after")
    def _has_adapters(self) -> Self:
        if not (self.adapter or self.stack):
            raise ValueError("required, but not given: an adapter to merge, or a table in stack")
        if self.base is not None:
            sized = [name for name in ("method", "rank", "energy", "precision", "to") if name in self.model_fields_set]
            if sized:
                raise ValueError(f"{sized[0]}: into a base goes the sum, whole, in the base's own precision")
        acting = [table.adapter for table in self.stack if table.steps is not None or table.region is not None]
        if acting:
            raise ValueError(f"stack: '{acting[0]}' has steps or a region, which no adapter file can have")
        return self
