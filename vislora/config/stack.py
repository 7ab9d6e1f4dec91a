"""Settings of a declared stack: `[[stack]]`, one table per adapter."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from vislora.config.base import Repeatable, Section


class StackedConfig(Section):
    """One `[[stack]]`: an adapter and how strongly it acts. See docs/stacks.md."""

    adapter: str
    """File, PEFT folder, or a name found in `adapters`."""
    strength: float = 1.0
    """Multiplier of the trained effect."""
    components: dict[str, float] = Field(default_factory=dict)
    """Component -> factor: `{denoiser = 1, te = 0.5}`; `te` is every text encoder that is not named itself."""
    layers: dict[str, float] = Field(default_factory=dict)
    """Pattern over paths of layers and blocks -> factor: `{mid_block = 0}`; the first that fits decides."""
    steps: tuple[float | tuple[float, float], ...] | None = None
    """When it acts: a window `[0.2, 0.8]` of progress, or points `[[0, 1], [0.7, 0]]` of (progress, factor)."""
    region: tuple[float, ...] | Path | None = None
    """Where it acts: a box `[left, top, right, bottom]` of shares of the sides, or the path of a mask image."""


class StackConfig(Section):
    """A stack of adapters."""

    stack: Repeatable[tuple[StackedConfig, ...]] = ()
    """An adapter of the stack with all that its strength can have; repeat for more. See docs/stacks.md."""
    adapters: tuple[Path, ...] = (Path("adapters"), Path("runs"))
    """Folders in which adapters are looked up by name."""
