"""How small a made adapter is to be: the settings that `vislora resize` and `vislora extract` share."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from vislora.config.base import Section


class LimitedConfig(Section):
    """Limits of a LoRA that is made: of several, the one that keeps least counts."""

    rank: int | None = Field(None, ge=1)
    """At most this rank."""
    energy: float | None = Field(None, gt=0, le=1)
    """For each layer the smallest rank that holds this share of its change's squared norm."""
    ratio: float | None = Field(None, ge=1)
    """For each layer the singular values that are at least the largest divided by this."""

    @model_validator(mode="after")
    def _says_how_small(self) -> Self:
        if self.rank is None and self.energy is None and self.ratio is None:
            raise ValueError("say how small: give rank, energy or ratio")
        return self
