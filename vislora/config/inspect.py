"""Settings of `vislora inspect`."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import Positional

from vislora.config.base import Section


class InspectConfig(Section):
    """Show what an adapter file is and holds, without loading a model, or torch."""

    path: Positional[Path]
    """The file, or a PEFT folder."""

    json: bool = False  # type: ignore[assignment]
    """Print JSON with every module's details."""

    metadata: bool = True
    """Show the metadata as well."""
