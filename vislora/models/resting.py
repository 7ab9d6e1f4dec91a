"""Parts of a base that a job has no use for just now lie in main memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from vislora.models.base import Family
from vislora.models.quantized import stays

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Resting:
    """Those parts, by the names that the pipeline has for them, and the device that they work on."""

    parts: Mapping[str, nn.Module] = field(default_factory=dict)
    device: torch.device = CPU

    def rest(self) -> None:
        """Move them to main memory."""
        self._move(CPU)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Have them on the device for a while."""
        self._move(self.device)
        try:
            yield
        finally:
            self.rest()

    def _move(self, device: torch.device) -> None:
        for part in self.parts.values():
            part.to(device)


def all_but_denoiser(family: Family, device: torch.device) -> Resting:
    """Return the modules of a pipeline that a step on cached features does without; none where all is main memory."""
    denoiser = family.card.attributes["denoiser"]
    found = {name: part for name, part in family.pipeline.components.items() if isinstance(part, nn.Module)}
    others = {name: part for name, part in found.items() if name != denoiser and not stays(part)}
    return Resting({} if device.type == "cpu" else others, device)
