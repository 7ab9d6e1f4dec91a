"""LoRA Switch: one adapter acts at a time, in turn (Zhong et al., arXiv 2402.16843, section 3.2, equation 2).

Step t belongs to adapter floor((t mod k tau) / tau) of k, tau = `every`. The order is that of the names. `shares` gives
some adapters more turns than others, spread evenly: each turn goes to the adapter that is most behind its share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vislora.errors import ConfigError
from vislora.inject.composition import OnLayers, Run, require_shares


@dataclass(frozen=True)
class Switch:
    """every: steps that an adapter acts for before the next one does. shares: name -> how often it does, else 1."""

    every: int = 1
    shares: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ConfigError(f"every is {self.every!r}: give a whole number of steps, at least 1")
        require_shares(self.shares)

    def runs(self, names: Sequence[str], step: int, last: int, on_layers: OnLayers) -> list[Run]:
        """Return one run, of the adapter whose turn it is."""
        turn = _turn([float(self.shares.get(name, 1.0)) for name in names], step // self.every)
        return [Run(1.0, {names[turn]: None})]


def _turn(shares: Sequence[float], number: int) -> int:
    """Return whose turn `number` is: of those before it, everyone has had as many as its share of them, or one off."""
    had = [0] * len(shares)
    for turn in range(number):
        had[_most_behind(shares, had, turn)] += 1
    return _most_behind(shares, had, number)


def _most_behind(shares: Sequence[float], had: Sequence[int], turn: int) -> int:
    due = [share / sum(shares) * (turn + 1) for share in shares]
    return max(range(len(shares)), key=lambda index: due[index] - had[index])
