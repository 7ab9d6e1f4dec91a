"""Turn an adapter into plain LoRA, which every format can hold: exactly where the algebra allows, else of a rank.

    loha            rank r1 r2, exact          lokr                    rank r1 r2, exact
    Tucker LoRA     same rank, exact           full, LoRA and a rest   only of a rank or an energy share

A magnitude (DoRA) and a bias stay on top as they are. Exact means: up to the rounding of the slots to float32; with
slots in half precision there is none, for their products fit float32.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from vislora.algebra.low_rank import (
    EVERYTHING,
    Limits,
    Product,
    loha_product,
    lokr_product,
    nearest_product,
    nearest_to_product,
    within_sides,
)
from vislora.formats.adapter_file import AdapterFile, AdapterModule, taken
from vislora.formats.cutting import Whole, part_fields
from vislora.formats.kohya import network_keys
from vislora.formats.names import FAMILY_NAMES
from vislora.formats.parsed import inputs_of
from vislora.formats.peft_config import METADATA_KEY
from vislora.formats.rows import NotByRowsError
from vislora.formats.tucker import tucker_product
from vislora.formats.writing import family_for_writing

PLAIN = frozenset({"down", "up"})
EMBEDDING = frozenset({"embedding_down", "embedding_up"})
EXACT = {"loha": loha_product, "lokr": lokr_product}
# kernels of the denoisers' convs by the end of their paths: LoHa and LoKr store matrices, which do not tell
KERNELS = (
    (re.compile(r"(.*\.)?(conv1|conv2|conv_in|conv_out|(down|up)samplers\.0\.conv)"), (3, 3)),
    (re.compile(r".*\.conv_shortcut"), (1, 1)),
    (re.compile(r"pos_embed\.proj"), (2, 2)),
)
# a conv in the UNet of SD 1, whose text features are 768 wide, a linear layer in all others
PROJECTION = re.compile(r".*\.proj_(in|out)")
SD1 = "sd1"
# paths of convs that are linear layers in these families
LINEAR = {"auraflow": re.compile(r"pos_embed\.proj")}


@dataclass(frozen=True)
class Conversion:
    """How one module became LoRA. kind, rank: before, after. error: |made - meant| / |meant|, Frobenius norms.

    reduced: it is the nearest of a rank, not the same change.
    """

    name: str
    kind: str
    rank: int
    error: float
    reduced: bool


@dataclass(frozen=True)
class Kept:
    """A module that stays as it is. `reason`: why it is no plain LoRA."""

    name: str
    reason: str


def to_lora(adapter: AdapterFile, limits: Limits = EVERYTHING) -> tuple[AdapterFile, list[Conversion | Kept]]:
    """Return `adapter` with plain LoRA modules wherever that can be, and what became of every other module.

    limits: of the nearest LoRA to what has a larger rank or none. Plain LoRA modules stay as they are. A fused layer
    that had to stay whole is cut.
    """
    family = family_for_writing(adapter)
    modules: list[AdapterModule] = []
    told: list[Conversion | Kept] = []
    tree = tree_of(adapter.modules, family)
    for module in adapter.modules:
        reason = _why_kept(module, bool(limits))
        if reason is None:
            made, conversion = _converted(module, limits, tree)
            told.append(conversion)
        else:
            made = module
            told += [Kept(module.name, reason)] if reason else []
        modules += parts_of_whole(made, family) if made.uncut else [made]
    metadata = (
        metadata_of(modules, adapter.metadata, family) if any(isinstance(item, Conversion) for item in told) else None
    )
    return replace(adapter, modules=modules, family=family, metadata=metadata or adapter.metadata), told


def metadata_of(modules: Sequence[AdapterModule], metadata: Mapping[str, str], family: str | None) -> dict[str, str]:
    """Return the metadata of what `modules` were with what it says of them told anew; a writer says what is missing."""
    kept = {key: value for key, value in metadata.items() if key != METADATA_KEY}
    if "ss_network_module" not in kept or any(module.unsupported for module in modules):
        return kept
    return {**kept, **network_keys(modules, family)}


def _why_kept(module: AdapterModule, any_rank: bool) -> str | None:
    """Return why a module stays as it is, '' when it is plain LoRA already, None when it is to be converted."""
    slots = frozenset(module.tensors)
    if module.unsupported:
        return f"not supported yet: {module.unsupported}"
    if slots in (PLAIN, EMBEDDING):
        return ""
    if module.algo in EXACT or slots == PLAIN | {"mid"}:
        return None
    matrix = module.algo == "lora" or ("diff" in slots and module.tensors["diff"].dim() > 1)
    if not matrix:
        return f"a module of kind {module.algo} is no matrix of a rank"
    return None if any_rank else f"a module of kind {module.algo} is a full matrix: name a rank, or a share of energy"


def _converted(module: AdapterModule, limits: Limits, tree: str | None) -> tuple[AdapterModule, Conversion]:
    product = exact_product(module)
    full = module.direction()
    matrix = full.flatten(1)
    kernel = kernel_of([module], matrix.shape[1], tree)
    if product is None:
        up, down = nearest_product(matrix, limits)
        scale = 1.0
    else:
        up, down = product[0], product[1].flatten(1)
        scale = module.scale
    reduced = product is None or limits.energy is not None or (limits.rank is not None and up.shape[1] > limits.rank)
    if product is not None and reduced:
        up, down = nearest_to_product(up, down, limits)
    tensors = stored(up, down, list(module.tensors.values()))
    meant = float(torch.linalg.vector_norm(matrix))
    made = scale * (tensors["up"].to(torch.float64) @ tensors["down"].to(torch.float64))
    apart = float(torch.linalg.vector_norm(made - matrix))
    tensors = with_kernel(tensors, matrix.shape[1], kernel)
    found = up.shape[1]
    lora = replace(module, algo="lora", tensors=tensors, alpha=scale * found, rule="alpha/r", notes=list(module.notes))
    return lora, Conversion(module.name, module.algo, found, apart / meant if meant else apart, reduced)


def exact_product(module: AdapterModule) -> Product | None:
    """Return a module's change, before its scale, as up (out, rank) and down (rank, in, *kernel) in float64.

    None for what is no product: embeddings, full matrices, sparse rests, and kinds that need the base weight.
    """
    slots = {slot: tensor.to(torch.float64) for slot, tensor in module.tensors.items() if tensor.is_floating_point()}
    if module.algo in EXACT:
        return within_sides(*EXACT[module.algo](slots))
    if slots.keys() == PLAIN:
        return slots["up"].flatten(1), slots["down"]
    return tucker_product(slots) if slots.keys() == PLAIN | {"mid"} else None


def stored(up: Tensor, down: Tensor, sources: Sequence[Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return the slots in `dtype`; without one in the sources' if that is exact, else in float32."""
    if dtype is None and sources:
        common = reduce(torch.promote_types, (tensor.dtype for tensor in sources))
        if all(torch.equal(item.to(common).to(torch.float64), item) for item in (up, down)):
            dtype = common
    return {"down": down.to(dtype or torch.float32), "up": up.to(dtype or torch.float32)}


