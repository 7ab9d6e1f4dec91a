"""LoRA Composite: every adapter predicts by itself, and the predictions are averaged in every step.

    e(z_t, c) = 1/k sum_i w_i [ e_i(z_t) + s (e_i(z_t, c) - e_i(z_t)) ]    (Zhong et al., arXiv 2402.16843, equation 4)

Guidance is linear in the predictions, so the mean is taken of those, before guidance. The weights are `shares`, scaled
to add up to 1. It takes k runs of the denoiser per step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vislora.inject.composition import OnLayers, Run, require_shares


@dataclass(frozen=True)
class Composite:
    """shares: name -> what its prediction counts beside the others', else 1."""

    shares: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_shares(self.shares)

    def runs(self, names: Sequence[str], step: int, last: int, on_layers: OnLayers) -> list[Run]:
        """Return a run for each adapter."""
        shares = [float(self.shares.get(name, 1.0)) for name in names]
        return [Run(share / sum(shares), {name: None}) for name, share in zip(names, shares, strict=True)]
