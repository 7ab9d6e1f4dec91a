"""Settings of `vislora.json`, which a base may have in its folder."""

from __future__ import annotations

from pydantic import Field

from vislora.config.base import Section


class OwnDefaults(Section):
    """What a base is used with when nothing else is said; what is not given is as its family has it."""

    resolution: int | None = Field(None, ge=16, le=4096, multiple_of=8)
    """Pixels of a side."""
    steps: int | None = Field(None, ge=1, le=1000)
    """Steps of a sampler."""
    guidance_scale: float | None = Field(None, ge=0, le=100)
    """Guidance of a sampler."""
    learning_rate: float | None = Field(None, gt=0, le=10)
    """Learning rate of an adapter."""
    train_steps: int | None = Field(None, ge=1)
    """Optimizer steps."""
    batch_size: int | None = Field(None, ge=1)
    """Images per device and forward pass."""
    timestep_shift: float | None = Field(None, gt=0, le=100)
    """Below 1 more of the low noise is trained, beyond 1 more of the high."""
