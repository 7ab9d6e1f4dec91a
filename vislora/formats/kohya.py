"""kohya-ss/sd-scripts files: flat layer names, `.alpha` per module. Also reads LyCORIS' `lycoris_` names.

    lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight   (rank, in)
    lora_te_text_model_encoder_layers_0_mlp_fc1.alpha                                       ()

Spec: sd-scripts networks/lora.py (SD), networks/lora_sd3.py (SD3: the original names, q, k and v fused).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from vislora.errors import AdapterFileError
from vislora.formats.contract import Format, Packed, Stored
from vislora.formats.cutting import parts
from vislora.formats.names import FAMILY_NAMES, FLAT_DENOISERS, FamilyNames, Place, choose, find_text, flat_prefix
from vislora.formats.names.hints import family_in_metadata
from vislora.formats.parsed import ParsedModule, Part, collect, module_of
from vislora.formats.slots import CORES, KOHYA_SUFFIXES

if TYPE_CHECKING:
    from torch import Tensor

    from vislora.formats.adapter_file import AdapterModule

LYCORIS_NAMES = {"oft": "diag-oft"}
"""What LyCORIS calls a kind, where that is another name."""
# what diffusers' loader reads instead of alpha; beside `.alpha` keys it would be an error there
NOT_KEPT = ("lora_adapter_metadata",)


def claims(key: str) -> bool:
    """Say whether a key is a flat name and a slot: `lora_unet_..._to_k.lora_down.weight`."""
    return flat_prefix(key) is not None and "." in key


def parse(part: Part, keys: list[str]) -> list[ParsedModule]:
    """Resolve flat names by table; a fused layer becomes one module per member, its tensors shared or cut by rows."""
    modules = [module_of(part, raw_name, slots) for raw_name, slots in collect(part, keys).items()]
    bare = {module.raw_name: _bare(module.raw_name) for module in modules if _is_denoiser(module.raw_name)}
    inputs = {bare[module.raw_name]: module.inputs for module in modules if module.raw_name in bare}
    texts = {text[0] for module in modules if (text := find_text(module.raw_name))}
    hint = family_in_metadata(part.header.metadata)
    family, order = choose(inputs, flat=True, hint=hint, components=texts) if inputs else (None, [])
    found: list[ParsedModule] = []
    for module in modules:
        _read_zero_alpha(module)
        name = bare.get(module.raw_name)
        found += _at_text_encoder(module) if name is None else _at_denoiser(module, name, family, order)
    return found


def _is_denoiser(raw_name: str) -> bool:
    return flat_prefix(raw_name) in FLAT_DENOISERS


def _bare(raw_name: str) -> str:
    """Strip the prefix; Wan-Fun's files, written by kohya_ss, have a second underscore after it."""
    return raw_name.removeprefix(flat_prefix(raw_name) or "").removeprefix("_")


def _at_denoiser(module: ParsedModule, name: str, family: str | None, order: list[FamilyNames]) -> list[ParsedModule]:
    module.component = "denoiser"
    for names in order:
        leads = names.tables["denoiser"].find_flat(name)
        if leads:
            module.family = family
            return parts(module, leads)
    return [module]


def _at_text_encoder(module: ParsedModule) -> list[ParsedModule]:
    found = find_text(module.raw_name)
    if found is None:
        module.component = f"unknown:{(flat_prefix(module.raw_name) or '').rstrip('_')}"
        return [module]
    module.component, leads = found
    return parts(module, leads)


def place(component: str, path: str, family: str | None) -> Place | None:
    """Return the flat name of a path: `lora_unet_joint_blocks_0_x_block_attn_qkv`, part 0 of 3."""
    names = FAMILY_NAMES.get(family or "")
    if names is None or component not in names.tables or component not in names.flat_prefixes:
        return None
    found = names.tables[component].place(path)
    if found is None:
        return None
    if component == "denoiser" and names.flat_from == "path":
        found = Place(path)
    return replace(found, name=names.flat_prefixes[component] + found.name.replace(".", "_"))


def whole(component: str, stored: str, family: str | None) -> str | None:
    """Return the flat name of a layer of the original tree, for a module that stays whole."""
    names = FAMILY_NAMES.get(family or "")
    if names is None or component not in names.tables or (component == "denoiser" and names.flat_from == "path"):
        return None
    if not names.tables[component].find_dotted(stored):
        return None
    return names.flat_prefixes[component] + stored.replace(".", "_")


def pack(modules: list[Stored], family: str | None, metadata: dict[str, str]) -> list[Packed]:
    """Write the slots and an `.alpha` for every module, so that alpha / rank is the scale; metadata verbatim."""
    tensors: dict[str, Tensor | float] = {}
    for module in modules:
        tensors.update(entries(module, KOHYA_SUFFIXES))
    kept = {key: value for key, value in metadata.items() if key not in NOT_KEPT}
    return [Packed(tensors, {**_fresh_metadata(modules, family, kept), **kept})]


