"""The value kinds of adapter files: from the end of a key to a slot, from a module's slots to its kind.

lora_unet_mid_block_attentions_0_proj_in.lora_down.weight        -> down   (lora)
unet.mid_block.attentions.0.proj_in.lora_A.default.weight        -> down   (lora)
lycoris_mid_block_attentions_0_proj_in.hada_w1_a                 -> hada_w1_a   (loha)

Slots of other packages' algorithms stand under their own names in files that LyCORIS' kinds are in.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from functools import cache, lru_cache

from vislora.errors import ConfigError
from vislora.registry import ALGORITHMS

_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
_GLORA = ("a1", "a2", "b1", "b2", "bm")
_SPARSE = ("bias_indices", "bias_values", "bias_size")
# Tucker's core, by the slot of each kind that can have one
CORES = frozenset({"mid", "hada_t1", "lokr_t2", "bm"})
# slots of a module's layer bias, whatever its kind: added as they are, but PEFT's `lora_B.bias` times the scale
BIASES = {"bias": "added", "b_norm": "added", "up_bias": "scaled"}
MAGNITUDES = frozenset({"dora_scale", "lora_magnitude_vector", "magnitude"})
# slots that sit on top of any kind: they do not decide what a module is
COMMON = frozenset({"alpha", *MAGNITUDES, *BIASES})

DIFFUSERS_SUFFIXES = {
    "down": "lora_A.weight",
    "up": "lora_B.weight",
    "embedding_down": "lora_embedding_A",
    "embedding_up": "lora_embedding_B",
    "bias": "lora_B.bias",
}
PEFT_SUFFIXES = {
    **DIFFUSERS_SUFFIXES,
    **{slot: slot for slot in (*_LOHA, *_LOKR)},
    "oft_R": "oft_R.weight",
    "neumann_terms": "",  # in adapter_config.json
    "eps": "",
}
KOHYA_SUFFIXES = {
    "down": "lora_down.weight",
    "up": "lora_up.weight",
    "mid": "lora_mid.weight",
    **{slot: slot for slot in (*_LOHA, *_LOKR, *_SPARSE)},
    **{slot: f"{slot}.weight" for slot in _GLORA},
    "diff": "diff",
    "w_norm": "w_norm",
    "oft_blocks": "oft_blocks",
    "boft_blocks": "oft_blocks",
    "rescale": "rescale",
    "alpha": "alpha",
    "weight": "weight",
    "on_input": "on_input",
    "bias": "diff_b",
}
KINDS: dict[str, tuple[str, ...]] = {
    "lora": ("down", "up", "mid", "embedding_down", "embedding_up", *_SPARSE),
    "loha": _LOHA,
    "lokr": _LOKR,
    "full": ("diff",),
    "norm": ("w_norm",),
    "glora": _GLORA,
    "oft": ("oft_blocks", "rescale"),
    "boft": ("boft_blocks", "rescale"),
    "oft_peft": ("oft_R",),
    "ia3": ("weight", "on_input"),
    "set": ("set_weight",),
    "reshape": ("reshape_weight",),
}
# kinds that have alpha for a slot of their own: there it is a constraint
ALPHA_SLOT = frozenset({"oft", "boft"})
# kinds to which no alpha and no scale belongs
NO_SCALE = frozenset({"full", "norm", "set", "ia3", "oft_peft", *ALPHA_SLOT})
_LORA = (frozenset({"down", "up"}), frozenset({"embedding_down", "embedding_up"}))
# one of these sets must be complete; kinds that are not listed take any of their slots
REQUIRED: dict[str, tuple[frozenset[str], ...]] = {
    "lora": _LORA,
    "loha": (frozenset(_LOHA[:4]),),
    "lokr": tuple(
        frozenset(first + second)
        for first in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        for second in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
    ),
    "glora": (frozenset(_GLORA[:4]),),
    "oft": (frozenset({"oft_blocks"}),),
    "ia3": (frozenset({"weight", "on_input"}),),
}

_SUFFIX_OF_SLOT: dict[str, tuple[str, ...]] = {
    # without `.weight` in files for Mochi
    "down": (r"lora_down\.weight", r"lora_A\.(?:[^.]+\.)?weight", "lora_A"),
    "up": (r"lora_up\.weight", r"lora_B\.(?:[^.]+\.)?weight", "lora_B"),
    "mid": (r"lora_mid\.weight",),
    "up_bias": (r"lora_B\.(?:[^.]+\.)?bias",),
    "embedding_down": (r"lora_embedding_A(?:\.[^.]+)?",),
    "embedding_up": (r"lora_embedding_B(?:\.[^.]+)?",),
    "lora_magnitude_vector": (r"lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?",),
    "bias": (r"diff_b",),
    **{slot: (rf"{slot}\.weight",) for slot in _GLORA},
    "oft_R": (r"oft_R\.(?:[^.]+\.)?weight",),
    "oft_blocks": (r"oft_blocks(?:\.\d+)?",),
}
_PLAIN = (
    "alpha",
    "dora_scale",
    "magnitude",
    *_LOHA,
    *_LOKR,
    "lokr_t1",
    "diff",
    "w_norm",
    "b_norm",
    "oft_diag",
    "rescale",
    "on_input",
    "weight",
)
_MORE = (*_SPARSE, "set_weight", "reshape_weight")
_NAMED = {**_SUFFIX_OF_SLOT, **{slot: (slot,) for slot in (*_PLAIN, *_MORE)}}
_END = re.compile("|".join(f"(?P<{slot}>{'|'.join(ends)})" for slot, ends in _NAMED.items()))
_MOST_PARTS = 3  # of an end: lora_magnitude_vector.default.weight


@lru_cache(maxsize=16384)
def split_key(key: str) -> tuple[str, str] | None:
    """Return the module's name and the slot of `key`, or None when its end is no known slot; the longest end counts."""
    for count in range(_MOST_PARTS, 0, -1):
        name, *parts = key.rsplit(".", count)
        slot = _slot(".".join(parts)) if name and len(parts) == count else None
        if slot:
            return name, slot
    name, _, end = key.rpartition(".")
    return (name, end) if name and end in foreign() else None


