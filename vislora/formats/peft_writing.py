"""Write a component as PEFT has it: its tensors' keys, and one config for all of its modules. Torch-free.

    base_model.model.mid_block.attentions.0.proj_in.hada_w1_a      "peft_type": "LOHA"
    base_model.model.mid_block.attentions.0.proj_in.lora_B.bias    "peft_type": "LORA", "lora_bias": true

A config holds for a whole component: one kind, a bias on all layers or on none, one factor for LoKr's splits.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from vislora.formats.contract import Stored
from vislora.formats.slots import PEFT_SUFFIXES

if TYPE_CHECKING:
    from torch import Tensor

DEFAULTS = {"task_type": None, "inference_mode": True}
LORA_DEFAULTS = {"bias": "none", "lora_dropout": 0.0}
TYPES = {"lora": "LORA", "loha": "LOHA", "lokr": "LOKR", "oft_peft": "OFT"}
MAGNITUDE = "lora_magnitude_vector"
# sizes of kernels that may be folded into the columns of a factor
KERNELS = (1, 3, 4, 9, 16, 25, 27, 49)


def entries(module: Stored, name: str) -> dict[str, Tensor]:
    """Return the tensors of `module` under PEFT's keys, which begin with `name`.

    The magnitude is (out,) for a linear layer, (1, out, 1, 1) for a conv.
    """
    found = {f"{name}.{PEFT_SUFFIXES[slot]}": tensor for slot, tensor in module.tensors.items() if PEFT_SUFFIXES[slot]}
    if module.magnitude is not None:
        ones = module.tensors["up"].dim() - 2
        found[f"{name}.{MAGNITUDE}"] = module.magnitude.reshape((1, -1, *[1] * ones) if ones else (-1,))
    if module.bias is not None:
        found[f"{name}.{PEFT_SUFFIXES['bias']}"] = module.bias
    return found


def conflicts(modules: list[Stored]) -> dict[str, list[str]]:
    """Return the names of modules that one config cannot describe together with the others, by reason."""
    found: dict[str, list[str]] = {}
    components: dict[str, list[Stored]] = {}
    for module in modules:
        components.setdefault(module.component, []).append(module)
    for members in components.values():
        kind = Counter(module.algo for module in members).most_common(1)[0][0]
        biased = any(module.bias is not None for module in members)
        for module in members:
            reason = _odd(module, kind, biased)
            if reason:
                found.setdefault(reason, []).append(module.name)
        same = [module for module in members if module.algo == kind]
        reason = _unlike(kind, same)
        if reason:
            found.setdefault(reason, []).extend(module.name for module in same)
    return found


def make_config(modules: Iterable[Stored], paths: Mapping[str, str], base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of one component, `base` with ranks, alphas and their patterns made exact.

    `paths`: name of a module -> its path in the module tree. The commonest rank and alpha are the default.
    """
    modules = list(modules)
    kind = modules[0].algo
    kept = base if base.get("peft_type", "LORA") == TYPES[kind] else {}
    config = {
        **DEFAULTS,
        **(LORA_DEFAULTS if kind == "lora" else {}),
        **kept,
        "peft_type": TYPES[kind],
        "target_modules": sorted(paths[module.name].removeprefix("text_model.") for module in modules),
    }
    if kind == "oft_peft":
        return {**config, **_oft_sizes(modules, kept), **_oft_rotation(modules)}
    if kind == "lora":
        return {**config, **_lora_settings(modules, paths)}
    return {**config, **_ranks(modules, paths, "alpha", False), **_product_settings(kind, modules, kept)}


