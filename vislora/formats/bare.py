"""Files without any prefix: only the dotted names of one model's layers, of the original tree or the reference one.

    double_blocks.0.img_attn.qkv.lora_A.weight               (rank, in)   BFL's control LoRAs, OneTrainer (ORIGINAL)
    transformer_blocks.0.attn.to_q.lora_B.weight             (out, rank)  diffusers' save_lora_adapter, DiffSynth
    double_blocks.0.img_attn.norm.key_norm.scale             (head,)      a whole new weight, in BFL's control LoRAs

Alpha comes from `.alpha` keys, or from the header's config (of save_lora_adapter), else it is the rank. Only read:
which model a file is for is said better by `comfy` and `diffusers` files.
"""

from __future__ import annotations

import re

from vislora.formats.contract import Format
from vislora.formats.dotted import Named, at_denoiser
from vislora.formats.names import FOLDERS, canonical, component_of, flat_prefix
from vislora.formats.names.text import CLIP, T5
from vislora.formats.parsed import ParsedModule, Part, collect, module_of
from vislora.formats.peft_config import apply_config, prepared, read_metadata
from vislora.formats.slots import COMMON, split_key

# what other formats, and files that are no adapters, begin with
_ELSEWHERE = (*FOLDERS, "diffusion_model", "text_encoders", "base_model", "bundle_emb", "model", "_aux")
_CASCADE = "lora_prior_"
_NORM = re.compile(r"((?:double|single)_blocks\.\d+\.(?:.+\.)?(?:query|key)_norm)\.scale")


def claims(key: str) -> bool:
    """Say whether a key is a name without a known prefix and a slot, or a norm's weight of BFL's."""
    if key.partition(".")[0] in _ELSEWHERE or flat_prefix(key) is not None or key.startswith(_CASCADE):
        return False
    found = split_key(key)
    return found[1] != "weight" if found else _NORM.fullmatch(key) is not None


def parse(part: Part, keys: list[str]) -> list[ParsedModule]:
    """Resolve dotted names by table. A file without any slot of an adapter, such as a checkpoint, gives nothing."""
    # a model's own weights may be called alpha too
    groups = {name: slots for name, slots in collect(part, keys).items() if not slots.keys() <= COMMON}
    if not groups:
        return []
    norms = {found[1]: found[0] for found in map(_NORM.fullmatch, keys) if found}
    groups.update({name: {"set_weight": key} for name, key in norms.items()})
    said = read_metadata(part.header.metadata).get("")
    config = None if said is None else prepared(said)
    denoiser, text = [], []
    for name, slots in groups.items():
        module = module_of(part, name, slots)
        if config is not None:
            apply_config(module, name, config)
        if CLIP.knows(canonical(name)) or T5.knows(name):
            module.component = component_of("", name)
            module.path = canonical(name)
            text.append(module)
        else:
            module.component = "denoiser"
            denoiser.append((module, name))
    _note_wide_inputs(denoiser)
    found = at_denoiser(denoiser, part.header.metadata, {module.component for module in text}) + text
    return [module for module in found if module.path is not None or module.algo != "unknown"]


def _note_wide_inputs(named: Named) -> None:
    """Say of a control LoRA that it needs a base whose first layer takes the control image's channels as well."""
    for module, name in named:
        if name == "img_in" and module.inputs == 128:
            module.notes.append("'img_in' has 128 inputs: it is for a base whose 64 were widened for a control image")


BARE = Format(
    name="bare",
    about="no prefix at all: BFL's control LoRAs, OneTrainer's ORIGINAL, diffusers' save_lora_adapter",
    container="file",
    claims=claims,
    parse=parse,
)
