"""Settings of `vislora inspect`."""

from __future__ import annotations

import warnings
from pathlib import Path

from vislora.config.base import Positional, Section

# pydantic warns of a field named as its long deprecated BaseModel.json; nothing here calls that
warnings.filterwarnings("ignore", message='Field name "json"')


class InspectConfig(Section):
    """Show what an adapter file is and holds, without loading a model, or torch."""

    path: Positional[Path]
    """The file, or a PEFT folder."""

    json: bool = False  # type: ignore[assignment]
    """Print JSON with every module's details."""

    metadata: bool = True
    """Show the metadata as well."""

    allow_pickle: bool = False
    """Take the tensors, and nothing else, out of a pickle (.pt, .ckpt, .bin), in a process of its own."""
