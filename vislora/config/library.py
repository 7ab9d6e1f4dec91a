"""Settings of `vislora library`."""

from __future__ import annotations

import warnings
from pathlib import Path

from vislora.config.base import Positional, Section

# pydantic warns of a field named as its long deprecated BaseModel.json; nothing here calls that
warnings.filterwarnings("ignore", message='Field name "json"')


class LibraryConfig(Section):
    """List the adapters in folders: family, rank, trigger words, preview. Reads headers, and remembers them."""

    folders: Positional[tuple[Path, ...]] = (Path("adapters"), Path("runs"))
    """Folders of adapters, searched through."""
    find: str = ""
    """Only adapters whose name, trigger words or family contain this."""
    refresh: bool = False
    """Read every file anew, whatever is remembered."""
    json: bool = False  # type: ignore[assignment]
    """Print JSON."""