def tree_of(modules: Sequence[AdapterModule], family: str | None) -> str | None:
    """Return what kernels depend on: `family`, or SD 1 where cross attention sees text features of its width."""
    keys = (module for module in modules if (module.path or "").endswith("attn2.to_k"))
    return SD1 if any(inputs_of(module.tensors) == 768 for module in keys) else family


def kernel_of(modules: Sequence[AdapterModule], columns: int, tree: str | None) -> tuple[int, ...]:
    """Return the kernel of the layer that `modules` are for, () for a linear one. tree: see `tree_of`.

    LoRAs and full matrices tell it; of LoHa and LoKr that are matrices, the layer's name does.
    """
    told = max((tuple(module.shape[2:]) for module in modules), key=len)
    if told or any(module.algo not in EXACT for module in modules):
        return told
    path = modules[0].path or "" if modules[0].component == "denoiser" else ""
    if tree == SD1 and PROJECTION.fullmatch(path):
        return 1, 1
    if tree in LINEAR and LINEAR[tree].fullmatch(path):
        return ()
    sizes = next((sizes for pattern, sizes in KERNELS if pattern.fullmatch(path)), ())
    return sizes if columns % math.prod(sizes) == 0 else ()


def with_kernel(tensors: dict[str, Tensor], columns: int, kernel: tuple[int, ...]) -> dict[str, Tensor]:
    """Return the slots of a linear layer as those of a conv with this kernel; () leaves them as they are."""
    if not kernel:
        return tensors
    up, down = tensors["up"], tensors["down"]
    inputs = columns // math.prod(kernel)
    shape = (down.shape[0], inputs, *kernel)
    return {"down": down.reshape(shape), "up": up.reshape(*up.shape, *[1] * len(kernel))}


def parts_of_whole(module: AdapterModule, family: str | None) -> Iterator[AdapterModule]:
    """Yield the parts of a fused layer that was whole, now that its change is of a kind that can be cut."""
    names = FAMILY_NAMES.get(family or "")
    table = names.tables.get(module.component) if names else None
    leads = table.find_dotted(module.group or "") if table else []
    whole = Whole(module.algo, module.tensors, module.magnitude, module.magnitude_axis, module.bias)
    try:
        fields = [part_fields(whole, lead, module.raw_name, taken) for lead in leads]
    except NotByRowsError as problem:
        fields, module = [], replace(module, uncut=str(problem))
    yield from (replace(module, uncut="", tensors=item.pop("slots"), **item) for item in fields)
    if not fields:
        yield module
