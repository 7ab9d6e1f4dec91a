"""Adapter files: read any known format into one inner form, write it out in another. Knows no model class.

`load` and `save` are imported on first use (PEP 562): detection and `vislora inspect` work without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vislora.formats.adapter_file import AdapterFile, AdapterModule, SourceInfo
    from vislora.formats.reading import load, load_embedding
    from vislora.formats.writing import save

_PUBLIC = {
    "load": "vislora.formats.reading",
    "load_embedding": "vislora.formats.reading",
    "save": "vislora.formats.writing",
    "AdapterFile": "vislora.formats.adapter_file",
    "AdapterModule": "vislora.formats.adapter_file",
    "SourceInfo": "vislora.formats.adapter_file",
}
__all__ = ["AdapterFile", "AdapterModule", "SourceInfo", "load", "load_embedding", "save"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'vislora.formats' has no attribute '{name}'")
