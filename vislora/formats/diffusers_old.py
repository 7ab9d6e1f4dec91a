"""diffusers' LoRA files of 2023, which are read and no longer written.

    until 0.15: unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight  (rank, in)
                text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.up.weight                     (out, rank)
    then:       unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora.down.weight            (rank, in)
                text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.up.weight               (out, rank)

Spec: diffusers utils/state_dict_utils.py (its tables from these names to PEFT's). `unet.` may be missing, as in what
`save_attn_procs` wrote. Alpha is the rank, unless an `.alpha` key or the header's config says another.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from vislora.formats.contract import Format
from vislora.formats.names import FOLDERS, canonical, component_of
from vislora.formats.parsed import ParsedModule, Part, module_of
from vislora.formats.peft_config import apply_config, prepared, read_metadata

_SLOT = r"\.(?P<slot>down\.weight|up\.weight|alpha)"
_FOLDER = rf"(?:(?P<folder>{'|'.join(FOLDERS)})\.)?"
_OLD = re.compile(rf"(?P<name>{_FOLDER}(?P<owner>.+?)(?:\.processor)?\.(?P<layer>\w+)_lora){_SLOT}")
_MID = re.compile(rf"(?P<name>{_FOLDER}(?P<path>.+)\.(?:lora|lora_linear_layer)){_SLOT}")
_ENDS = (".down.weight", ".up.weight", ".alpha")  # a quick no to all other keys
_SLOTS = {"down.weight": "down", "up.weight": "up", "alpha": "alpha"}
_UNET_LAYERS = {
    "to_q": "to_q",
    "to_k": "to_k",
    "to_v": "to_v",
    "to_out": "to_out.0",
    "add_k_proj": "add_k_proj",
    "add_v_proj": "add_v_proj",
}
_CLIP_LAYERS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
# what may stand at the layer itself, as it does in the files of today
_MAGNITUDES = ("lora_magnitude_vector", "lora_magnitude_vector.weight")

Names = Callable[[re.Match[str]], str | None]


def _old_path(found: re.Match[str]) -> str | None:
    owner = found["owner"]
    layers = _CLIP_LAYERS if owner.endswith("self_attn") else _UNET_LAYERS
    return f"{owner}.{layers[found['layer']]}" if found["layer"] in layers else None


def _mid_path(found: re.Match[str]) -> str | None:
    return found["path"]


def _claims(pattern: re.Pattern[str], path_of: Names, key: str) -> bool:
    """Say whether `key` has this form; without a component in front its path must be one that a table knows."""
    found = pattern.fullmatch(key) if key.endswith(_ENDS) else None
    path = path_of(found) if found else None
    if found is None or path is None:
        return False
    return bool(found["folder"]) or not component_of("", path).startswith("unknown:")


def _parse(pattern: re.Pattern[str], path_of: Names, part: Part, keys: Iterable[str]) -> list[ParsedModule]:
    configs = {folder: prepared(config) for folder, config in read_metadata(part.header.metadata).items()}
    groups: dict[str, dict[str, str]] = {}
    for key in keys:
        found = pattern.fullmatch(key)
        if found is not None:
            groups.setdefault(found["name"], {})[_SLOTS[found["slot"]]] = key
    modules = []
    for raw_name, slots in groups.items():
        found = pattern.fullmatch(f"{raw_name}.alpha")
        path = path_of(found) if found else None
        if found is None or path is None:
            continue
        folder = found["folder"] or ""
        module = module_of(part, raw_name, {**_beside(part, f"{folder}.{path}".lstrip(".")), **slots})
        module.component = component_of(folder, path)
        module.path = canonical(path) if module.component.startswith("te:clip") else path
        if folder in configs:
            apply_config(module, path, configs[folder])
        modules.append(module)
    return modules


def _beside(part: Part, layer: str) -> dict[str, str]:
    """Return the alpha and the magnitude that stand under the layer's own name, `unet....to_q.alpha`."""
    ends = (("alpha", "alpha"), *(("lora_magnitude_vector", end) for end in _MAGNITUDES))
    return {slot: f"{layer}.{end}" for slot, end in ends if f"{layer}.{end}" in part.header.tensors}


def claims_old(key: str) -> bool:
    """Say whether a key is `<path of an attention>.processor.to_q_lora.down.weight`, or a text encoder's like it."""
    return _claims(_OLD, _old_path, key)


def parse_old(part: Part, keys: list[str]) -> list[ParsedModule]:
    """Find the layer that each attention processor was for."""
    return _parse(_OLD, _old_path, part, keys)


def claims_mid(key: str) -> bool:
    """Say whether a key is `<path>.lora.down.weight` or `<path>.lora_linear_layer.down.weight`."""
    return _claims(_MID, _mid_path, key)


def parse_mid(part: Part, keys: list[str]) -> list[ParsedModule]:
    """Take paths as they stand."""
    return _parse(_MID, _mid_path, part, keys)


DIFFUSERS_OLD = Format(
    name="diffusers-old",
    about="diffusers until 0.15: attention processors",
    container="file",
    claims=claims_old,
    parse=parse_old,
)
DIFFUSERS_MID = Format(
    name="diffusers-mid",
    about="diffusers from 0.16 until PEFT's names",
    container="file",
    claims=claims_mid,
    parse=parse_mid,
)
