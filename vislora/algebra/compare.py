"""Compare what two adapters do: every module's delta, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vislora.errors import AdapterFileError
from vislora.formats import AdapterFile, AdapterModule


@dataclass(frozen=True)
class Difference:
    """One module in both adapters. `largest`: max |a - b|; `relative`: |a - b| / |a| in Frobenius norms."""

    name: str
    largest: float
    relative: float
    problem: str = ""


@dataclass
class Comparison:
    """What two adapters differ in. `missing`: modules with an effect only in the first; `extra`: only in the second."""

    modules: list[Difference] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        """Say whether every delta is equal to the last bit."""
        return self.ok(0.0)

    @property
    def largest(self) -> float:
        """Return the largest difference of two numbers."""
        return max((item.largest for item in self.modules), default=0.0)

    @property
    def relative(self) -> float:
        """Return the largest relative difference of two modules."""
        return max((item.relative for item in self.modules), default=0.0)

    def ok(self, tolerance: float) -> bool:
        """Say whether no module is missing or extra and none differs by more than `tolerance`, relatively."""
        return not self.problems(tolerance)

    def problems(self, tolerance: float) -> list[str]:
        """Return one line per module that is missing, extra or differs by more than `tolerance`, relatively."""
        lines = [f"{name}: is missing in the second" for name in self.missing]
        lines += [f"{name}: is only in the second" for name in self.extra]
        for item in self.modules:
            if item.problem:
                lines.append(f"{item.name}: {item.problem}")
            elif not item.relative <= tolerance:
                lines.append(f"{item.name}: differs by {item.relative:.2g} relatively, {item.largest:.2g} at most")
        return lines


def compare(a: AdapterFile, b: AdapterFile) -> Comparison:
    """Pair the modules of two adapters by component and path and compare their deltas.

    A module in one of them only is a difference unless its delta is zero. Raises `AdapterFileError` for a module of a
    kind that is not supported yet.
    """
    result = Comparison()
    first, second = _by_layer(a), _by_layer(b)
    for key, module in first.items():
        if key in second:
            result.modules.append(_difference(module.name, a.delta(module), b.delta(second[key])))
        elif a.delta(module).any():
            result.missing.append(module.name)
        else:
            result.modules.append(Difference(module.name, 0.0, 0.0))
    result.extra = [module.name for key, module in second.items() if key not in first and b.delta(module).any()]
    return result


def _by_layer(adapter_file: AdapterFile) -> dict[tuple[str, str], AdapterModule]:
    layers = dict(_keyed(adapter_file))
    if len(layers) < len(adapter_file.modules):
        raise AdapterFileError("the adapter has two modules for one layer")
    return layers


def _keyed(adapter_file: AdapterFile) -> Iterator[tuple[tuple[str, str], AdapterModule]]:
    for module in adapter_file.modules:
        yield (module.component, module.path or module.raw_name), module


def _difference(name: str, a: Tensor, b: Tensor) -> Difference:
    if a.shape != b.shape:
        return Difference(name, float("inf"), float("inf"), f"shape {list(a.shape)} became {list(b.shape)}")
    apart = a - b
    largest = float(apart.abs().max()) if apart.numel() else 0.0
    if largest == 0.0:
        return Difference(name, 0.0, 0.0)
    norm = float(torch.linalg.vector_norm(a))
    return Difference(name, largest, float(torch.linalg.vector_norm(apart)) / norm if norm else float("inf"))
