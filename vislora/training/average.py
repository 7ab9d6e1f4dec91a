"""An exponential moving average of what is trained: the steps' noise evens out in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """The average over the steps so far, each counting `decay` times as much as the next.

    While few are done they count less than that, min(decay, (1 + n) / (10 + n)) in step n, so that the average is not
    held at where training began (`num_updates` of TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.parameters: list[Tensor] = list(parameters)
        self.decay = decay
        self.tensors = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters as they are after `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.tensors, self.parameters, 1.0 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Have the parameters hold the average for a while."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def restore(self, tensors: Sequence[Tensor]) -> None:
        """Go on from an average that was saved."""
        for mine, saved in zip(self.tensors, tensors, strict=True):
            mine.copy_(saved)

    def _swap(self) -> None:
        for index, parameter in enumerate(self.parameters):
            parameter.data, self.tensors[index] = self.tensors[index], parameter.data
