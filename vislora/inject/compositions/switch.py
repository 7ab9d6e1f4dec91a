"""LoRA Switch: one adapter acts at a time, in turn (Zhong et al., arXiv 2402.16843, section 3.2, equation 2).

Step t belongs to adapter floor((t mod k tau) / tau) of k, tau = `every`. The order is that of the names. `shares` gives
some adapters more turns in a row than others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vislora.errors import ConfigError
from vislora.inject.composition import OnLayers, Run


@dataclass(frozen=True)
class Switch:
    """every: steps that an adapter acts for before the next one does. shares: name -> its turns in a round, else 1."""

    every: int = 1
    shares: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ConfigError(f"every is {self.every!r}: give a whole number of steps, at least 1")
        for name, share in self.shares.items():
            if share != int(share) or share < 1:
                raise ConfigError(f"shares: '{name}' has {share!r} turns: give a whole number, at least 1")

    def runs(self, names: Sequence[str], step: int, last: int, on_layers: OnLayers) -> list[Run]:
        """Return one run, of the adapter whose turn it is."""
        turns = [name for name in names for _ in range(int(self.shares.get(name, 1)))]
        return [Run(1.0, {turns[step // self.every % len(turns)]: None})]
