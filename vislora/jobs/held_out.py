"""Images that are kept from training, and the adapter that does best on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vislora.data.buckets import Bucket
from vislora.data.dataset import TrainingSet
from vislora.data.draws import draw
from vislora.data.sampler import Batch
from vislora.data.scan import Example
from vislora.errors import ConfigError
from vislora.training.validation import Measured, lowest

Buckets = dict[Bucket, list[int]]


@dataclass(frozen=True)
class HeldOut:
    """Examples that are never trained on, and their sources. `dataset` gives them with their captions, no priors."""

    examples: list[Example]
    sources: list[Example]
    dataset: TrainingSet
    places: list[Batch]

    def batches(self) -> list[dict[str, Any]]:
        """Return all of them as batches of tensors."""
        return [self.dataset.batch(place) for place in self.places]


def split(
    examples: Sequence[Example], buckets: Mapping[Bucket, Sequence[int]], share: float, seed: int
) -> tuple[Buckets, Buckets]:
    """Return the buckets of what is trained on, and of the `share` of the examples that is held out, at least one.

    Which are held out depends on the seed and the images alone. Raises `ConfigError` when none is left to train on.
    """
    count = max(1, round(share * len(examples))) if share else 0
    if count and count >= len(examples):
        raise ConfigError(f"data.held_out: {share:g} of {len(examples)} images leaves none to train on")
    order = sorted(range(len(examples)), key=lambda index: draw(seed, "held out", examples[index].sha256))
    held = set(order[:count])
    return _only(buckets, set(order) - held), _only(buckets, held)


def _only(buckets: Mapping[Bucket, Sequence[int]], wanted: set[int]) -> Buckets:
    kept = {bucket: [index for index in indices if index in wanted] for bucket, indices in buckets.items()}
    return {bucket: indices for bucket, indices in kept.items() if indices}


def told(measured: Sequence[Measured]) -> str:
    """Return the last measurement beside those that it is compared with, in one line."""
    last, best = measured[-1], lowest(measured)
    beside = [f"the base's {one.loss:.4f}" for one in measured if one.step == 0 != last.step]
    if best and best.step != last.step:
        beside.append(f"lowest {best.loss:.4f} at step {best.step}")
    text = f"loss on held-out images at step {last.step}: {last.loss:.4f}"
    return f"{text} ({', '.join(beside)})" if beside else text
