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

    DoRA modules are compared by their two parts, the delta before the magnitude and the magnitude, for no base weight
    is at hand. A module in one adapter only is a difference unless its delta is zero. Raises `AdapterFileError` for a
    module of a kind that is not supported yet.
    """
    result = Comparison()
    first, second = _by_layer(a), _by_layer(b)
    for key, module in first.items():
        if key in second:
            result.modules.append(_difference(module, second[key]))
        elif _acts(module):
            result.missing.append(module.name)
        else:
            result.modules.append(Difference(module.name, 0.0, 0.0))
    result.extra = [module.name for key, module in second.items() if key not in first and _acts(module)]
    return result


def _by_layer(adapter_file: AdapterFile) -> dict[tuple[str, str], AdapterModule]:
    layers = dict(_keyed(adapter_file))
    if len(layers) < len(adapter_file.modules):
        raise AdapterFileError("the adapter has two modules for one layer")
    return layers


def _keyed(adapter_file: AdapterFile) -> Iterator[tuple[tuple[str, str], AdapterModule]]:
    for module in adapter_file.modules:
        yield (module.component, module.path or module.raw_name), module


def _acts(module: AdapterModule) -> bool:
    return module.magnitude is not None or bool(module.direction().any())


def _magnitudes(first: AdapterModule, second: AdapterModule) -> list[tuple[Tensor, Tensor]]:
    if first.magnitude is None or second.magnitude is None:
        return []
    return [(first.magnitude.flatten(), second.magnitude.flatten())]


def _equal_parts(first: AdapterModule, second: AdapterModule) -> bool:
    """Say whether both have the same numbers and scale: then so have the deltas, and large ones need not be built."""
    if (first.algo, first.scale) != (second.algo, second.scale) or first.tensors.keys() != second.tensors.keys():
        return False
    pairs = [(tensor, second.tensors[slot]) for slot, tensor in first.tensors.items()]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs + _magnitudes(first, second))


def _difference(first: AdapterModule, second: AdapterModule) -> Difference:
    name = first.name
    if (first.magnitude is None) != (second.magnitude is None) or first.magnitude_axis != second.magnitude_axis:
        return Difference(name, float("inf"), float("inf"), "one has a magnitude (DoRA), the other not the same")
    if _equal_parts(first, second):
        return Difference(name, 0.0, 0.0)
    pairs = [_directions(first, second)]
    pairs += [(one.to(torch.float64), two.to(torch.float64)) for one, two in _magnitudes(first, second)]
    for a, b in pairs:
        if a.shape != b.shape:
            return Difference(name, float("inf"), float("inf"), f"shape {list(a.shape)} became {list(b.shape)}")
    return Difference(name, max(_largest(*pair) for pair in pairs), max(_relative(*pair) for pair in pairs))


def _directions(first: AdapterModule, second: AdapterModule) -> tuple[Tensor, Tensor]:
    """Return both deltas, as matrices where one of the algorithms may not know the kernel."""
    a, b = first.direction(), second.direction()
    flat = first.direction_algorithm.flat or second.direction_algorithm.flat
    return (a.flatten(1), b.flatten(1)) if flat else (a, b)


def _largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max()) if a.numel() else 0.0


def _relative(a: Tensor, b: Tensor) -> float:
    apart, norm = float(torch.linalg.vector_norm(a - b)), float(torch.linalg.vector_norm(a))
    if apart == 0.0:
        return 0.0
    return apart / norm if norm else float("inf")
