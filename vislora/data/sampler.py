"""The order of the batches: a function of the seed and the epoch, whatever the number of processes or workers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from vislora.data.buckets import Bucket
from vislora.data.draws import draw
from vislora.errors import DataError

ONCE: Mapping[int, int] = MappingProxyType({})
"""Every example is seen once an epoch."""


@dataclass(frozen=True)
class Batch:
    """Examples of one bucket. `indices`: their places in the list of examples.

    `visits`: for each, how many times it was seen before in this run; what is drawn anew each time (caption dropout,
    flip, crop) depends on it.
    """

    bucket: Bucket
    indices: tuple[int, ...]
    visits: tuple[int, ...]


def batches(
    buckets: Mapping[Bucket, Sequence[int]], batch_size: int, seed: int, epoch: int, repeats: Mapping[int, int] = ONCE
) -> list[Batch]:
    """Return the batches of an epoch (counted from 0): every example as often as `repeats` says, else once.

    Buckets are never mixed. The last batch of a bucket may be short; none is dropped. Raises `DataError` unless numbers
    are 1 or more.
    """
    least = min(repeats.values(), default=1)
    if batch_size < 1 or least < 1:
        raise DataError(f"batch_size ({batch_size}) and repeats ({least}) must be 1 or more")
    found = []
    for bucket in sorted(buckets):
        places = _order(buckets[bucket], seed, epoch, repeats)
        for start in range(0, len(places), batch_size):
            part = places[start : start + batch_size]
            indices, visits = zip(*part, strict=True)
            found.append(Batch(Bucket(*bucket), indices, visits))
    order = sorted(range(len(found)), key=lambda number: draw(seed, epoch, "batch", number))
    return [found[number] for number in order]


class Sampler:
    """Endless batches, epoch after epoch; `state()` says where it stands and `restore()` goes on exactly there."""

    def __init__(
        self,
        buckets: Mapping[Bucket, Sequence[int]],
        batch_size: int,
        seed: int = 0,
        repeats: Mapping[int, int] = ONCE,
    ) -> None:
        self.buckets = {Bucket(*bucket): tuple(buckets[bucket]) for bucket in sorted(buckets)}
        self.batch_size, self.seed, self.repeats = batch_size, seed, repeats
        self.epoch, self.position = 0, 0
        self._batches = batches(self.buckets, batch_size, seed, 0, repeats)
        if not self._batches:
            raise DataError("there are no examples to take batches of")

    def __len__(self) -> int:
        """Return the number of batches in an epoch, which is the same for every epoch."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.next()

    def next(self) -> Batch:
        """Return the next batch and move on; after the last one of an epoch comes the next epoch."""
        if self.position == len(self._batches):
            self._go_to(self.epoch + 1, 0)
        self.position += 1
        return self._batches[self.position - 1]

    @property
    def pictures(self) -> int:
        """How many pictures an epoch has."""
        return sum(len(batch.indices) for batch in self._batches)

    def state(self) -> dict[str, Any]:
        """Return where the sampler stands: `epoch`, `position` (batches of it already given) and the plan's hash."""
        return {"epoch": self.epoch, "position": self.position, "plan": self._plan()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to a `state()`. Raises `DataError` when it belongs to other buckets, batch size, seed or repeats."""
        if state["plan"] != self._plan():
            raise DataError(
                "the checkpoint was made with other images, buckets, batch_size, seed or repeats, so its place in the "
                "data means nothing here; restore them, or start a new run from its adapter"
            )
        self._go_to(int(state["epoch"]), int(state["position"]))

    def _go_to(self, epoch: int, position: int) -> None:
        self._batches = batches(self.buckets, self.batch_size, self.seed, epoch, self.repeats)
        self.epoch, self.position = epoch, position

    def _plan(self) -> str:
        each = {index: self.repeats.get(index, 1) for indices in self.buckets.values() for index in indices}
        alike = set(each.values())
        plan = (
            sorted(self.buckets.items()),
            self.batch_size,
            self.seed,
            sorted(each.items()) if len(alike) > 1 else alike.pop(),
        )
        return hashlib.sha256(repr(plan).encode("utf-8")).hexdigest()


def _order(indices: Sequence[int], seed: int, epoch: int, repeats: Mapping[int, int]) -> list[tuple[int, int]]:
    """Return (index, visit) pairs, shuffled; those of one example lie evenly apart."""
    found = []
    for index in indices:
        count = repeats.get(index, 1)
        for turn in range(count):
            visit = epoch * count + turn
            found.append(((turn + draw(seed, visit, "order", index)) / count, index, visit))
    return [(index, visit) for _, index, visit in sorted(found)]
