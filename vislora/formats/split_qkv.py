"""Files of sd-scripts' option `split_qkv`: parts of a fused layer trained apart, stored with too small a scale.

    lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight   (9216, 3 rank), block-diagonal; its alpha is that of rank

Such a layer has three (linear1: four) times the rank of the others and the same alpha, so that alpha / rank, which
every program computes, is a third (a quarter) of what it was trained with: kohya-ss/sd-scripts issue 2204. This is told
and not mended.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from vislora.formats.adapter_file import AdapterModule


def split_notes(modules: Iterable[AdapterModule]) -> list[str]:
    """Return a note for the fused layers that are block-diagonal and weaker than the other layers by their parts."""
    plain = [module for module in modules if set(module.tensors) == {"down", "up"} and not module.unsupported]
    groups: dict[str, list[AdapterModule]] = {}
    for module in plain:
        if module.group:
            groups.setdefault(module.raw_name, []).append(module)
    scales = Counter(module.scale for module in plain if not module.group and module.component == "denoiser")
    usual = scales.most_common(1)[0][0] if scales else 0.0
    weak: dict[int, list[str]] = {}
    for name, members in groups.items():
        if math.isclose(members[0].scale * len(members), usual) and is_block_diagonal(members):
            weak.setdefault(len(members), []).append(name)
    return [
        f"{len(names)} fused layers have 1/{parts} of the other layers' scale, and {parts} parts that were trained "
        f"apart: sd-scripts' split_qkv saves them too weak (its issue 2204); they are read as they stand, as every "
        f"program does (first: {names[0]})"
        for parts, names in weak.items()
    ]


def is_block_diagonal(members: Sequence[AdapterModule]) -> bool:
    """Say whether each member of a fused layer uses its own equal share of the rank, and nothing of the others'."""
    rank, count = members[0].rank, len(members)
    if count < 2 or rank % count:
        return False
    width = rank // count
    for index, member in enumerate(members):
        up = member.tensors["up"]
        before, after = up[:, : index * width], up[:, (index + 1) * width :]
        if before[0].any() or after[0].any() or before.any() or after.any():  # one row tells mostly
            return False
    return True
