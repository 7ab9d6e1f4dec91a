"""Settings of a declared stack: `[[stack]]`, one table per adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from vislora.config.base import OneOf, Repeatable, Section


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


SETTINGS: dict[str, tuple[str, ...]] = {
    "sum": (),
    "switch": ("every", "shares"),
    "composite": ("shares",),
    "klora": ("content", "style"),
}
NEEDS = {"every": "every", "shares": "shares", "by_prompt": "shares"}
"""Setting -> what a method must have for it."""


class ComposeConfig(Section):
    """How the adapters of a stack act together; see docs/composition.md."""

    method: Annotated[str, OneOf("vislora.registry:COMPOSITIONS")] = "sum"
    """sum: all at once; switch: one after the other; composite: each predicts by itself; klora: one on each layer."""
    every: int | None = Field(None, ge=1)
    """switch: steps that an adapter acts for before the next one does (1)."""
    shares: dict[str, float] = Field(default_factory=dict)
    """switch: how often an adapter has its turn; composite: what its prediction counts. By name; 1 for the others."""
    by_prompt: bool = False
    """switch, composite: shares are how much each adapter's `words` mean in the prompt (arXiv 2606.03792)."""
    words: dict[str, str] = Field(default_factory=dict)
    """by_prompt: the words of an adapter in the prompt, by name; where it is not named, its file's trigger phrase."""
    content: str | None = None
    """klora: the adapter of the content."""
    style: str | None = None
    """klora: the adapter of the style."""

    @model_validator(mode="after")
    def _require_used(self) -> Self:
        """Refuse what the method has no use for; content and style may wait for a sheet that compares methods."""
        if self.words and not self.by_prompt:
            raise ValueError("words are for by_prompt = true")
        if self.shares and self.by_prompt:
            raise ValueError("by_prompt makes the shares: give it or shares, not both")
        known = SETTINGS[self.method]
        unused = [name for name, needs in NEEDS.items() if getattr(self, name) and needs not in known]
        if unused:
            fitting = ", ".join(method for method, names in SETTINGS.items() if NEEDS[unused[0]] in names)
            raise ValueError(f"method '{self.method}' has no {' and no '.join(unused)}; {unused[0]} is of: {fitting}")
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """Return what the composition itself is given: those of its settings that are set."""
        return {name: getattr(self, name) for name in SETTINGS[self.method] if getattr(self, name)}


class StackConfig(Section):
    """A stack of adapters."""

    stack: Repeatable[tuple[StackedConfig, ...]] = ()
    """An adapter of the stack with all that its strength can have; repeat for more. See docs/stacks.md."""
    adapters: tuple[Path, ...] = (Path("adapters"), Path("runs"))
    """Folders in which adapters are looked up by name."""


class ComposedStackConfig(StackConfig):
    """A stack of adapters and how they act together."""

    compose: ComposeConfig = Field(default_factory=ComposeConfig)
    """How the adapters act together."""
