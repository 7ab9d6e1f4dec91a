"""One layer of every kind that adapters go on, each with an input, and slots for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vislora.algorithms.base import Algorithm, InitOptions, LayerSpec
from vislora.errors import ConfigError


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    size: tuple[int, ...]

    def layer(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return self.build().to(dtype)

    def input(self, dtype: torch.dtype = torch.float32) -> Tensor:
        if isinstance(self.layer(), nn.Embedding):
            return torch.arange(torch.Size(self.size).numel()).view(self.size) % 7
        return torch.randn(self.size, generator=torch.Generator().manual_seed(2)).to(dtype)


CASES: dict[str, Case] = {
    "linear": Case(lambda: nn.Linear(6, 5), (2, 6)),
    "linear-tokens-no-bias": Case(lambda: nn.Linear(6, 5, bias=False), (2, 4, 6)),
    "linear-vector": Case(lambda: nn.Linear(6, 5), (6,)),
    "conv1d": Case(lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2), (2, 4, 11)),
    "conv2d": Case(lambda: nn.Conv2d(4, 6, 3), (2, 4, 6, 5)),
    "conv2d-1x1": Case(lambda: nn.Conv2d(4, 6, 1, stride=2), (2, 4, 6, 5)),
    "conv2d-rectangle": Case(lambda: nn.Conv2d(4, 6, (3, 1), stride=(2, 1), padding=(1, 0)), (2, 4, 6, 5)),
    "conv2d-dilated": Case(lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, bias=False), (2, 4, 7, 8)),
    "conv2d-grouped": Case(lambda: nn.Conv2d(4, 6, 3, groups=2, padding="same"), (2, 4, 5, 5)),
    "conv2d-depthwise": Case(lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), (2, 4, 5, 5)),
    "conv2d-reflect": Case(lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 5, 6)),
    "conv2d-circular": Case(lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular", groups=2), (2, 4, 5, 6)),
    "conv2d-unbatched": Case(lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 5, 6)),
    "conv3d": Case(lambda: nn.Conv3d(4, 6, (1, 3, 2), stride=(1, 2, 1), padding=(0, 1, 0)), (2, 4, 3, 5, 4)),
    "conv3d-grouped": Case(lambda: nn.Conv3d(4, 6, 2, groups=2), (1, 4, 3, 4, 3)),
    "linear-even": Case(lambda: nn.Linear(6, 8), (2, 6)),
    "embedding": Case(lambda: nn.Embedding(7, 5), (2, 4)),
    "embedding-padded": Case(lambda: nn.Embedding(7, 5, padding_idx=0), (9,)),
}


def fresh(
    layer: nn.Module, algorithm: Algorithm, rank: int = 3, tucker: bool = False, seed: int = 0
) -> dict[str, Tensor]:
    """Return the slots of a fresh adapter for `layer`, in the dtype of its weight."""
    spec = LayerSpec.of(layer)
    assert spec is not None
    options = InitOptions(rank, tucker=tucker, generator=torch.Generator().manual_seed(seed))
    dtype = layer.weight.dtype
    drawn_slots = algorithm.init(spec, options).items()
    return {name: slot.to(dtype if slot.is_floating_point() else slot.dtype) for name, slot in drawn_slots}


def drawn(
    layer: nn.Module, algorithm: Algorithm, rank: int = 3, tucker: bool = False, seed: int = 3
) -> dict[str, Tensor]:
    """Return slots of the shapes of fresh ones, all but the constants random: an adapter with an effect."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: slot
        if name in algorithm.constants
        else (0.3 * torch.randn(slot.shape, generator=generator)).to(slot.dtype)
        for name, slot in fresh(layer, algorithm, rank, tucker).items()
    }


def goes_on(algorithm: Algorithm, case: Case) -> bool:
    """Say whether the algorithm makes slots for such a layer at all."""
    try:
        fresh(case.layer(), algorithm)
    except ConfigError:
        return False
    return True
