"""DoRA: a magnitude on top of any algorithm, W' = m * (W + dW) / ||W + dW|| (Liu et al., arXiv 2402.09353, eq. 5).

Norm and magnitude are per output (the paper, PEFT, LyCORIS' `wd_on_output`) or per input (LyCORIS' old default).
Fresh ones are per output.
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
    return ratio(magnitude, norms(moved, axis)) * moved - base


def norms(weight: Tensor, axis: Axis = "out") -> Tensor:
    """Return the norm of what belongs to each output (or input), of one number where `weight` has all the rest."""
    kept = 0 if axis == "out" else 1
    others = [index for index in range(weight.dim()) if index != kept]
    return torch.linalg.vector_norm(weight, dim=others, keepdim=True)


def ratio(magnitude: Tensor, norm: Tensor) -> Tensor:
    """Return what W + dW is multiplied by, in the shape of `norm`: exactly 1 where they are equal."""
    # a row of zeros has no direction: it stays zero
    return magnitude.reshape(norm.shape) / norm.masked_fill(norm == 0.0, 1.0)
