"""DoRA: a magnitude on top of any algorithm, W' = m * (W + dW) / ||W + dW|| (Liu et al., arXiv 2402.09353, eq. 5).

Norm and magnitude are per output (the paper, PEFT, LyCORIS' `wd_on_output`) or per input (LyCORIS' old default).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Axis = Literal["out", "in"]


def decomposed(base: Tensor, delta: Tensor, magnitude: Tensor, axis: Axis) -> Tensor:
    """Return the change of `base` that `delta` and `magnitude` make together.

    base, delta: (out, in, *kernel). magnitude: out or in numbers, of any shape.
    """
    moved = base + delta
    kept = 0 if axis == "out" else 1
    others = [index for index in range(moved.dim()) if index != kept]
    norm = torch.linalg.vector_norm(moved, dim=others, keepdim=True)
    # a row of zeros has no direction: it stays zero
    return magnitude.reshape(norm.shape) * moved / norm.masked_fill(norm == 0.0, 1.0) - base
