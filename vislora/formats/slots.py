"""The value kinds of adapter files: from the end of a key to a slot, from a module's slots to its kind.

lora_unet_mid_block_attentions_0_proj_in.lora_down.weight        -> down   (lora)
unet.mid_block.attentions.0.proj_in.lora_A.default.weight        -> down   (lora)
lycoris_mid_block_attentions_0_proj_in.hada_w1_a                 -> hada_w1_a   (loha)
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

PEFT_SUFFIXES = {
    "down": "lora_A.weight",
    "up": "lora_B.weight",
    "embedding_down": "lora_embedding_A",
    "embedding_up": "lora_embedding_B",
}
# slots that sit on top of any kind: they do not decide what a module is
COMMON = frozenset({"alpha", "dora_scale", "lora_magnitude_vector", "bias", "up_bias"})

_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t1", "lokr_t2")
KOHYA_SUFFIXES = {
    "down": "lora_down.weight",
    "up": "lora_up.weight",
    "mid": "lora_mid.weight",
    **{slot: slot for slot in (*_LOHA, *_LOKR)},
}
KINDS: dict[str, tuple[str, ...]] = {
    "lora": ("down", "up", "mid", "embedding_down", "embedding_up"),
    "loha": _LOHA,
    "lokr": _LOKR,
    "full": ("diff",),
    "norm": ("w_norm", "b_norm"),
    "glora": ("a1", "a2", "b1", "b2", "bm"),
    "oft": ("oft_blocks", "oft_diag", "oft_R", "rescale"),
    "ia3": ("weight", "on_input"),
    "sparse_bias": ("bias_indices", "bias_values", "bias_size"),
    "set": ("set_weight", "reshape_weight"),
}
# one of these sets must be complete; kinds that are not listed take any of their slots
REQUIRED: dict[str, tuple[frozenset[str], ...]] = {
    "lora": (frozenset({"down", "up"}), frozenset({"embedding_down", "embedding_up"})),
    "loha": (frozenset(_LOHA[:4]),),
    "lokr": tuple(
        frozenset(first + second)
        for first in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        for second in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
    ),
    "glora": (frozenset({"a1", "a2", "b1", "b2"}),),
}

_SUFFIX_OF_SLOT: dict[str, tuple[str, ...]] = {
    "down": (r"lora_down\.weight", r"lora_A\.(?:[^.]+\.)?weight"),
    "up": (r"lora_up\.weight", r"lora_B\.(?:[^.]+\.)?weight"),
    "mid": (r"lora_mid\.weight",),
    "up_bias": (r"lora_B\.(?:[^.]+\.)?bias",),
    "embedding_down": (r"lora_embedding_A(?:\.[^.]+)?",),
    "embedding_up": (r"lora_embedding_B(?:\.[^.]+)?",),
    "lora_magnitude_vector": (r"lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?",),
    "bias": (r"diff_b",),
    **{slot: (rf"{slot}\.weight",) for slot in ("a1", "a2", "b1", "b2", "bm")},
    "oft_R": (r"oft_R\.(?:[^.]+\.)?weight",),
    "oft_blocks": (r"oft_blocks(?:\.\d+)?",),
}
_PLAIN = (
    "alpha",
    "dora_scale",
    *_LOHA,
    *_LOKR,
    "diff",
    "w_norm",
    "b_norm",
    "oft_diag",
    "rescale",
    "on_input",
    "weight",
)
_MORE = ("bias_indices", "bias_values", "bias_size", "set_weight", "reshape_weight")
_NAMED = {**_SUFFIX_OF_SLOT, **{slot: (slot,) for slot in (*_PLAIN, *_MORE)}}
_KEY = re.compile(
    r"(?P<name>.+?)\.(?:" + "|".join(f"(?P<{slot}>{'|'.join(ends)})" for slot, ends in _NAMED.items()) + r")"
)


def split_key(key: str) -> tuple[str, str] | None:
    """Return the module's name and the slot of `key`, or None when its end is no known slot."""
    found = _KEY.fullmatch(key)
    if found is None or found.lastgroup is None:
        return None
    return found["name"], found.lastgroup


def kind_of(slots: Collection[str]) -> str:
    """Return the kind of a module with these slots, 'unknown' when none fits or several do."""
    own = set(slots) - COMMON
    if not own and "bias" in slots:
        return "full"
    kinds = [kind for kind, members in KINDS.items() if own and own <= set(members)]
    return kinds[0] if kinds else "unknown"


def missing_slots(kind: str, slots: Iterable[str]) -> list[str]:
    """Return the slots without which a module of this kind means nothing, as its nearest complete form lacks them."""
    have = set(slots)
    lacking = [sorted(needed - have) for needed in REQUIRED.get(kind, ())]
    return min(lacking, key=len, default=[])
