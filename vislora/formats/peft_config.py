"""Alpha, rank and scale rule as PEFT writes them down: one `LoraConfig` in JSON per component. Torch-free.

    {"r": 4, "lora_alpha": 8, "rank_pattern": {"^mid_block.attentions.0.proj_in": 8}, "alpha_pattern": {"to_k": 2}}

A pattern is a regular expression; the first that matches wins: `re.match(rf"(.*\\.)?({pattern})$", path)`
(peft/utils/other.py, get_pattern_key).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from vislora.errors import AdapterFileError
from vislora.formats.contract import Stored
from vislora.formats.parsed import ParsedModule
from vislora.formats.slots import PEFT_SUFFIXES

if TYPE_CHECKING:
    from torch import Tensor

METADATA_KEY = "lora_adapter_metadata"
# in the header of adapter_model.safetensors, which PEFT does not look at: a lone folder does not say what it is for
COMPONENT_KEY = "vislora.component"
LONGEST_PATTERN = 500
DEFAULTS = {"peft_type": "LORA", "task_type": None, "bias": "none", "inference_mode": True, "lora_dropout": 0.0}


def read_metadata(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Split diffusers' `lora_adapter_metadata` by component: `{"unet.r": 4}` -> `{"unet": {"r": 4}}`."""
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
        folder, _, name = key.partition(".")
        configs.setdefault(folder, {})[name] = value
    return configs


def write_metadata(configs: Mapping[str, Mapping[str, Any]]) -> str:
    """Do the reverse of `read_metadata`."""
    packed = {f"{folder}.{name}": value for folder, config in configs.items() for name, value in config.items()}
    return json.dumps(packed, indent=2, sort_keys=True)


def apply_config(module: ParsedModule, path: str, config: Mapping[str, Any]) -> None:
    """Give `module` the alpha and the rule that a config has for `path`. Raises `AdapterFileError` for a bad value."""
    default = config.get("alpha" if config.get("peft_type") in ("LOHA", "LOKR") else "lora_alpha")
    alpha = _pattern_value(config.get("alpha_pattern"), path, default, "alpha_pattern")
    if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, (int, float))):
        raise AdapterFileError(f"the config's alpha of '{path}' should be a number, it is {alpha!r}")
    rank = _pattern_value(config.get("rank_pattern"), path, config.get("r"), "rank_pattern")
    shape = module.refs["down"].shape if "down" in module.refs else ()
    if isinstance(rank, int) and shape and rank != shape[0]:
        module.notes.append(f"the config says rank {rank} for '{path}', its tensors have rank {shape[0]}: they decide")
    module.alpha = module.alpha if alpha is None else float(alpha)
    module.rule = "alpha/sqrt(r)" if config.get("use_rslora") else "alpha/r"


def entries(module: Stored, name: str) -> dict[str, Tensor]:
    """Return the tensors of `module` under PEFT's keys, which begin with `name`.

    The magnitude is (out,) for a linear layer, (1, out, 1, 1) for a conv.
    """
    found = {f"{name}.{PEFT_SUFFIXES[slot]}": tensor for slot, tensor in module.tensors.items()}
    if module.magnitude is not None:
        ones = module.tensors["up"].dim() - 2
        found[f"{name}.lora_magnitude_vector"] = module.magnitude.reshape((1, -1, *[1] * ones) if ones else (-1,))
    return found


def make_config(modules: Iterable[Stored], paths: Mapping[str, str], base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the LoraConfig of one component, `base` with r, lora_alpha and their patterns made exact.

    `paths`: name of a module -> its path in the module tree. The commonest rank and alpha are the default.
    """
    modules = list(modules)
    roots = all(module.rule == "alpha/sqrt(r)" for module in modules)
    ranks = {paths[module.name]: module.rank for module in modules}
    alphas = {paths[module.name]: _alpha(module, roots) for module in modules}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        **DEFAULTS,
        **base,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_anchored(path): value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {_anchored(path): value for path, value in alphas.items() if value != alpha},
        "target_modules": sorted(path.removeprefix("text_model.") for path in ranks),
        "use_rslora": roots,
        "use_dora": any(module.magnitude is not None for module in modules),
        "lora_bias": False,
    }


def _anchored(path: str) -> str:
    """Anchor a path as diffusers does; a CLIP's `text_model.` is there or not, as its transformers version has it."""
    return path.removeprefix("text_model.") if path.startswith("text_model.") else f"^{path}"


def _alpha(module: Stored, roots: bool) -> int | float:
    plain = module.rule == "alpha/sqrt(r)" and not roots
    alpha = module.alpha * module.rank**0.5 if plain else module.alpha
    return int(alpha) if float(alpha).is_integer() else alpha


def _pattern_value(patterns: Any, path: str, default: Any, name: str) -> Any:
    if patterns is None:
        return default
    if not isinstance(patterns, dict):
        raise AdapterFileError(f"the config's {name} should map patterns to numbers, it is {patterns!r}")
    spellings = {path, path.removeprefix("text_model.")}
    for pattern, value in patterns.items():
        if any(_matches(pattern, spelling) for spelling in spellings):
            return value
    return default


def _matches(pattern: str, path: str) -> bool:
    if pattern.lstrip("^") == path:
        return True
    if len(pattern) > LONGEST_PATTERN:
        raise AdapterFileError(
            f"a pattern of the config is longer than {LONGEST_PATTERN} characters: {pattern[:60]}..."
        )
    try:
        return re.match(rf"(.*\.)?({pattern})$", path) is not None
    except re.error as error:
        raise AdapterFileError(f"the config's pattern '{pattern}' is no regular expression: {error}") from error