def factorization(size: int, factor: int) -> tuple[int, int]:
    """Return how PEFT's LoKr splits `size`: into `factor` and the rest, or, smaller part first, by what divides.

    That is the largest divisor up to `factor` and the root; -1: up to the root (peft/tuners/lokr/layer.py).
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    small = next((number for number in range(most, 0, -1) if size % number == 0), 1)
    return small, size // small


def _odd(module: Stored, kind: str, biased: bool) -> str:
    """Return why `module` does not go with the kind that most members have, or ''. `biased`: has any a bias?"""
    if module.algo not in TYPES or module.algo != kind:
        return f"{{}} modules of kind {module.algo} among others of kind {kind}: PEFT has one kind per component"
    if kind != "lora" and (module.magnitude is not None or module.bias is not None):
        return f"{{}} modules of kind {kind} with {'a bias' if module.magnitude is None else 'DoRA'}: PEFT has no such"
    if module.bias is None and biased:
        return "{} modules without a bias: PEFT has it on all modules of a component or on none"
    return ""


def _unlike(kind: str, modules: list[Stored]) -> str:
    """Return why one config cannot say the sizes of all these modules, or ''."""
    if kind == "lokr" and _lokr_factor(modules, {}) is None:
        return "{} modules of kind lokr that no decompose_factor of PEFT splits as they are"
    if kind == "oft_peft" and not _oft_sizes(modules, {}):
        return "{} modules of kind oft_peft with blocks of different sizes and numbers: PEFT has one of both"
    if kind == "oft_peft" and len({tuple(_oft_rotation([module]).values()) for module in modules}) > 1:
        return "{} modules of kind oft_peft whose rotations are computed differently: PEFT has one way"
    return ""


def _lora_settings(modules: list[Stored], paths: Mapping[str, str]) -> dict[str, Any]:
    roots = all(module.rule == "alpha/sqrt(r)" for module in modules)
    return {
        **_ranks(modules, paths, "lora_alpha", roots),
        "use_rslora": roots,
        "use_dora": any(module.magnitude is not None for module in modules),
        "lora_bias": any(module.bias is not None for module in modules),
    }


def _ranks(modules: list[Stored], paths: Mapping[str, str], name: str, roots: bool) -> dict[str, Any]:
    ranks = {paths[module.name]: _rank(module) for module in modules}
    alphas = {paths[module.name]: _alpha(module, roots) for module in modules}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "r": rank,
        name: alpha,
        "rank_pattern": {_anchored(path): value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {_anchored(path): value for path, value in alphas.items() if value != alpha},
    }


def _product_settings(kind: str, modules: list[Stored], base: Mapping[str, Any]) -> dict[str, Any]:
    cores = any("hada_t1" in module.tensors or "lokr_t2" in module.tensors for module in modules)
    if kind == "loha":
        return {"use_effective_conv2d": cores}
    both = any("lokr_w1_a" in module.tensors for module in modules)
    factor = _lokr_factor(modules, base)
    return {"use_effective_conv2d": cores, "decompose_both": both, "decompose_factor": factor}


def _rank(module: Stored) -> int:
    """Return r for the config: two full factors of LoKr stay full from the half of their longest side on."""
    if _both_full(module):
        return max(*module.tensors["lokr_w1"].shape, *module.tensors["lokr_w2"].shape[:2])
    return module.rank


def _both_full(module: Stored) -> bool:
    return {"lokr_w1", "lokr_w2"} <= module.tensors.keys()


def _alpha(module: Stored, roots: bool) -> int | float:
    if _both_full(module):
        alpha = float(_rank(module)) * (module.alpha if module.rule == "scale" and module.alpha is not None else 1.0)
    else:
        assert module.alpha is not None  # every kind with a scale has one
        plain = module.rule == "alpha/sqrt(r)" and not roots
        alpha = module.alpha * module.rank**0.5 if plain else module.alpha
    return int(alpha) if float(alpha).is_integer() else alpha


def _anchored(path: str) -> str:
    """Anchor a path as diffusers does; a CLIP's `text_model.` is there or not, as its transformers version has it."""
    return path.removeprefix("text_model.") if path.startswith("text_model.") else f"^{path}"


def _lokr_factor(modules: list[Stored], base: Mapping[str, Any]) -> int | None:
    """Return the decompose_factor with which PEFT makes slots of just these shapes, None when there is none."""
    both = any("lokr_w1_a" in module.tensors for module in modules)
    splits = [_split(module) for module in modules]
    sizes = sorted({size for first, second, _ in splits for size in (*first, *second)})
    said = base.get("decompose_factor")
    for factor in (*([said] if isinstance(said, int) else []), -1, *sizes):
        if all(_splits_so(module, *split, factor, both) for module, split in zip(modules, splits, strict=True)):
            return factor
    return None


def _split(module: Stored) -> tuple[tuple[int, int], tuple[int, int], bool]:
    """Return the sizes of both factors, and whether a kernel may be folded into the columns of the second."""
    shapes = {slot: tuple(tensor.shape) for slot, tensor in module.tensors.items()}
    first = shapes.get("lokr_w1") or (shapes["lokr_w1_a"][0], shapes["lokr_w1_b"][1])
    if "lokr_w2" in shapes:
        return (first[0], first[1]), (shapes["lokr_w2"][0], shapes["lokr_w2"][1]), False
    core = "lokr_t2" in shapes
    return (first[0], first[1]), (shapes["lokr_w2_a"][1 if core else 0], shapes["lokr_w2_b"][1]), not core


def _splits_so(
    module: Stored, first: tuple[int, int], second: tuple[int, int], folded: bool, factor: int, both: bool
) -> bool:
    rank, kernels = _rank(module), KERNELS if folded else (1,)
    if factorization(first[0] * second[0], factor) != (first[0], second[0]):
        return False
    if ("lokr_w1_a" in module.tensors) != (both and 2 * rank < max(first)):
        return False
    for columns in (second[1] // kernel for kernel in kernels if second[1] % kernel == 0):
        full = 2 * rank >= max(second[0], columns)
        if full == ("lokr_w2" in module.tensors) and factorization(first[1] * columns, factor) == (first[1], columns):
            return True
    return False


def _oft_sizes(modules: list[Stored], base: Mapping[str, Any]) -> dict[str, Any]:
    """Return r or oft_block_size, of which PEFT wants just one, or nothing when neither holds for all modules."""
    shapes = {tuple(module.tensors["oft_R"].shape) for module in modules}
    shared = {"block_share": all(blocks == 1 for blocks, _ in shapes) and bool(base.get("block_share", True))}
    if len({packed for _, packed in shapes}) == 1:
        side = (1 + math.isqrt(1 + 8 * next(iter(shapes))[1])) // 2
        return {"r": 0, "oft_block_size": side, **shared}
    if len({blocks for blocks, _ in shapes}) == 1 and not shared["block_share"]:
        return {"r": next(iter(shapes))[0], "oft_block_size": 0, **shared}
    return {name: base[name] for name in ("r", "oft_block_size", "block_share") if name in base}


def _oft_rotation(modules: list[Stored]) -> dict[str, Any]:
    slots = modules[0].tensors
    series = {"num_cayley_neumann_terms": int(slots["neumann_terms"])} if "neumann_terms" in slots else {}
    limit = {"eps": float(slots["eps"])} if "eps" in slots else {}
    return {"use_cayley_neumann": bool(series), **series, "coft": bool(limit), **limit}
