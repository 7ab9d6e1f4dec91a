"""The loss on images that are not trained on: whether more steps still help."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from vislora.training.loss import DenoisingLoss

PREDICTIONS = 32
"""At least so many are made each time: a loss depends more on its timestep than on the adapter."""


class Measured(NamedTuple):
    """The loss on the held-out images after `step` steps; after none it is the base's."""

    step: int
    loss: float


@torch.no_grad()
def validation_loss(module: DenoisingLoss, batches: Sequence[Mapping[str, Any]], seed: int) -> float:
    """Return the mean loss of the images of `batches` (see `data.dataset.collate`), with dropouts off.

    Noise and timesteps are those of `seed`, the same at every call, so that two results differ by the adapter alone.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = [len(batch["latents"]) for batch in batches]
    rounds = math.ceil(PREDICTIONS / sum(counts))
    training = module.training
    module.eval()
    try:
        losses = [
            count * float(module(batch, generator))
            for _ in range(rounds)
            for count, batch in zip(counts, batches, strict=True)
        ]
    finally:
        module.train(training)
    return sum(losses) / (rounds * sum(counts))


def lowest(measured: Sequence[Measured]) -> Measured | None:
    """Return the measurement of the best adapter, the earliest of equals; None when there is none but the base's."""
    sound = [one for one in measured if one.step and math.isfinite(one.loss)]
    return min(sound, key=lambda one: one.loss, default=None)
