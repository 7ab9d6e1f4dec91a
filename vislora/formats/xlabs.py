"""XLabs' LoRAs for FLUX.1: attention processors with a LoRA of their own, as diffusers had them in 2023.

    double_blocks.0.processor.qkv_lora1.down.weight    (rank, 3072)   1: image, 2: text
    single_blocks.0.processor.qkv_lora.up.weight       (9216, rank)   the first 3 * 3072 of the 7 * 3072 rows of linear1

There is no alpha. Spec: diffusers loaders/lora_conversion_utils.py, the conversion of XLabs' files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from vislora.formats.contract import Format
from vislora.formats.cutting import parts
from vislora.formats.names import FAMILY_NAMES, Found, Share
from vislora.formats.parsed import ParsedModule, Part, module_of

_KEY = re.compile(
    r"(?P<name>(?:diffusion_model\.)?(?P<block>(?:double|single)_blocks\.\d+)\.processor\.(?P<layer>\w+_lora[12]?))"
    r"\.(?P<half>down|up)\.weight"
)
_LAYERS = {
    ("double", "qkv_lora1"): "img_attn.qkv",
    ("double", "qkv_lora2"): "txt_attn.qkv",
    ("double", "proj_lora1"): "img_attn.proj",
    ("double", "proj_lora2"): "txt_attn.proj",
    ("single", "qkv_lora"): "linear1",
    ("single", "proj_lora"): "linear2",
}


def claims(key: str) -> bool:
    """Say whether a key is one of a processor's six layers, and one half of a LoRA."""
    found = _KEY.fullmatch(key)
    return found is not None and _layer(found) is not None


def parse(part: Part, keys: list[str]) -> list[ParsedModule]:
    """Find the layer that each LoRA is for; q, k and v are cut by rows."""
    groups: dict[str, dict[str, str]] = {}
    layers: dict[str, str] = {}
    for key in keys:
        found = _KEY.fullmatch(key)
        if found is not None:
            groups.setdefault(found["name"], {})[found["half"]] = key
            layers[found["name"]] = f"{found['block']}.{_layer(found)}"
    modules = []
    for name, slots in groups.items():
        module = module_of(part, name, slots)
        module.component, module.family = "denoiser", "flux"
        modules += parts(module, _leads(layers[name]))
    return modules


def _layer(found: re.Match[str]) -> str | None:
    return _LAYERS.get((found["block"].partition("_")[0], found["layer"]))


def _leads(name: str) -> Sequence[Found]:
    """Return where a layer leads; of a fused one q, k and v alone."""
    leads = FAMILY_NAMES["flux"].tables["denoiser"].find_dotted(name)
    if len(leads) == 1:
        return leads
    return [replace(lead, part=Share(index, (1, 1, 1))) for index, lead in enumerate(leads[:3])]


XLABS = Format(
    name="xlabs",
    about="XLabs' LoRAs for FLUX.1",
    container="file",
    claims=claims,
    parse=parse,
)
