"""Alpha, rank and scale rule as PEFT writes them down: one `LoraConfig` in JSON per component. Torch-free.

    {"r": 4, "lora_alpha": 8, "rank_pattern": {"^mid_block.attentions.0.proj_in": 8}, "alpha_pattern": {"to_k": 2}}

A pattern is a regular expression; the first that matches wins: `re.match(rf"(.*\\.)?({pattern})$", path)`
(peft/utils/other.py, get_pattern_key).
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from typing import Any

from vislora.errors import AdapterFileError
from vislora.formats.parsed import ParsedModule
from vislora.formats.patterns import Patterns

METADATA_KEY = "lora_adapter_metadata"
# in the header of adapter_model.safetensors, which PEFT does not look at: a lone folder does not say what it is for
COMPONENT_KEY = "vislora.component"


def read_metadata(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Split diffusers' `lora_adapter_metadata` by component: `{"unet.r": 4}` -> `{"unet": {"r": 4}}`.

    What a model itself saved (diffusers' save_lora_adapter) has no component there: `{"r": 4}` -> `{"": {"r": 4}}`.
    """
    if METADATA_KEY not in metadata:
        return {}
    try:
        packed = json.loads(metadata[METADATA_KEY])
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"the metadata '{METADATA_KEY}' is not valid JSON: {error}") from error
    if not isinstance(packed, dict):
        raise AdapterFileError(f"the metadata '{METADATA_KEY}' should be a JSON object")
    configs: dict[str, dict[str, Any]] = {}
    for key, value in packed.items():
        folder, _, name = key.rpartition(".")
        configs.setdefault(folder, {})[name] = value
    return configs


def write_metadata(configs: Mapping[str, Mapping[str, Any]]) -> str:
    """Do the reverse of `read_metadata`."""
    packed = {f"{folder}.{name}": value for folder, config in configs.items() for name, value in config.items()}
    return json.dumps(packed, indent=2, sort_keys=True)


def prepared(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config for `apply_config`: its patterns are read once, not for every module."""
    return {**config, **{name: _patterns(config, name) for name in ("rank_pattern", "alpha_pattern")}}


def apply_config(module: ParsedModule, path: str, config: Mapping[str, Any]) -> None:
    """Give `module` the alpha and the rule that a `prepared` config has for `path`.

    Raises `AdapterFileError` for a bad value.
    """
    if module.algo == "oft_peft":
        module.numbers = oft_numbers(config)
        return
    default = config.get("alpha" if config.get("peft_type") in ("LOHA", "LOKR") else "lora_alpha")
    spellings = {path, path.removeprefix("text_model.")}
    alpha = config["alpha_pattern"].find(spellings, default)
    if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, (int, float))):
        raise AdapterFileError(f"the config's alpha of '{path}' should be a number, it is {alpha!r}")
    rank = config["rank_pattern"].find(spellings, config.get("r"))
    shape = module.refs["down"].shape if "down" in module.refs else ()
    if isinstance(rank, int) and shape and rank != shape[0]:
        module.notes.append(f"the config says rank {rank} for '{path}', its tensors have rank {shape[0]}: they decide")
    module.alpha = module.alpha if alpha is None else _as_float(alpha)
    module.rule = "alpha/sqrt(r)" if config.get("use_rslora") else "alpha/r"
    if {"lokr_w1", "lokr_w2"} <= module.refs.keys():
        _scale_full_factors(module, path, rank)


def _scale_full_factors(module: ParsedModule, path: str, rank: Any) -> None:
    """Give two full factors of LoKr the scale alpha / r, which PEFT alone applies to them; their tensors tell no r."""
    if module.alpha is None:
        return
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise AdapterFileError(f"the config's rank of '{path}' should be a number above 0, it is {rank!r}")
    scale = module.alpha / _as_float(rank)
    module.alpha, module.rule = (None, "alpha/r") if scale == 1.0 else (scale, "scale")


def oft_numbers(config: Mapping[str, Any]) -> dict[str, float]:
    """Return what a config says of OFT's rotations: the terms of the series (PEFT's default: 5), the limit of COFT."""
    found: dict[str, float] = {}
    if config.get("use_cayley_neumann", True):
        found["neumann_terms"] = config.get("num_cayley_neumann_terms", 5)
    if config.get("coft"):
        found["eps"] = config.get("eps", 6e-5)
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise AdapterFileError(f"the config's {name} should be a number, it is {value!r}")
    return found


def _as_float(number: float) -> float:
    """Return a number as a float; whole numbers of JSON can be larger than any."""
    if isinstance(number, int) and abs(number) > sys.float_info.max:
        return math.inf if number > 0 else -math.inf
    return float(number)


def _patterns(config: Mapping[str, Any], name: str) -> Patterns:
    values = config.get(name) or {}
    if not isinstance(values, dict):
        raise AdapterFileError(f"the config's {name} should map patterns to numbers, it is {values!r}")
    return Patterns(values)