@lru_cache(maxsize=4096)
def _slot(end: str) -> str | None:
    """Return the slot that this end of a key stands for. Models have few ends like `to_k.lora_A.weight`."""
    found = _END.fullmatch(end)
    return found.lastgroup if found else None


@cache
def foreign() -> dict[str, str]:
    """Return slot -> kind of the algorithms that other packages have; they are imported, and torch with them.

    Raises `ConfigError` for a slot that another kind has, or an algorithm that is not called as it is registered.
    """
    found: dict[str, str] = {}
    for kind in ALGORITHMS.others:
        if ALGORITHMS[kind].name != kind:
            raise ConfigError(f"algorithm '{kind}' calls itself '{ALGORITHMS[kind].name}': it needs one name")
        for slot in sorted(ALGORITHMS[kind].slots):
            if slot in _NAMED or slot in found or not slot.isidentifier():
                raise ConfigError(f"algorithm '{kind}': its slot '{slot}' is another kind's, or no name: rename it")
            found[slot] = kind
    return found


def kind_of(slots: Collection[str]) -> str:
    """Return the kind of a module with these slots, 'unknown' when none fits or several do."""
    own = set(slots) - COMMON
    if not own and BIASES.keys() & set(slots):
        return "norm" if "b_norm" in slots else "full"
    if any(slot.startswith("oft_blocks.") for slot in own):
        return "oft of several blocks"  # sd-scripts' OFT of a fused layer
    kinds = [kind for kind, members in KINDS.items() if own and own <= set(members)]
    if kinds:
        return kinds[0]
    others = {foreign().get(slot) for slot in own}
    return (others.pop() if len(others) == 1 else None) or "unknown"


def missing_slots(kind: str, slots: Iterable[str]) -> list[str]:
    """Return the slots without which a module of this kind means nothing, as its nearest complete form lacks them."""
    have = set(slots)
    sparse = frozenset(_SPARSE if have.intersection(_SPARSE) else ())
    lacking = [sorted((needed | sparse) - have) for needed in REQUIRED.get(kind, ())]
    return min(lacking, key=len, default=[])
