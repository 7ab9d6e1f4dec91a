"""The inner form of an adapter: every format is read into it and written from it; `delta` is what a module means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vislora.algorithms.base import ANY, Algorithm, Rule, fits
from vislora.algorithms.dora import Axis, decomposed
from vislora.errors import AdapterFileError, listed, nearest
from vislora.formats.parsed import Slice
from vislora.registry import ALGORITHMS

BiasRule = Literal["added", "scaled"]
# kinds that a magnitude may be on top of
DORA_ON = frozenset({"lora", "loha", "lokr", "glora", "full"})


@dataclass(kw_only=True)
class AdapterModule:
    """What an adapter does to one layer.

    component: denoiser, te:clip_l, te:clip_g, te:t5 or unknown:<prefix>. path: dotted, in the diffusers tree; a CLIP
    path keeps its leading `text_model.`; None when no table knows the name. raw_name: its name in the file it came
    from, '' for a fresh module. tensors: native slot name -> tensor, dtype and shape as in the file. alpha None means
    rank. magnitude, magnitude_axis: DoRA's vector and the axis of the weight that it belongs to. bias, bias_rule: added
    to the layer's bias, as it is or times the scale. target, group: the part of which fused layer this was in the file.
    uncut: why this is the whole of the fused or reordered layer `group`, without a path, and not its parts; else ''.
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
    bias_rule: BiasRule = "added"
    target: Slice | None = None
    group: str | None = None
    uncut: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Return how to call this module in a message: `denoiser: mid_block.attentions.0.proj_in`."""
        return f"{self.component}: {self.path}" if self.path else self.raw_name or self.layer

    @property
    def layer(self) -> str:
        """Return what tells this module from the others of its component: a path, or the name of a stored layer."""
        return self.tree_name or self.raw_name

    @property
    def tree_name(self) -> str | None:
        """Return the path, of a layer that stays whole its original name; None when no table knows the module."""
        return self.group if self.uncut else self.path

    @property
    def direction_algorithm(self) -> Algorithm:
        """Return the algorithm that knows these slots, whatever is on top. Raises `AdapterFileError`."""
        why = self.unsupported
        if why:
            raise AdapterFileError(f"not supported yet: '{self.name}' is {why}")
        found: Algorithm = ALGORITHMS[self.algo]
        return found

    @property
    def unsupported(self) -> str:
        """Return what this module is if its meaning is not known: `of kind set`; empty when all is well."""
        if self.only_bias:
            return "" if self.magnitude is None else "of a magnitude (DoRA) and a bias only"
        if self.algo not in ALGORITHMS or not ALGORITHMS[self.algo].matches(frozenset(self.tensors)):
            return f"of kind {self.algo}"
        if self.magnitude is not None and ("embedding_down" in self.tensors or self.algo not in DORA_ON):
            return f"of kind dora on {'an embedding' if self.algo in DORA_ON else self.algo}"
        return "of kind lora on an embedding with a bias" if self.bias is not None and self.for_embedding else ""

    @property
    def for_embedding(self) -> bool:
        """Say whether these are the slots of an embedding, which has no bias."""
        return "embedding_down" in self.tensors

    @property
    def only_bias(self) -> bool:
        """Say whether nothing but the layer's bias is changed."""
        return self.algo in ("full", "norm") and not self.tensors and self.bias is not None

    @property
    def needs_base(self) -> bool:
        """Say whether the delta depends on the base weight: DoRA, and algorithms that turn or scale that weight."""
        return self.magnitude is not None or (not self.only_bias and self.direction_algorithm.needs_base)

    @property
    def rank(self) -> int:
        """Return the rank of the tensors."""
        return 1 if self.only_bias else self.direction_algorithm.rank(self.tensors)

    @property
    def scale(self) -> float:
        """Return the factor that alpha, rank and rule make."""
        return 1.0 if self.only_bias else self.direction_algorithm.scale(self.tensors, self.alpha, self.rule)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the delta: that of the base weight, or (out, all the rest) where kernels are unknown.

        A size that the slots do not tell is `ANY`, -1.
        """
        if self.bias is not None and self.only_bias:
            return self.bias.numel(), ANY
        return self.direction_algorithm.shape(self.tensors)

    def direction(self, base: Tensor | None = None) -> Tensor:
        """Return the change of the base weight before any magnitude, in float64 and of the shape of `base`, or `shape`.

        Raises `AdapterFileError` when it depends on `base` and there is none, or does not fit it.
        """
        if self.only_bias:
            return torch.zeros(() if base is None else base.shape, dtype=torch.float64)
        algorithm = self.direction_algorithm
        if base is None and algorithm.needs_base:
            raise AdapterFileError(f"'{self.name}' is of kind {self.algo}: its delta depends on the base weight")
        exact = {slot: _exact(tensor) for slot, tensor in self.tensors.items()}
        if base is None:
            return algorithm.delta(exact, self.scale, None)
        if not fits(self.shape, tuple(base.shape), algorithm.flat):
            shapes = f"its delta is {list(self.shape)} (-1: any size), the weight {list(base.shape)}"
            raise AdapterFileError(f"'{self.name}' does not fit the base weight: {shapes}")
        return algorithm.delta(exact, self.scale, base.to(torch.float64)).reshape(base.shape)

    def bias_delta(self) -> Tensor | None:
        """Return the change of the layer's bias in float64, None when there is none."""
        if self.bias is None:
            return None
        exact = self.bias.to(torch.float64)
        return exact * self.scale if self.bias_rule == "scaled" else exact


def _exact(tensor: Tensor) -> Tensor:
    """Return float64 for numbers of any float type; counts and indices stay as they are."""
    return tensor.to(torch.float64) if tensor.is_floating_point() else tensor


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

        This alone is what a module means, at strength 1; a strength multiplies it, DoRA's and a rotation's as well:
        W' = W + strength * delta. (LyCORIS has other ways for those at strengths other than 1.)
        `module`: one of `modules`, or its raw name or path. `base`: the base weight, which DoRA and some kinds depend
        on, and whose shape the change gets; without it the shape is `module.shape`.
        Raises `AdapterFileError` for a kind that is not supported, and when `base` is needed or does not fit.
        """
        module = self.find(module) if isinstance(module, str) else module
        if module.magnitude is None:
            return module.direction(base)
        if base is None:
            raise AdapterFileError(f"'{module.name}' has a magnitude (DoRA): its delta depends on the base weight")
        direction, magnitude = module.direction(base), module.magnitude.to(torch.float64)
        return decomposed(base.to(torch.float64), direction, magnitude, module.magnitude_axis or "out")

    def bias_delta(self, module: AdapterModule | str) -> Tensor | None:
        """Return the change of the layer's bias that `module` makes, in float64, or None; a strength multiplies it."""
        return (self.find(module) if isinstance(module, str) else module).bias_delta()


def taken(tensor: Tensor, axis: int, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """Return some of the indices along `axis`, each given as (first, one past the last): a view when there is one."""
    parts = [tensor.narrow(axis, start, stop - start) for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)
