"""One adapter that does what several do together: the weighted sum of their changes, exactly or by a chosen method.

    sum         up = [w1 s1 B1, w2 s2 B2], down = [A1; A2]: exact, of the sum of the ranks
    orthogonal  the same with the rows of all A made orthogonal, the nearest such to them (Loewdin 1950): what excites
                one adapter then excites no other, which removes their interference
    magnitude   every change keeps its largest numbers                                  (Han et al., arXiv 1506.02626)
    ties        the same, then only the numbers of the elected sign, averaged        (Yadav et al., arXiv 2306.01708)
    dare        every change keeps random numbers, the others' share made up for         (Yu et al., arXiv 2311.03099)

The last three make full matrices, which become the nearest LoRA within limits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vislora.algebra.low_rank import (
    EVERYTHING,
    Limits,
    Product,
    as_stored,
    nearest_product,
    nearest_to_product,
    product_norm,
    relative,
)
from vislora.algebra.to_lora import exact_product, kernel_of, metadata_of, stored, tree_of, with_kernel
from vislora.errors import AdapterFileError, AdapterMismatchError, listed
from vislora.formats.adapter_file import AdapterFile, AdapterModule
from vislora.formats.tensor_file import same_bits

Weight = Callable[[AdapterModule], float]
EXACT = ("sum", "orthogonal")
# the slots that can carry the sign of a whole change
SIGNED = {"lora": ("up",), "loha": ("hada_w1_a",), "lokr": ("lokr_w1", "lokr_w1_a")}


@dataclass(frozen=True)
class Part:
    """One of the adapters to merge. weight: what the change of a module counts."""

    name: str
    adapter: AdapterFile
    weight: Weight


@dataclass(frozen=True)
class How:
    """method: sum, orthogonal, magnitude, ties or dare. density: the share of numbers that the last three keep.

    limits: of the LoRA that is made. dtype: of its tensors; None: that of the parts where that is exact, else float32.
    """

    method: str = "sum"
    density: float = 0.5
    seed: int = 0
    limits: Limits = EVERYTHING
    dtype: torch.dtype | None = None


SUM = How()


@dataclass(frozen=True)
class MergedModule:
    """What became of one layer. wanted: the norm of the sum that was asked for; apart: of what is missing of it."""

    name: str
    parts: tuple[str, ...]
    rank: int
    wanted: float
    apart: float

    @property
    def error(self) -> float:
        """The relative error against the sum that was asked for."""
        return relative(self.apart, self.wanted)


@dataclass(frozen=True)
class _Item:
    """A module and what it counts; never 0."""

    part: str
    module: AdapterModule
    weight: float

    @property
    def factor(self) -> float:
        return self.weight * self.module.scale


def merge(parts: Sequence[Part], how: How = SUM) -> tuple[AdapterFile, list[MergedModule]]:
    """Return the merged adapter, and what became of each layer; parts that count 0 on a layer are left out there.

    Raises `AdapterMismatchError` for adapters of several families or shapes, and `AdapterFileError` for modules that
    cannot be added up: DoRA and kinds that depend on the base weight, unless one stands alone on its layer with 1.
    """
    family = _family(parts)
    layers: dict[tuple[str, str], list[_Item]] = {}
    for part in parts:
        for module in part.adapter.modules:
            weight = part.weight(module)
            if weight:
                layers.setdefault((module.component, module.layer), []).append(_Item(part.name, module, weight))
    _require_mergeable(layers.values(), how)
    tree = tree_of([module for part in parts for module in part.adapter.modules], family)
    made = [_layer(items, how, tree) for items in layers.values()]
    if not made:
        raise AdapterFileError("nothing to merge: every strength is 0")
    modules = [module for module, _ in made]
    metadata = metadata_of(modules, _common_metadata(parts), family)
    merged = AdapterFile(modules=modules, family=family, metadata=metadata, embeddings=_embeddings(parts))
    return merged, [told for _, told in made]


def _layer(items: list[_Item], how: How, tree: str | None) -> tuple[AdapterModule, MergedModule]:
    """Merge what is on one layer; biases are added up apart from the weights."""
    if len(items) == 1 and how.method in EXACT and not how.limits:
        return _weighted(items[0], how)
    carriers = [item for item in items if not item.module.only_bias]
    made = _weights(carriers, how, tree) if carriers else (items[0].module, _told(items, 1, 0.0, 0.0))
    found = [(item.weight, bias) for item in items if (bias := item.module.bias_delta()) is not None]
    bias = torch.stack([weight * bias for weight, bias in found]).sum(0).float() if found else None
    return replace(made[0], bias=bias, bias_rule="added", notes=[]), made[1]


def _weights(items: list[_Item], how: How, tree: str | None) -> tuple[AdapterModule, MergedModule]:
    products = [product for item in items if (product := exact_product(item.module)) is not None]
    if how.method in EXACT and len(products) == len(items):
        return _of_products(items, products, how, tree)
    return _of_matrices(items, how, tree)


def _weighted(item: _Item, how: How) -> tuple[AdapterModule, MergedModule]:
    """Let one module count what it counts: in its alpha, and its sign in one of its slots."""
    module, rounded = _in_type(item.module, how.dtype)
    weight = item.weight
    norm = 0.0 if module.needs_base else abs(weight) * _norm(module)
    told = _told([item], module.rank, norm, abs(weight) * rounded)
    if weight == 1.0:
        return replace(module, notes=[]), told
    bias = module.bias_delta()
    changed = replace(module, notes=[], bias=None if bias is None else (weight * bias).float(), bias_rule="added")
    slot = next((name for name in SIGNED.get(module.algo, ()) if name in module.tensors), None)
    if module.only_bias:
        return changed, told
    if slot is None or "bias_values" in module.tensors or module.direction_algorithm.own_rule(module.tensors):
        return _as_matrix(changed, weight * module.direction(), how.dtype), told
    tensors = dict(module.tensors)
    if weight < 0:
        tensors[slot] = -tensors[slot]
    alpha = as_stored((module.rank if module.alpha is None else module.alpha) * abs(weight))
    return replace(changed, tensors=tensors, alpha=alpha), told


def _in_type(module: AdapterModule, dtype: torch.dtype | None) -> tuple[AdapterModule, float]:
    """Return the module with its slots in `dtype` (None: as they are), and how far its change has moved by that."""
    if dtype is None or all(tensor.dtype == dtype for tensor in module.tensors.values()):
        return module, 0.0
    tensors = {slot: given.to(dtype) if given.is_floating_point() else given for slot, given in module.tensors.items()}
    made = replace(module, tensors=tensors)
    if module.needs_base or module.only_bias:
        return made, 0.0
    return made, float((made.direction() - module.direction()).norm())


def _norm(module: AdapterModule) -> float:
    product = exact_product(module)
    if product is None:
        return float(module.direction().norm())
    return abs(module.scale) * product_norm(product[0], product[1].flatten(1))


def _as_matrix(module: AdapterModule, change: Tensor, dtype: torch.dtype | None) -> AdapterModule:
    slot, algo = ("w_norm", "norm") if module.algo == "norm" else ("diff", "full")
    tensors = {slot: change.to(dtype or torch.float32)}
    return replace(module, algo=algo, tensors=tensors, alpha=None, rule="none", magnitude=None)


def _of_products(
    items: list[_Item], products: list[Product], how: How, tree: str | None
) -> tuple[AdapterModule, MergedModule]:
    """Lay products side by side; their factors go into `up`, all but one that they share."""
    downs = [down.flatten(1) for _, down in products]
    _require_shapes(items, [(up.shape[0], down.shape[1]) for (up, _), down in zip(products, downs, strict=True)])
    shared = max(abs(item.factor) for item in items) or 1.0
    ups = [up * (item.factor / shared) for (up, _), item in zip(products, items, strict=True)]
    up, down = torch.cat(ups, 1), torch.cat(downs)
    made = up, torch.cat(orthogonal(downs)) if how.method == "orthogonal" else down
    if how.limits and (how.limits.rank or up.shape[1]) <= up.shape[1]:
        made = nearest_to_product(*made, how.limits)
    tensors = stored(*made, [tensor for item in items for tensor in item.module.tensors.values()], how.dtype)
    apart = product_norm(
        torch.cat([up, -tensors["up"].double()], 1) * shared, torch.cat([down, tensors["down"].double()])
    )
    told = _told(items, tensors["up"].shape[1], product_norm(up * shared, down), apart)
    kernel = kernel_of([item.module for item in items], down.shape[1], tree)
    return _module(items, with_kernel(tensors, down.shape[1], kernel), shared), told


def _of_matrices(items: list[_Item], how: How, tree: str | None) -> tuple[AdapterModule, MergedModule]:
    """Merge full matrices: what is no product, and what the sparse methods make."""
    shape = max((item.module.shape for item in items), key=len)
    flat = [item.module.direction().flatten(1) if len(shape) > 1 else item.module.direction() for item in items]
    _require_shapes(items, [tuple(change.shape) for change in flat])
    wanted = torch.stack([item.weight * change for item, change in zip(items, flat, strict=True)]).sum(0)
    made = wanted
    if how.method in SPARSE and wanted.dim() > 1:
        made = SPARSE[how.method](flat, [item.weight for item in items], how, items[0].module.name)
    if wanted.dim() == 1 or not how.limits:
        module = _as_matrix(items[0].module, made.reshape(shape), how.dtype)
        apart = float((module.direction().flatten() - wanted.flatten()).norm())
        return module, _told(items, module.rank, float(wanted.norm()), apart)
    up, down = nearest_product(made, how.limits)
    tensors = stored(up, down, [], how.dtype)
    found = tensors["up"].double() @ tensors["down"].double()
    told = _told(items, up.shape[1], float(wanted.norm()), float((found - wanted).norm()))
    kernel = kernel_of([item.module for item in items], wanted.shape[1], tree)
    return _module(items, with_kernel(tensors, wanted.shape[1], kernel), 1.0), told


def orthogonal(downs: Sequence[Tensor]) -> list[Tensor]:
    """Return the rows of all matrices (r, in) made orthogonal to the others' rows, moved as little as can be.

    With A_i = R_i Q_i, Q_i orthonormal, Q = [Q_1; Q_2; ...] becomes its polar factor (Q Q^T)^(-1/2) Q: the nearest
    orthonormal rows to all at once, in whatever order they are given (symmetric orthogonalisation, Loewdin 1950).
    Directions that several share to the last are left to none: (Q Q^T)^(-1/2) is the pseudo-inverse's.
    """
    bases, factors = zip(*(torch.linalg.qr(down.T) for down in downs), strict=True)
    rows = torch.cat([basis.T for basis in bases])
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    kept = values > 1e-9 * values.max()
    rows = (vectors[:, kept] * values[kept].rsqrt()) @ vectors[:, kept].T @ rows
    parts = rows.split([basis.shape[1] for basis in bases])
    return [factor.T @ part for factor, part in zip(factors, parts, strict=True)]


def _largest(change: Tensor, density: float) -> Tensor:
    """Keep the share `density` of the numbers with the largest magnitude, at least one."""
    kept = max(1, int(density * change.numel()))
    mask = torch.zeros(change.numel(), dtype=torch.bool)
    mask[change.abs().flatten().topk(kept).indices] = True
    return change * mask.view_as(change)


def _magnitude(changes: list[Tensor], weights: list[float], how: How, name: str) -> Tensor:
    kept = [weight * _largest(change, how.density) for change, weight in zip(changes, weights, strict=True)]
    return torch.stack(kept).sum(0)


def _ties(changes: list[Tensor], weights: list[float], how: How, name: str) -> Tensor:
    """Trim, elect the sign of the sum, and average those of that sign (algorithm 1, with weights as in PEFT)."""
    kept = torch.stack([_largest(change, how.density) for change in changes])
    weighted = kept * torch.tensor(weights, dtype=kept.dtype).view(-1, *[1] * (kept.dim() - 1))
    agrees = kept.sign() == kept.sum(0).sign()
    agrees &= kept != 0
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _dare(changes: list[Tensor], weights: list[float], how: How, name: str) -> Tensor:
    """Drop numbers at random and rescale (section 3): the draw depends on the seed, the layer and the place."""
    found = []
    for index, (change, weight) in enumerate(zip(changes, weights, strict=True)):
        digest = hashlib.sha256(f"{how.seed} {name} {index}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
        mask = torch.rand(change.shape, generator=generator) < how.density
        found.append(weight * change * mask / how.density)
    return torch.stack(found).sum(0)


SPARSE = {"magnitude": _magnitude, "ties": _ties, "dare": _dare}


def _module(items: list[_Item], tensors: dict[str, Tensor], scale: float) -> AdapterModule:
    rank = tensors["up"].shape[1]
    return replace(
        items[0].module, algo="lora", tensors=tensors, alpha=as_stored(scale * rank), rule="alpha/r", magnitude=None
    )


def _told(items: list[_Item], rank: int, wanted: float, apart: float) -> MergedModule:
    return MergedModule(items[0].module.name, tuple(item.part for item in items), rank, wanted, apart)


def _require_shapes(items: list[_Item], shapes: list[tuple[int, ...]]) -> None:
    if len(set(shapes)) > 1:
        lines = [f"{item.part}: {list(shape)}" for item, shape in zip(items, shapes, strict=True)]
        raise AdapterMismatchError(listed(f"'{items[0].module.name}' has another shape in each adapter:", lines))


def _require_mergeable(layers: Iterable[list[_Item]], how: How) -> None:
    """Raise `AdapterFileError` with every module that cannot be added up."""
    if how.method in SPARSE and not how.limits:
        raise AdapterFileError(f"method {how.method} makes full matrices: say with rank or energy how much is kept")
    bad: dict[str, list[str]] = {}
    for items in layers:
        alone = len(items) == 1 and items[0].weight == 1.0 and how.method in EXACT
        for item in items:
            if item.module.unsupported or item.module.for_embedding:
                bad.setdefault(item.module.unsupported or "of kind lora on an embedding", []).append(item.module.name)
            elif item.module.needs_base and not alone:
                kind = "of a magnitude (DoRA)" if item.module.magnitude is not None else f"of kind {item.module.algo}"
                bad.setdefault(kind, []).append(item.module.name)
    if bad:
        lines = [f"{len(names)} modules {kind} (first: {names[0]})" for kind, names in bad.items()]
        title = "these cannot be added up without the base weight; merge them into a base (--base), or leave them out:"
        raise AdapterFileError(listed(title, lines))


def _family(parts: Sequence[Part]) -> str | None:
    families = {part.name: part.adapter.family for part in parts if part.adapter.family}
    if len(set(families.values())) > 1:
        lines = [f"{name}: {family}" for name, family in families.items()]
        raise AdapterMismatchError(listed("adapters for several model families cannot be merged:", lines))
    extras = [f"{part.name}: {next(iter(part.adapter.extras))}" for part in parts if part.adapter.extras]
    if extras:
        raise AdapterFileError(listed("tensors that belong to no module cannot be merged; first of each file:", extras))
    return next(iter(families.values()), None)


def _common_metadata(parts: Sequence[Part]) -> dict[str, str]:
    """Return the metadata that all parts agree on."""
    first, *others = (part.adapter.metadata for part in parts)
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}


def _embeddings(parts: Sequence[Part]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for part in parts:
        for name, slots in part.adapter.embeddings.items():
            known = found.setdefault(name, slots)
            if known.keys() != slots.keys() or not all(same_bits(known[slot], slots[slot]) for slot in slots):
                raise AdapterFileError(f"the embedding '{name}' is another one in {part.name}: rename it, or drop it")
    return found
