"""What can be wrong with an adapter before its tensors are read: missing halves, shapes, alphas. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from vislora.formats.parsed import ParsedModule
from vislora.formats.slots import missing_slots

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")

WHOLE = {"bias_indices", "bias_size", "on_input", "alpha"}
_CORES = {"hada_w1_a": "hada_t1", "hada_w2_a": "hada_t2", "lokr_w2_a": "lokr_t2"}

Shapes = dict[str, tuple[int, ...]]


def problems(modules: Iterable[ParsedModule]) -> list[str]:
    """Return one line per fault, each naming its module and the keys of its tensors."""
    return [
        f"'{module.raw_name}': {fault}; its keys: {', '.join(module.keys)}"
        for module in modules
        for fault in _faults(module)
    ]


def _faults(module: ParsedModule) -> list[str]:
    # ai-toolkit writes a huge alpha, infinite in float16, where two full factors of LoKr leave it without meaning
    if (
        module.alpha is not None
        and not math.isfinite(module.alpha)
        and not {"lokr_w1", "lokr_w2"} <= module.refs.keys()
    ):
        return [f"alpha is {module.alpha}"]
    if not module.refs and module.bias is None:
        return [f"it has {'a magnitude' if module.magnitude else 'an alpha'} and nothing else"]
    missing = missing_slots(module.algo, module.refs)
    if missing:
        return [f"incomplete, it lacks {' and '.join(missing)} (it has {', '.join(sorted(module.refs))})"]
    if module.algo not in _SHAPE_FAULTS:
        return []
    return [*_type_faults(module), *_shape_faults(module)][:1]


def _type_faults(module: ParsedModule) -> list[str]:
    extra = {"magnitude": module.magnitude, "bias": module.bias}
    refs = {**module.refs, **{name: ref for name, ref in extra.items() if ref is not None}}
    return [
        f"{slot} is {ref.dtype}, not a floating type"
        for slot, ref in refs.items()
        if ref.dtype not in FLOATS and slot not in WHOLE
    ]


def _shape_faults(module: ParsedModule) -> list[str]:
    shapes = {slot: ref.shape for slot, ref in module.refs.items()}
    fault = _shape_fault(module, shapes)
    return [f"{fault}: {', '.join(f'{slot} {list(shape)}' for slot, shape in shapes.items())}"] if fault else []


def _shape_fault(module: ParsedModule, shapes: Shapes) -> str:
    if any(0 in shape for slot, shape in shapes.items() if not slot.startswith("bias_")):
        return "a tensor is empty"
    fault = _SHAPE_FAULTS[module.algo](shapes) if shapes else ""
    if fault:
        return fault
    out, fan_in = _SIDES[module.algo](shapes) if module.algo in _SIDES and shapes else (0, 0)
    wanted = out if module.magnitude_axis == "out" else fan_in
    if module.magnitude is not None and wanted and math.prod(module.magnitude.shape) != wanted:
        return f"its magnitude {list(module.magnitude.shape)} does not fit"
    if module.bias is not None and out and module.bias.shape != (out,):
        return f"its bias {list(module.bias.shape)} does not fit"
    return ""


def _loha_sides(shapes: Shapes) -> tuple[int, int]:
    core = "hada_t1" in shapes
    return shapes["hada_w1_a"][1 if core else 0], shapes["hada_w1_b"][1] if core else 0


def _lokr_sides(shapes: Shapes) -> tuple[int, int]:
    first = shapes.get("lokr_w1") or (shapes["lokr_w1_a"][0], shapes["lokr_w1_b"][1])
    core = "lokr_t2" in shapes
    second = shapes.get("lokr_w2") or (shapes["lokr_w2_a"][1 if core else 0], shapes["lokr_w2_b"][1] if core else 0)
    return first[0] * second[0], first[1] * second[1]


def _lora_sides(shapes: Shapes) -> tuple[int, int]:
    return (shapes["up"][0], shapes["down"][1]) if "down" in shapes else (0, 0)


def _oft_sides(shapes: Shapes) -> tuple[int, int]:
    blocks = shapes.get("boft_blocks") or shapes["oft_blocks"]
    return blocks[-3] * blocks[-1], 0


def _product_fault(shapes: Shapes) -> str:
    """Check the pairs of LoHa and LoKr: X_a (n, r) and X_b (r, m); with a core (r, r, ...) X_a is (r, n)."""
    if any(len(shapes[slot]) < 2 for slot in ("lokr_w1", "lokr_w2") if slot in shapes):
        return "these shapes fit no layer"
    for slot, left in shapes.items():
        if not slot.endswith("_a"):
            continue
        right, core = shapes.get(f"{slot[:-1]}b", ()), shapes.get(_CORES.get(slot, ""))
        if len(left) != 2 or len(right) != 2 or (core is not None and len(core) < 3):
            return "these shapes fit no layer"
        if (left[1] != right[0]) if core is None else ((left[0], right[0]) != core[:2]):
            return "its tensors do not share a rank"
    if "hada_w1_a" not in shapes:
        return ""
    side = 1 if "hada_t1" in shapes else 0
    outs, ins = ({shapes[f"hada_w{index}_{half}"][axis] for index in (1, 2)} for half, axis in (("a", side), ("b", 1)))
    return "its two products have different shapes" if len(outs) + len(ins) > 2 else ""


def _lora_fault(shapes: Shapes) -> str:
    if "embedding_down" in shapes:
        return _embedding_fault(shapes)
    down, up, mid = shapes["down"], shapes["up"], shapes.get("mid")
    if not 2 <= len(down) <= 5 or len(up) != len(down) or (mid is not None and len(mid) != len(down)):
        return "these shapes fit no layer"
    if any(size != 1 for size in up[2:]) or (mid is not None and any(size != 1 for size in down[2:])):
        return "a projection should have kernel size 1"
    ranks = (down[0], up[1]) if mid is None else (mid[1], mid[0])
    if (down[0], up[1]) != ranks or (mid is None and down[0] != up[1]):
        return "its tensors do not share a rank"
    return _sparse_fault(shapes) if "bias_size" in shapes else ""


def _sparse_fault(shapes: Shapes) -> str:
    sizes, places, values = (shapes[slot] for slot in ("bias_size", "bias_indices", "bias_values"))
    good = sizes == (2,) and len(places) == 2 and places[0] == 2 and values == places[1:]
    return "" if good else "the sparse rest is not one of a matrix"


def _embedding_fault(shapes: Shapes) -> str:
    if set(shapes) != {"embedding_down", "embedding_up"}:
        return "mixes an embedding's slots with others"
    down, up = shapes["embedding_down"], shapes["embedding_up"]
    return "its tensors do not share a rank" if len(down) != 2 or len(up) != 2 or down[0] != up[1] else ""


def _glora_fault(shapes: Shapes) -> str:
    if any(len(shape) < 2 for shape in shapes.values()):
        return "these shapes fit no layer"
    a1, a2, b1, b2, bm = (shapes.get(slot, ()) for slot in ("a1", "a2", "b1", "b2", "bm"))
    ranks = {a1[1], a2[0], b1[1], b2[0], *bm[:2]}
    return "" if len(ranks) == 1 and a1[0] == a2[1] == b2[1] else "its tensors do not share a rank and a layer"


def _oft_fault(shapes: Shapes) -> str:
    blocks = shapes.get("boft_blocks") or shapes["oft_blocks"]
    if len(blocks) not in (3, 4) or blocks[-1] != blocks[-2]:
        return "its blocks are not square"
    if "boft_blocks" in shapes and (blocks[3] % 2 or blocks[1] & (blocks[1] - 1)):
        return "its blocks have no even side, or their number is no power of two"
    if math.prod(shapes.get("alpha", ())) != 1:
        return "alpha should be one number"
    rescale = shapes.get("rescale")
    return "" if rescale is None or math.prod(rescale) == blocks[-3] * blocks[-1] else "its rescale does not fit"


def _oft_peft_fault(shapes: Shapes) -> str:
    packed = shapes["oft_R"]
    if len(packed) != 2:
        return "these shapes fit no layer"
    side = (1 + math.isqrt(1 + 8 * packed[1])) // 2
    return "" if side * (side - 1) // 2 == packed[1] else "its rows hold the upper triangle of no square block"


def _ia3_fault(shapes: Shapes) -> str:
    weight = shapes["weight"]
    if math.prod(shapes["on_input"]) != 1:
        return "on_input should be one number"
    good = len(weight) == 1 or (len(weight) > 2 and math.prod(weight) == weight[1])
    return "" if good else "its weight has more than one axis"


def _full_fault(shapes: Shapes) -> str:
    return "" if shapes["diff"] else "a weight should have an axis"


def _set_fault(shapes: Shapes) -> str:
    return "" if shapes["set_weight"] else "a weight should have an axis"


def _norm_fault(shapes: Shapes) -> str:
    return "" if len(shapes["w_norm"]) == 1 else "a norm's weight should have one axis"


_SHAPE_FAULTS: dict[str, Callable[[Shapes], str]] = {
    "lora": _lora_fault,
    "loha": _product_fault,
    "lokr": _product_fault,
    "full": _full_fault,
    "norm": _norm_fault,
    "set": _set_fault,
    "glora": _glora_fault,
    "oft": _oft_fault,
    "boft": _oft_fault,
    "oft_peft": _oft_peft_fault,
    "ia3": _ia3_fault,
}
# the layer's outputs and inputs (those of a group), 0 for one that the slots do not tell
_SIDES: dict[str, Callable[[Shapes], tuple[int, int]]] = {
    "lora": _lora_sides,
    "loha": _loha_sides,
    "lokr": _lokr_sides,
    "full": lambda shapes: (shapes["diff"][0], (*shapes["diff"], 0)[1]),
    "norm": lambda shapes: (shapes["w_norm"][0], 0),
    "glora": lambda shapes: (shapes["b1"][0], shapes["a1"][0]),
    "oft": _oft_sides,
    "boft": _oft_sides,
}
