"""kohya-ss/sd-scripts files: flat layer names, `.alpha` per module. Also reads LyCORIS' `lycoris_` names.

    lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight   (rank, in)
    lora_te_text_model_encoder_layers_0_mlp_fc1.alpha                                       ()

Spec: sd-scripts networks/lora.py (SD), networks/lora_sd3.py (SD3: the original names, q, k and v fused).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from vislora.errors import AdapterFileError
from vislora.formats.contract import Format, Packed, Stored
from vislora.formats.names import FAMILY_NAMES, Found, Place, find_flat, flat_prefix
from vislora.formats.parsed import ParsedModule, Part, Ref, Slice, collect, module_of
from vislora.formats.slots import KOHYA_SUFFIXES

if TYPE_CHECKING:
    from torch import Tensor

# slots whose rows are the layer's outputs, per kind: the only kinds that can be cut out of a fused layer
ROW_SLOTS = {"lora": "up", "full": "diff"}
COMPONENTS = {
    "lora_unet_": "denoiser",
    "lora_transformer_": "denoiser",
    "lycoris_": "denoiser",
    "lora_te_": "te:clip_l",
    "lora_te1_": "te:clip_l",
    "lora_te2_": "te:clip_g",
    "lora_te3_": "te:t5",
}
BASE_VERSIONS = {"sd": "sd_v1", "sd3": "sd3_medium"}
# what diffusers' loader reads instead of alpha; beside `.alpha` keys it would be an error there
NOT_KEPT = ("lora_adapter_metadata",)


def claims(key: str) -> bool:
    """Say whether a key is a flat name and a slot: `lora_unet_..._to_k.lora_down.weight`."""
    return flat_prefix(key) is not None and "." in key


def parse(part: Part, keys: list[str]) -> list[ParsedModule]:
    """Resolve flat names by table; a fused layer becomes one module per member, its tensors shared or cut by rows."""
    modules: list[ParsedModule] = []
    for raw_name, slots in collect(part, keys).items():
        module = module_of(part, raw_name, slots)
        _read_zero_alpha(module)
        found = find_flat(raw_name)
        if found is None:
            prefix = flat_prefix(raw_name) or ""
            module.component = COMPONENTS.get(prefix, f"unknown:{prefix.rstrip('_')}")
            modules.append(module)
            continue
        names, module.component, leads = found
        module.family = names.family
        modules.extend(_resolved(module, lead) for lead in leads)
    return modules


def place(component: str, path: str, family: str | None) -> Place | None:
    """Return the flat name of a path: `lora_unet_joint_blocks_0_x_block_attn_qkv`, part 0 of 3."""
    names = FAMILY_NAMES.get(family or "")
    if names is None or component not in names.tables:
        return None
    found = names.tables[component].place(path)
    if found is None:
        return None
    return replace(found, name=names.flat_prefixes[component] + found.name.replace(".", "_"))


def pack(modules: list[Stored], family: str | None, metadata: dict[str, str]) -> list[Packed]:
    """Write the slots and an `.alpha` for every module, so that alpha / rank is the scale; metadata verbatim."""
    tensors: dict[str, Tensor | float] = {}
    for module in modules:
        for slot, tensor in module.tensors.items():
            tensors[f"{module.name}.{KOHYA.suffixes[slot]}"] = tensor
        if module.magnitude is not None:
            tensors[f"{module.name}.dora_scale"] = _dora_scale(module, module.magnitude)
        root = module.rule == "alpha/sqrt(r)"
        tensors[f"{module.name}.alpha"] = module.alpha * module.rank**0.5 if root else module.alpha
    kept = {key: value for key, value in metadata.items() if key not in NOT_KEPT}
    return [Packed(tensors, {**_fresh_metadata(modules, family, kept), **kept})]


def _dora_scale(module: Stored, magnitude: Tensor) -> Tensor:
    """Give the magnitude the axes of the weight where the slots tell them, else those that it came with."""
    if "up" not in module.tensors:
        return magnitude
    ones = [1] * (module.tensors["up"].dim() - 1)
    return magnitude.reshape((-1, *ones) if module.magnitude_axis == "out" else (1, -1, *ones[1:]))


def _read_zero_alpha(module: ParsedModule) -> None:
    """Read alpha 0 as rank, which is what kohya's and LyCORIS' own loaders do (sd-scripts networks/lora.py)."""
    if module.alpha == 0.0:
        module.alpha = None
        module.notes.append(f"alpha 0 of '{module.raw_name}' is read as the rank, as kohya's loader does")


def _resolved(module: ParsedModule, lead: Found) -> ParsedModule:
    """Return `module` at the path where its name leads, its output rows cut or swapped as the reference tree has it."""
    if lead.part is None and not _swapped(module, lead):
        return replace(module, path=lead.path)
    slot = ROW_SLOTS.get(module.algo)
    if slot is None or (lead.part is not None and module.magnitude_axis == "in"):
        note = f"'{module.raw_name}' fuses or reorders layers and its kind '{module.algo}' cannot be cut by rows"
        return replace(module, notes=[*module.notes, note])
    total = module.refs[slot].shape[0] if slot in module.refs and module.refs[slot].shape else 0
    index, count = lead.part or (0, 2)
    if total == 0 or total % count:
        raise AdapterFileError(
            f"'{module.raw_name}' should have {count} equal groups of output rows, it has {total} rows"
        )
    step = total // count
    rows = [(index * step, (index + 1) * step)] if lead.part else [(step, total), (0, step)]
    cut = {name: ref.taking(*rows) if name == slot else ref for name, ref in module.refs.items()}
    bias = module.bias.taking(*rows) if module.bias else None
    magnitude = (
        module.magnitude.taking(*rows) if module.magnitude and module.magnitude_axis == "out" else module.magnitude
    )
    target = Slice(0, index * step, step) if lead.part else None
    group = lead.stored if lead.part else None
    return replace(
        module,
        path=lead.path,
        refs=cut,
        bias=bias,
        magnitude=magnitude,
        target=target,
        group=group,
        notes=list(module.notes),
    )


def _swapped(module: ParsedModule, lead: Found) -> bool:
    if lead.swap != "never" and module.algo not in ROW_SLOTS:
        return True  # its slots may not tell the layer's inputs, and its rows could not be exchanged anyway
    return lead.swap == "always" or (lead.swap != "never" and has_two_rows_per_input(module.refs))


def has_two_rows_per_input(refs: Mapping[str, Ref | Tensor]) -> bool:
    """Say whether a layer has twice as many outputs as inputs, by its slots (tensors, or references to them)."""
    if "up" in refs and "down" in refs:
        return len(refs["down"].shape) > 1 and refs["up"].shape[0] == 2 * refs["down"].shape[1]
    diff = refs.get("diff")
    return diff is not None and len(diff.shape) > 1 and diff.shape[0] == 2 * diff.shape[1]


def _fresh_metadata(modules: list[Stored], family: str | None, kept: Mapping[str, str]) -> dict[str, str]:
    """Return the keys that kohya's tools look for, for an adapter that has none of them."""
    if any(key.startswith("ss_") for key in kept):
        return {}
    ranks, alphas = {module.rank for module in modules}, {module.alpha for module in modules}
    kinds = {module.algo for module in modules}
    plain = "networks.lora_sd3" if family == "sd3" else "networks.lora"
    fresh = {
        "ss_network_module": plain if kinds == {"lora"} else "lycoris.kohya",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
        "ss_network_args": json.dumps({"algo": kinds.pop()} if len(kinds) == 1 and kinds != {"lora"} else {}),
        "sshs_model_hash": "",
        "sshs_legacy_hash": "",
    }
    if family in BASE_VERSIONS:
        fresh["ss_base_model_version"] = BASE_VERSIONS[family]
    return fresh


KOHYA = Format(
    name="kohya",
    container="file",
    claims=claims,
    parse=parse,
    place=place,
    suffixes=KOHYA_SUFFIXES,
    pack=pack,
    zero_alpha="rank",
    magnitudes="any",
)
