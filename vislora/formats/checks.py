"""What can be wrong with an adapter before its tensors are read: missing halves, shapes, alphas. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterable

from vislora.formats.parsed import ParsedModule
from vislora.formats.slots import missing_slots

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")

_CORES = {"hada_w1_a": "hada_t1", "hada_w2_a": "hada_t2", "lokr_w1_a": "lokr_t1", "lokr_w2_a": "lokr_t2"}


def problems(modules: Iterable[ParsedModule]) -> list[str]:
    """Return one line per fault, each naming its module and the tensors concerned."""
    return [f"'{module.raw_name}': {fault}" for module in modules for fault in _faults(module)]


def _faults(module: ParsedModule) -> list[str]:
    if module.alpha is not None and not math.isfinite(module.alpha):
        return [f"alpha is {module.alpha}"]
    if not module.refs and module.bias is None:
        return ["it has an alpha and nothing else"]
    missing = missing_slots(module.algo, module.refs)
    if missing:
        return [f"incomplete, it lacks {' and '.join(missing)} (it has {', '.join(sorted(module.refs))})"]
    if module.algo not in ("lora", "loha", "lokr"):
        return []
    odd = [
        f"{slot} is {ref.dtype}, not a floating type" for slot, ref in module.refs.items() if ref.dtype not in FLOATS
    ]
    if module.algo != "lora":
        return odd or _product_faults(module)
    return odd or (_embedding_faults(module) if "embedding_down" in module.refs else _lora_faults(module))


def _product_faults(module: ParsedModule) -> list[str]:
    """Check the pairs of LoHa and LoKr: X_a (n, r) and X_b (r, m); with a core (r, r, ...) X_a is (r, n)."""
    shapes = {slot: ref.shape for slot, ref in module.refs.items()}
    shown = ", ".join(f"{slot} {list(shape)}" for slot, shape in shapes.items())
    if any(0 in shape for shape in shapes.values()):
        return [f"a tensor is empty: {shown}"]
    if any(len(shapes[slot]) < 2 for slot in ("lokr_w1", "lokr_w2") if slot in shapes):
        return [f"these shapes fit no layer: {shown}"]
    for slot, left in shapes.items():
        if not slot.endswith("_a"):
            continue
        right, core = shapes.get(f"{slot[:-1]}b", ()), shapes.get(_CORES[slot])
        if len(left) != 2 or len(right) != 2 or (core is not None and len(core) < 3):
            return [f"these shapes fit no layer: {shown}"]
        if (left[1] != right[0]) if core is None else ((left[0], right[0]) != core[:2]):
            return [f"its tensors do not share a rank: {shown}"]
    return []


def _embedding_faults(module: ParsedModule) -> list[str]:
    down, up = (module.refs[slot].shape for slot in ("embedding_down", "embedding_up"))
    if set(module.refs) != {"embedding_down", "embedding_up"}:
        return [f"mixes an embedding's slots with others: {', '.join(sorted(module.refs))}"]
    if len(down) != 2 or len(up) != 2 or down[0] != up[1] or down[0] == 0:
        return [f"embedding_down {list(down)} and embedding_up {list(up)} do not share a rank"]
    return []


def _lora_faults(module: ParsedModule) -> list[str]:
    shapes = {slot: ref.shape for slot, ref in module.refs.items()}
    down, up, mid = shapes["down"], shapes["up"], shapes.get("mid")
    shown = ", ".join(f"{slot} {list(shape)}" for slot, shape in shapes.items())
    if not 2 <= len(down) <= 5 or len(up) != len(down) or (mid is not None and len(mid) != len(down)):
        return [f"these shapes fit no layer: {shown}"]
    if 0 in (*down, *up, *(mid or ())):
        return [f"a tensor is empty: {shown}"]
    if any(size != 1 for size in up[2:]) or (mid is not None and any(size != 1 for size in down[2:])):
        return [f"a projection should have kernel size 1: {shown}"]
    ranks = (down[0], up[1]) if mid is None else (mid[1], mid[0])
    wanted = up[0] if module.magnitude_axis == "out" else down[1]
    if module.magnitude is not None and math.prod(module.magnitude.shape) != wanted:
        return [f"its magnitude {list(module.magnitude.shape)} does not fit: {shown}"]
    if (down[0], up[1]) != ranks or (mid is None and down[0] != up[1]):
        return [f"its tensors do not share a rank: {shown}"]
    return []
