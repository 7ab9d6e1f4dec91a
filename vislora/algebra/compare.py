"""Compare what two adapters do: every module's delta, in float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vislora.errors import AdapterFileError
from vislora.formats import AdapterFile, AdapterModule
from vislora.formats.tensor_file import same_bits

Bases = Mapping[tuple[str, str], Tensor]
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Difference:
    """One module in both adapters. `largest`: max |a - b|; `relative`: |a - b| / |a| in Frobenius norms."""

    name: str
    largest: float
    relative: float
    problem: str = ""


@dataclass
class Comparison:
    """What two adapters differ in.

    missing: modules with an effect, and embeddings, only in the first; extra: only in the second. embeddings: those
    that are in both and not equal to the last bit.
    """

    modules: list[Difference] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    embeddings: list[str] = field(default_factory=list)

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
        lines += [f"{name}: is not the same in both" for name in self.embeddings]
        for item in self.modules:
            if item.problem:
                lines.append(f"{item.name}: {item.problem}")
            elif not item.relative <= tolerance:
                lines.append(f"{item.name}: differs by {item.relative:.2g} relatively, {item.largest:.2g} at most")
        return lines


def compare(a: AdapterFile, b: AdapterFile, base: Bases | None = None) -> Comparison:
    """Pair the modules of two adapters by component and path and compare their deltas, of the weight and of the bias.

    base: the base weight of a layer by (component, path). Without it DoRA is compared by its two parts, the delta
    before the magnitude and the magnitude, and kinds that depend on the base weight by their slots.
    Embeddings are compared bit by bit. A module in one adapter only is a difference unless it does nothing. Raises
    `AdapterFileError` for a module of a kind that is not supported.
    """
    result = Comparison()
    first, second = _by_layer(a), _by_layer(b)
    for key, module in first.items():
        if key in second:
            result.modules.append(difference(module, second[key], (base or {}).get(key)))
        elif acts(module):
            result.missing.append(module.name)
        else:
            result.modules.append(Difference(module.name, 0.0, 0.0))
    result.extra = [module.name for key, module in second.items() if key not in first and acts(module)]
    _compare_embeddings(a, b, result)
    return result


def _compare_embeddings(a: AdapterFile, b: AdapterFile, result: Comparison) -> None:
    result.missing += [f"embedding: {name}" for name in a.embeddings.keys() - b.embeddings.keys()]
    result.extra += [f"embedding: {name}" for name in b.embeddings.keys() - a.embeddings.keys()]
    for name in a.embeddings.keys() & b.embeddings.keys():
        first, second = a.embeddings[name], b.embeddings[name]
        if first.keys() != second.keys() or not all(same_bits(first[slot], second[slot]) for slot in first):
            result.embeddings.append(f"embedding: {name}")


def _by_layer(adapter_file: AdapterFile) -> dict[tuple[str, str], AdapterModule]:
    layers = dict(_keyed(adapter_file))
    if len(layers) < len(adapter_file.modules):
        raise AdapterFileError("the adapter has two modules for one layer")
    return layers


def _keyed(adapter_file: AdapterFile) -> Iterator[tuple[tuple[str, str], AdapterModule]]:
    for module in adapter_file.modules:
        yield (module.component, module.layer), module


def acts(module: AdapterModule) -> bool:
    """Say whether a module does anything; of a kind that depends on the base weight, whether any number is not zero."""
    if module.magnitude is not None or (module.bias is not None and bool(module.bias.any())):
        return True
    if module.needs_base:
        return any(bool(tensor.any()) for tensor in module.tensors.values())
    return bool(module.direction().any())


def _magnitudes(first: AdapterModule, second: AdapterModule) -> list[Pair]:
    if first.magnitude is None or second.magnitude is None:
        return []
    return [(first.magnitude.flatten(), second.magnitude.flatten())]


def _biases(first: AdapterModule, second: AdapterModule) -> list[Pair]:
    """Return both changes of the bias, zeros for one that has none."""
    a, b = first.bias_delta(), second.bias_delta()
    if a is None and b is None:
        return []
    like = a if a is not None else b
    assert like is not None
    return [(torch.zeros_like(like) if a is None else a, torch.zeros_like(like) if b is None else b)]


def _equal_parts(first: AdapterModule, second: AdapterModule) -> bool:
    """Say whether both have the same numbers and scale: then so have the deltas, and large ones need not be built."""
    if (first.algo, first.scale, first.magnitude_axis) != (second.algo, second.scale, second.magnitude_axis):
        return False
    if first.tensors.keys() != second.tensors.keys() or (first.magnitude is None) != (second.magnitude is None):
        return False
    pairs = [(tensor, second.tensors[slot]) for slot, tensor in first.tensors.items()] + _magnitudes(first, second)
    return all(same_bits(a, b) for a, b in pairs + _biases(first, second))


def difference(first: AdapterModule, second: AdapterModule, base: Tensor | None = None) -> Difference:
    """Compare two modules for one layer as `compare` does; `base`: the layer's weight."""
    if _equal_parts(first, second):
        return Difference(first.name, 0.0, 0.0)
    problem = "" if base is not None else _incomparable(first, second)
    if problem:
        return Difference(first.name, float("inf"), float("inf"), problem)
    pairs = [*_weights(first, second, base), *_biases(first, second)]
    for a, b in pairs:
        if a.shape != b.shape:
            problem = f"shape {list(a.shape)} became {list(b.shape)}"
            return Difference(first.name, float("inf"), float("inf"), problem)
    return Difference(first.name, max(_largest(*pair) for pair in pairs), max(_relative(*pair) for pair in pairs))


