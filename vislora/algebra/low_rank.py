"""Matrices as products of two thin ones: exactly for the kinds that are made of such products, else the nearest.

    LoHa   (A1 B1) * (A2 B2) = (A1 by rows A2) (B1 by columns B2), Khatri-Rao products, of rank r1 r2
    LoKr   kron(A1 B1, A2 B2) = kron(A1, A2) kron(B1, B2), of rank r1 r2

Both identities: Kolda and Bader, Tensor Decompositions and Applications, section 2.6. The nearest product of a rank:
Eckart and Young, 1936.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Product = tuple[Tensor, Tensor]
"""up (out, rank) and down (rank, in, *kernel), or (rank, in * kernel)."""
OVERSAMPLED, POWER_STEPS = 16, 6


@dataclass(frozen=True)
class Limits:
    """How much of a matrix its nearest product keeps; of several limits the one that keeps least counts.

    rank: at most so many singular values. energy: the fewest that hold this share, in (0, 1], of the sum of the squares
    of all its numbers. ratio: those that are at least the largest divided by it (>= 1).
    """

    rank: int | None = None
    energy: float | None = None
    ratio: float | None = None

    def __bool__(self) -> bool:
        return self != Limits()

    def most(self, shape: tuple[int, ...]) -> int:
        """Return the largest rank that a matrix of this shape may keep."""
        return min(shape) if self.rank is None else min(self.rank, *shape)

    def kept(self, values: Tensor) -> int:
        """Return how many of these singular values, the largest first, are kept; at least one."""
        found = self.most(tuple(values.shape))
        if self.energy is not None:
            found = min(found, _enough(values, self.energy))
        if self.ratio is not None:
            found = min(found, int((values >= values[0] / self.ratio).sum()))
        return max(1, found)


EVERYTHING = Limits()


def loha_product(slots: Mapping[str, Tensor]) -> Product:
    """Return LoHa's change, before its scale, as up (out, r1 r2) and down (r1 r2, in * kernel or Tucker's)."""
    (up1, down1), (up2, down2) = (_hada(slots, index) for index in (1, 2))
    up = (up1[:, :, None] * up2[:, None, :]).flatten(1)
    return up, (down1[:, None] * down2[None, :]).flatten(0, 1)


def lokr_product(slots: Mapping[str, Tensor]) -> Product:
    """Return LoKr's change, before its scale, as up and down; a full factor is itself times the identity.

    The rank is r1 r2, where r of a full factor is its shorter side.
    """
    up1, down1 = _factor(slots, "lokr_w1")
    up2, down2 = _factor(slots, "lokr_w2")
    ones = [1] * (down2.dim() - 2)
    down1 = down1.reshape(*down1.shape, *ones)
    # torch.kron makes its result a view by its arguments' strides, and fails on transposed ones
    return torch.kron(up1, up2.contiguous()), torch.kron(down1, down2.contiguous())


def within_sides(up: Tensor, down: Tensor) -> Product:
    """Return the same product with a rank that is no longer than the shorter side of the matrix."""
    out, inside = up.shape[0], down[0].numel()
    if up.shape[1] <= min(out, inside):
        return up, down
    full = (up @ down.flatten(1)).reshape(out, *down.shape[1:])
    if out <= inside:
        return torch.eye(out, dtype=up.dtype), full
    eye = torch.eye(inside, dtype=up.dtype)
    return full.flatten(1), eye.reshape(inside, *down.shape[1:])


def nearest_product(matrix: Tensor, limits: Limits) -> Product:
    """Return the product nearest to `matrix` (out, in) within `limits`.

    Large matrices of a small rank: by a random sketch with power steps (Halko et al., arXiv 0909.4061), seeded.
    """
    most = limits.most(tuple(matrix.shape))
    if limits.energy is None and 4 * (most + OVERSAMPLED) < min(matrix.shape):
        left, values, right = _sketched(matrix, most)
        values, left, right = values[:most], left[:, :most], right[:most]
    else:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    kept = limits.kept(values)
    root = values[:kept].sqrt()
    return left[:, :kept] * root, root[:, None] * right[:kept]


def nearest_to_product(up: Tensor, down: Tensor, limits: Limits) -> Product:
    """Return the product nearest to up @ down, both matrices, by the small core between their orthogonal bases."""
    if 2 * up.shape[1] >= min(up.shape[0], down.shape[1]):
        return nearest_product(up @ down, limits)
    left, upper = torch.linalg.qr(up)
    right, lower = torch.linalg.qr(down.T)
    core_up, core_down = nearest_product(upper @ lower.T, limits)
    return left @ core_up, core_down @ right.T


def as_stored(alpha: float) -> float:
    """Return an alpha as files hold it, in float32, so that what is read back has the very same scale."""
    return float(torch.tensor(alpha, dtype=torch.float32))


def relative(apart: float, norm: float) -> float:
    """Return how far something is from what was meant, in units of its norm; of nothing, as it is."""
    return apart / norm if norm else apart


def product_norm(up: Tensor, down: Tensor) -> float:
    """Return the Frobenius norm of up @ down, both matrices in float64, without making it.

    Gram matrices square the numbers: differences below 1e-8 of the parts drown in rounding.
    """
    return math.sqrt(max(0.0, float(((up.T @ up) * (down @ down.T)).sum())))


def _hada(slots: Mapping[str, Tensor], index: int) -> Product:
    left, right, core = slots[f"hada_w{index}_a"], slots[f"hada_w{index}_b"], slots.get(f"hada_t{index}")
    return (left, right) if core is None else (left.T, torch.einsum("ij...,jc->ic...", core, right))


def _factor(slots: Mapping[str, Tensor], name: str) -> Product:
    if name in slots:
        full = slots[name]
        rows, columns = full.shape[0], math.prod(full.shape[1:])
        if rows <= columns:
            return torch.eye(rows, dtype=full.dtype), full
        return full.flatten(1), torch.eye(columns, dtype=full.dtype).reshape(columns, *full.shape[1:])
    left, right = slots[f"{name}_a"], slots[f"{name}_b"]
    core = slots.get("lokr_t2") if name == "lokr_w2" else None
    return (left, right) if core is None else (left.T, torch.einsum("ij...,jc->ic...", core, right))


def _sketched(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sketch = torch.randn(matrix.shape[1], rank + OVERSAMPLED, generator=generator, dtype=matrix.dtype)
    basis = torch.linalg.qr(matrix @ sketch).Q
    for _ in range(POWER_STEPS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ left, values, right


def _enough(values: Tensor, energy: float) -> int:
    """Return how many of these singular values, the largest first, hold this share of the sum of their squares."""
    held = values.square().cumsum(0)
    missing = held[-1] * (1.0 - energy)
    return max(1, int((held[-1] - held > missing).sum()) + 1) if held[-1] > 0 else 1