def entries(module: Stored, suffixes: Mapping[str, str]) -> dict[str, Tensor | float]:
    """Return the tensors of `module` under its name: slots with these suffixes, magnitude, bias and alpha.

    A slot without a suffix is of another package's algorithm, and stands under its own name.
    """
    found: dict[str, Tensor | float] = {
        f"{module.name}.{suffixes.get(slot, slot)}": tensor for slot, tensor in module.tensors.items()
    }
    if module.magnitude is not None:
        found[f"{module.name}.dora_scale"] = _dora_scale(module, module.magnitude)
    if module.bias is not None:
        found[f"{module.name}.{'b_norm' if module.algo == 'norm' else suffixes['bias']}"] = module.bias
    alpha = _written_alpha(module)
    if alpha is not None:
        found[f"{module.name}.alpha"] = alpha
    return found


def _written_alpha(module: Stored) -> float | None:
    """Return alpha so that alpha / rank is the scale; an infinite one, where none counts, as the rank."""
    if module.alpha is None:
        return None
    if module.rule == "own" and not abs(module.alpha) < float("inf"):
        return float(module.rank)
    return module.alpha * module.rank**0.5 if module.rule == "alpha/sqrt(r)" else module.alpha


def _dora_scale(module: Stored, magnitude: Tensor) -> Tensor:
    """Give the magnitude the axes of the weight where the slots tell them, else those that it came with."""
    if "up" not in module.tensors:
        return magnitude.reshape(-1, 1) if magnitude.dim() == 1 and module.magnitude_axis == "out" else magnitude
    ones = [1] * (module.tensors["up"].dim() - 1)
    return magnitude.reshape((-1, *ones) if module.magnitude_axis == "out" else (1, -1, *ones[1:]))


def _read_zero_alpha(module: ParsedModule) -> None:
    """Read alpha 0 as rank, which is what kohya's and LyCORIS' own loaders do (sd-scripts networks/lora.py)."""
    if module.alpha == 0.0:
        module.alpha = None
        module.notes.append(f"alpha 0 of '{module.raw_name}' is read as the rank, as kohya's loader does")
    constraint = module.refs.get("alpha")
    if constraint and module.raw_name.startswith("oft_unet_") and constraint.part.scalar(constraint.key) == 0.0:
        # LyCORIS has no limit then, sd-scripts a limit of nothing
        raise AdapterFileError(
            f"'{module.raw_name}' has the constraint (alpha) 0: such an OFT of sd-scripts does nothing"
        )


def network_keys(modules: Sequence[AdapterModule | Stored], family: str | None) -> dict[str, str]:
    """Return sd-scripts' keys of what the modules are: `ss_network_module`, `_dim`, `_alpha` and `_args`.

    Where no module has a scale there is neither rank nor alpha.
    """
    scaled = [module for module in modules if module.rule != "own"]
    dim = _one({str(module.rank) for module in scaled})
    alpha = _one({str(float(module.rank if module.alpha is None else module.alpha)) for module in scaled})
    sizes = {"ss_network_dim": dim, "ss_network_alpha": alpha} if scaled else {}
    names = FAMILY_NAMES.get(family or "")
    own = names.network_module if names else FamilyNames.network_module
    arguments = {"conv_dim": dim, "conv_alpha": alpha} if any(_has_kernel(module) for module in modules) else {}
    plain = all(
        module.tensors.keys() == {"down", "up"} and module.magnitude is module.bias is None for module in modules
    )
    return {
        "ss_network_module": own if plain else "lycoris.kohya",
        **sizes,
        "ss_network_args": json.dumps(arguments if plain else {**arguments, **_lycoris_arguments(modules)}),
    }


def _one(found: set[str]) -> str:
    """Return the one value that there is, "Dynamic" when there are several, as sd-scripts and LyCORIS say it."""
    return min(found) if len(found) == 1 else "Dynamic"


def _has_kernel(module: AdapterModule | Stored) -> bool:
    """Say whether this is LoRA on a conv that is larger than 1 x 1, which has a rank of its own in sd-scripts."""
    return "down" in module.tensors and any(size > 1 for size in module.tensors["down"].shape[2:])


def _lycoris_arguments(modules: Sequence[AdapterModule | Stored]) -> dict[str, str]:
    """Return LyCORIS' settings for modules like these; no algorithm where there are several."""
    kinds = {module.algo for module in modules}
    axes = {module.magnitude_axis for module in modules if module.magnitude is not None}
    found = {"algo": LYCORIS_NAMES.get(min(kinds), min(kinds))} if len(kinds) == 1 else {}
    if any(CORES & module.tensors.keys() for module in modules):
        found["use_tucker"] = "True"
    return {**found, "dora_wd": "True", "wd_on_output": str(axes == {"out"})} if axes else found


def _fresh_metadata(modules: list[Stored], family: str | None, kept: Mapping[str, str]) -> dict[str, str]:
    """Return the keys that kohya's tools look for, for an adapter that has none of them."""
    if any(key.startswith("ss_") for key in kept):
        return {}
    fresh = {**network_keys(modules, family), "sshs_model_hash": "", "sshs_legacy_hash": ""}
    names = FAMILY_NAMES.get(family or "")
    if names and names.versions:
        fresh["ss_base_model_version"] = names.versions[0]
    return fresh


KOHYA = Format(
    name="kohya",
    about="sd-scripts and LyCORIS; read by web interfaces and ComfyUI",
    container="file",
    claims=claims,
    parse=parse,
    place=place,
    whole=whole,
    suffixes=KOHYA_SUFFIXES,
    foreign=True,
    pack=pack,
    zero_alpha="rank",
    magnitudes="any",
    embeddings=True,
)
