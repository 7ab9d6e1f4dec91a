"""Settings of `vislora convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from vislora.config.base import OneOf, Positional, Section


class ConvertConfig(Section):
    """Convert adapters to another file format, and prove that every module still means the same."""

    source: Positional[Path] = Path()
    """The adapter: a .safetensors file, or a PEFT folder. Or a folder of adapters: all below it are converted."""

    destination: Positional[Path] = Path()
    """Where to write it: a .safetensors file, or a folder for `peft`. For a folder of adapters, a new folder."""

    to: Annotated[str, OneOf("vislora.registry:FORMATS")] = ""
    """The format to write; the names of programs that read it do too."""

    family: Annotated[str | None, OneOf("vislora.formats.names:FAMILY_NAMES")] = None
    """The model family that the adapter is for; needed only when the file does not tell."""

    as_: Literal["lora"] | None = None
    """Make plain LoRA of LoHa, LoKr and Tucker LoRA, exactly, and with `rank` or `energy` of full changes too."""

    rank: int | None = Field(default=None, ge=1)
    """With `as`: the nearest LoRA of at most this rank, of all that is not plain LoRA yet. What is lost is said."""

    energy: float | None = Field(default=None, gt=0.0, le=1.0)
    """With `as`: the smallest rank that holds this share of a change's squared norm."""

    compact: bool = False
    """Drop the ranks of a LoRA that add only zeros, as cut block-diagonal layers have them; exact."""

    tolerance: float = Field(default=1e-6, ge=0.0)
    """The largest relative difference of a module that still counts as equal (alpha may be rounded to float32)."""

    allow_loss: bool = False
    """Write what can be written, and say what was lost, when the format cannot hold everything."""

    allow_pickle: bool = False
    """Take the tensors, and nothing else, out of a pickle (.pt, .ckpt, .bin), in a process of its own."""

    overwrite: bool = False
    """Replace the destination when it exists."""

    workers: int | None = Field(default=None, ge=1)
    """How many processes convert a folder of adapters; as many as there are cores when it is not set."""

    report: Path | None = None
    """Write the comparison of every module to this JSON file."""

    list: bool = False
    """Show the formats, what reads them and for which model families, and do nothing else."""

    @model_validator(mode="after")
    def _says_what_to_convert(self) -> Self:
        lacking = [name for name in ("source", "destination", "to") if name not in self.model_fields_set]
        if lacking and not self.list:
            raise ValueError(f"required, but not given: {', '.join(lacking)}")
        return self

    @model_validator(mode="after")
    def _ranks_are_of_lora(self) -> Self:
        if self.as_ is None and (self.rank is not None or self.energy is not None):
            raise ValueError("rank and energy say what `as` makes; give --as lora too")
        return self