def _incomparable(first: AdapterModule, second: AdapterModule) -> str:
    """Return why two modules cannot be compared without the base weight, or ''."""
    if (first.magnitude is None) != (second.magnitude is None) or first.magnitude_axis != second.magnitude_axis:
        return "one has a magnitude (DoRA), the other not the same"
    if not (_turns(first) or _turns(second)):
        return ""
    if first.algo == second.algo and first.tensors.keys() == second.tensors.keys():
        return ""
    kinds = f"{first.algo} became {second.algo}" if first.algo != second.algo else f"two of kind {first.algo} differ"
    return f"{kinds}, which only the base weight can tell apart"


def _turns(module: AdapterModule) -> bool:
    """Say whether the algorithm itself, without a magnitude, depends on the base weight."""
    return not module.only_bias and module.direction_algorithm.needs_base


def _weights(first: AdapterModule, second: AdapterModule, base: Tensor | None) -> list[Pair]:
    """Return pairs that are equal when both change the weight alike."""
    if base is not None:
        whole = AdapterFile(modules=[])
        return [(whole.delta(first, base), whole.delta(second, base))]
    if not _turns(first) and not _turns(second):
        magnitudes = [(one.to(torch.float64), two.to(torch.float64)) for one, two in _magnitudes(first, second)]
        return [_directions(first, second), *magnitudes]
    scales = torch.tensor(first.scale, dtype=torch.float64), torch.tensor(second.scale, dtype=torch.float64)
    parts = [(tensor, second.tensors[slot]) for slot, tensor in first.tensors.items()] + _magnitudes(first, second)
    return [scales, *((one.to(torch.float64), two.to(torch.float64)) for one, two in parts)]


def _directions(first: AdapterModule, second: AdapterModule) -> Pair:
    """Return both deltas, as matrices where one of the algorithms may not know the kernel."""
    a, b = first.direction(), second.direction()
    if first.only_bias or second.only_bias:
        return (torch.zeros_like(b), b) if first.only_bias else (a, torch.zeros_like(a))
    flat = first.direction_algorithm.flat or second.direction_algorithm.flat
    return (a.flatten(1), b.flatten(1)) if flat and min(a.dim(), b.dim()) > 1 else (a, b)


def _largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max()) if a.numel() else 0.0


def _relative(a: Tensor, b: Tensor) -> float:
    apart, norm = float(torch.linalg.vector_norm(a - b)), float(torch.linalg.vector_norm(a))
    if apart == 0.0:
        return 0.0
    return apart / norm if norm else float("inf")
