"""The inner form of an adapter: every format is read into it and written from it; `delta` is what a module means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from vislora.algorithms.base import Algorithm, Rule
from vislora.algorithms.dora import Axis, decomposed
from vislora.errors import AdapterFileError, listed, nearest
from vislora.formats.parsed import Slice
from vislora.registry import ALGORITHMS


@dataclass(kw_only=True)
class AdapterModule:
    """What an adapter does to one layer.

    component: denoiser, te:clip_l, te:clip_g, te:t5 or unknown:<prefix>. path: dotted, in the diffusers tree; a CLIP
    path keeps its leading `text_model.`; None when no table knows the name. raw_name: its name in the file it came
    from, '' for a fresh module. tensors: native slot name -> tensor, dtype and shape as in the file. alpha None means
    rank. magnitude, magnitude_axis: DoRA's vector and the axis of the weight that it belongs to. bias: added to the
    layer's bias. target, group: the part of which fused layer this was in the file.
    """

    component: str
    path: str | None
    algo: str
    tensors: dict[str, Tensor]
    alpha: float | None = None
    rule: Rule = "alpha/r"
    raw_name: str = ""
    magnitude: Tensor | None = None
    magnitude_axis: Axis | None = None
    bias: Tensor | None = None
    target: Slice | None = None
    group: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Return how to call this module in a message: `denoiser: mid_block.attentions.0.proj_in`."""
        return f"{self.component}: {self.path}" if self.path else self.raw_name

    @property
    def algorithm(self) -> Algorithm:
        """Return the algorithm that alone gives this module its meaning.

        Raises `AdapterFileError` when there is none yet, and for DoRA: there the algorithm is only a part of it.
        """
        if self.magnitude is not None:
            raise AdapterFileError(f"not supported yet: '{self.name}' is of kind dora ({self.algo} with a magnitude)")
        return self.direction_algorithm

    @property
    def direction_algorithm(self) -> Algorithm:
        """Return the algorithm that knows these slots, whatever magnitude is on top. Raises `AdapterFileError`."""
        why = self.unsupported
        if why:
            raise AdapterFileError(f"not supported yet: '{self.name}' is {why}")
        found: Algorithm = ALGORITHMS[self.algo]
        return found

    @property
    def unsupported(self) -> str:
        """Return what this module is if its meaning is not known: `of kind oft`; empty when all is well."""
        if self.algo not in ALGORITHMS or not ALGORITHMS[self.algo].matches(frozenset(self.tensors)):
            return f"of kind {self.algo}"
        if self.magnitude is not None and "embedding_down" in self.tensors:
            return "of kind dora on an embedding"
        return f"of kind {self.algo} with a bias" if self.bias is not None else ""

    @property
    def rank(self) -> int:
        """Return the rank of the tensors."""
        return self.direction_algorithm.rank(self.tensors)

    @property
    def scale(self) -> float:
        """Return the factor that alpha, rank and rule make."""
        return self.direction_algorithm.scale(self.tensors, self.alpha, self.rule)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the delta: that of the base weight, or (out, all the rest) where kernels are unknown."""
        return self.direction_algorithm.shape(self.tensors)

    def direction(self) -> Tensor:
        """Return the change of the base weight before any magnitude, in float64 and of `shape`."""
        exact = {slot: tensor.to(torch.float64) for slot, tensor in self.tensors.items()}
        return self.direction_algorithm.delta(exact, self.scale, None)


@dataclass(frozen=True)
class SourceInfo:
    """Where an adapter came from. Both are empty for one that was never in a file."""

    path: Path | None = None
    format: str | None = None


@dataclass(kw_only=True)
class AdapterFile:
    """An adapter: its modules and all else that its file held.

    embeddings: name -> slot -> tensor (A1111 bundles). extras: tensors that nobody could place. metadata: verbatim.
    family: the model family it is for, or None when neither names nor metadata tell. notes: what reading it found odd.
    """

    modules: list[AdapterModule]
    family: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    embeddings: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)
    source: SourceInfo = SourceInfo()
    notes: list[str] = field(default_factory=list)

    def find(self, name: str) -> AdapterModule:
        """Return the module with this raw name or path. Raises `AdapterFileError` when there is none, or several."""
        found = [module for module in self.modules if name in (module.raw_name, module.path, module.name)]
        if len(found) == 1:
            return found[0]
        if found:
            raise AdapterFileError(listed(f"'{name}' is the name of {len(found)} modules:", [m.name for m in found]))
        known = [module.path or module.raw_name for module in self.modules]
        raise AdapterFileError(f"the adapter has no module '{name}'{nearest(name, known)}")

    def delta(self, module: AdapterModule | str, base: Tensor | None = None) -> Tensor:
        """Return the change of the base weight that `module` makes, in float64.

        `module`: one of `modules`, or its raw name or path. `base`: the base weight, which DoRA depends on, and whose
        shape the change gets; without it the shape is `module.shape`.
        Raises `AdapterFileError` for a kind that is not supported yet, and for DoRA without `base`.
        """
        module = self.find(module) if isinstance(module, str) else module
        direction = module.direction()
        if module.magnitude is None:
            return direction if base is None else direction.view(base.shape)
        if base is None:
            raise AdapterFileError(f"'{module.name}' has a magnitude (DoRA): its delta depends on the base weight")
        base, magnitude = base.to(torch.float64), module.magnitude.to(torch.float64)
        return decomposed(base, direction.view(base.shape), magnitude, module.magnitude_axis or "out")


def not_supported(modules: list[AdapterModule]) -> list[str]:
    """Return one line per kind without a known meaning: `12 modules of kind loha (first: denoiser: ...)`."""
    kinds: dict[str, list[AdapterModule]] = {}
    for module in modules:
        if module.unsupported:
            kinds.setdefault(module.unsupported, []).append(module)
    return [f"{len(members)} modules {kind} (first: {members[0].name})" for kind, members in kinds.items()]


def same_storage(tensors: Mapping[str, Tensor]) -> set[str]:
    """Return the names whose tensor shares memory with an earlier one, or is only a part of its memory."""
    seen: set[int] = set()
    found = set()
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        if pointer in seen or tensor.untyped_storage().nbytes() != tensor.nbytes:
            found.add(name)
        seen.add(pointer)
    return found
