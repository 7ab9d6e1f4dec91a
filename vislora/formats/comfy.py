"""ComfyUI's generic files: the original tree's dotted names under `diffusion_model.`, text encoders by their own names.

    diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A.weight                               (rank, in)
    text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.lora_up.weight  (out, rank)

Also written by ai-toolkit, OneTrainer (COMFY) and musubi-tuner. Spec: ComfyUI comfy/lora.py and comfy/weight_adapter.
Both spellings of the slots are read. `lora_A`, `lora_B` and `.alpha` is what most programs read, so it is written; but
diffusers reads FLUX.1 under these names only as `lora_down`, `lora_up`, and ComfyUI a Tucker core only beside them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from vislora.formats.contract import Format, Packed, Stored
from vislora.formats.dotted import at_denoiser
from vislora.formats.kohya import NOT_KEPT, entries
from vislora.formats.names import FAMILY_NAMES, Place, canonical
from vislora.formats.names.text import CLIP, LLM, T5
from vislora.formats.parsed import ParsedModule, Part, collect, inputs_of, module_of
from vislora.formats.slots import KINDS, KOHYA_SUFFIXES, PEFT_SUFFIXES, split_key

if TYPE_CHECKING:
    from torch import Tensor

DENOISER = "diffusion_model."
TEXT = "text_encoders."
# ComfyUI's names of text encoders: those of most families, and by family where it has another
ENCODERS = {"te:clip_l": "clip_l", "te:clip_g": "clip_g", "te:t5": "t5xxl"}
ENCODERS_OF = {
    "wan": {"te:t5": "umt5xxl"},
    "auraflow": {"te:t5": "pile_t5xl"},
    "hidream": {"te:llm": "llama"},
    "anima": {"te:llm": "qwen3_06b"},
}
_WIDTHS_OF_CLIP_H = (1024, 4096)
# without the kind whose key ends in `.weight`, as those of every checkpoint do: ComfyUI does not read it either
_IA3 = KINDS["ia3"]
SUFFIXES = {
    **{slot: end for slot, end in KOHYA_SUFFIXES.items() if slot not in _IA3},
    "down": PEFT_SUFFIXES["down"],
    "up": PEFT_SUFFIXES["up"],
    "set_weight": "set_weight",
}
SPELLED_AS_KOHYA = ("flux",)

_TEXT_NAME = re.compile(r"(?:(?P<encoder>(?!transformer\.)\w+)\.)?(?:transformer\.)?(?P<path>.+)")


def claims(key: str) -> bool:
    """Say whether a key is `diffusion_model.` or `text_encoders.`, a dotted name and a slot."""
    found = split_key(key) if key.startswith((DENOISER, TEXT)) else None
    return found is not None and found[1] != "weight"


def parse(part: Part, keys: list[str]) -> list[ParsedModule]:
    """Resolve dotted names by table; a fused layer becomes one module per member, its tensors shared or cut by rows."""
    denoiser, text = [], []
    for raw_name, slots in collect(part, keys).items():
        module = module_of(part, raw_name, slots)
        if raw_name.startswith(DENOISER):
            module.component = "denoiser"
            denoiser.append((module, raw_name.removeprefix(DENOISER)))
        else:
            text.append(_at_text_encoder(module, raw_name.removeprefix(TEXT)))
    return at_denoiser(denoiser, part.header.metadata, {module.component for module in text}) + text


def _at_text_encoder(module: ParsedModule, name: str) -> ParsedModule:
    """Place `clip_g.transformer.text_model...`; its vocabulary decides, and between CLIPs ComfyUI's name of it."""
    found = _TEXT_NAME.fullmatch(name)
    encoder, path = (found["encoder"] or "", canonical(found["path"])) if found else ("", name)
    if CLIP.knows(path):
        module.component, module.path = "te:clip_g" if encoder == "clip_g" else "te:clip_l", path
    elif T5.knows(path):
        module.component, module.path = "te:t5", path
    elif LLM.find_dotted(path):
        module.component, module.path = "te:llm", LLM.find_dotted(path)[0].path
    else:
        module.component = f"unknown:{encoder or 'text_encoders'}"
    return module


def place(component: str, path: str, family: str | None) -> Place | None:
    """Return the dotted name of a path: `diffusion_model.joint_blocks.0.x_block.attn.qkv`, part 0 of 3."""
    names = FAMILY_NAMES.get(family or "")
    if names is None or component not in names.tables:
        return None
    found = names.tables[component].place(path)
    if component == "denoiser" and found is not None:
        return replace(found, name=DENOISER + found.name)
    encoder = {**ENCODERS, **ENCODERS_OF.get(names.family, {})}.get(component)
    return Place(f"{TEXT}{encoder}.transformer.{path}") if found is not None and encoder else None


def whole(component: str, stored: str, family: str | None) -> str | None:
    """Return the name of a layer of the original tree, for a module that stays whole."""
    names = FAMILY_NAMES.get(family or "")
    known = names is not None and component == "denoiser" and names.tables["denoiser"].find_dotted(stored)
    return DENOISER + stored if known else None


def pack(modules: list[Stored], family: str | None, metadata: dict[str, str]) -> list[Packed]:
    """Write the slots and an `.alpha` for every module, so that alpha / rank is the scale; metadata verbatim."""
    tensors: dict[str, Tensor | float] = {}
    for module in modules:
        if family == "sd" and inputs_of(module.tensors) in _WIDTHS_OF_CLIP_H:  # SD 2 has CLIP-H where SD 1 has CLIP-L
            module.name = module.name.replace(f"{TEXT}clip_l.", f"{TEXT}clip_h.", 1)
        tensors.update(entries(module, _spelling(module, family)))
    return [Packed(tensors, {"format": "pt", **{key: metadata[key] for key in metadata if key not in NOT_KEPT}})]


def _spelling(module: Stored, family: str | None) -> Mapping[str, str]:
    return KOHYA_SUFFIXES if family in SPELLED_AS_KOHYA or "mid" in module.tensors else SUFFIXES


COMFY = Format(
    name="comfy",
    about="ComfyUI's generic names, also of ai-toolkit, OneTrainer and musubi-tuner",
    container="file",
    claims=claims,
    parse=parse,
    place=place,
    whole=whole,
    suffixes=SUFFIXES,
    pack=pack,
    magnitudes="any",
)
