"""Names of layers per model family: between the reference (diffusers) tree, the original tree and kohya's flat names.

    sd    lora_unet_mid_block_attentions_0_proj_in           <-> denoiser: mid_block.attentions.0.proj_in
    sd3   lora_unet_joint_blocks_3_context_block_attn_proj   <-> denoiser: transformer_blocks.3.attn.to_add_out

A new family is one file beside this one and one line in `FAMILY_NAMES`. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vislora.formats.names.sd import SD
from vislora.formats.names.sd3 import SD3
from vislora.formats.names.table import FamilyNames, Found, Place
from vislora.formats.names.text import CLIP, T5

FAMILY_NAMES: dict[str, FamilyNames] = {"sd": SD, "sd3": SD3}
FOLDERS = {
    "unet": "denoiser",
    "transformer": "denoiser",
    "text_encoder": "te:clip_l",
    "text_encoder_2": "te:clip_g",
    "text_encoder_3": "te:t5",
}
# flat prefixes that any family's denoiser may stand under: LyCORIS' own and OneTrainer's
DENOISER_ALIASES = ("lycoris_", "lora_transformer_")


def find_flat(raw_name: str) -> tuple[FamilyNames, str, list[Found]] | None:
    """Look a flat name up in every family: (names, component, where it leads), or None when no table has it."""
    for names, component, prefix in _prefixes():
        if raw_name.startswith(prefix):
            found = names.tables[component].find_flat(raw_name.removeprefix(prefix))
            if found:
                return names, component, found
    return None


def flat_prefix(raw_name: str) -> str | None:
    """Return the flat prefix that a name begins with, such as `lora_unet_`, or None."""
    known = {prefix for names in FAMILY_NAMES.values() for prefix in names.flat_prefixes.values()}
    return next((item for item in sorted({*known, *DENOISER_ALIASES}) if raw_name.startswith(item)), None)


def component_of(folder: str, path: str) -> str:
    """Return the component of a dotted path; `folder` is diffusers' name for it or ''. Vocabulary decides first.

    `text_encoder_2` holds CLIP-G in SDXL and SD3 and T5 in Flux; without a folder a CLIP is taken for CLIP-L.
    """
    if T5.knows(path):
        return "te:t5"
    if CLIP.knows(canonical(path)) and FOLDERS.get(folder, "te:clip_l") != "denoiser":
        return FOLDERS.get(folder, "te:clip_l")
    if folder in FOLDERS:
        return FOLDERS[folder]
    known = any(names.tables["denoiser"].knows(path) for names in FAMILY_NAMES.values())
    return "denoiser" if known else f"unknown:{folder or 'model'}"


def canonical(path: str) -> str:
    """Return a CLIP path with `text_model.` in front; transformers 5 has no such module, files keep the name."""
    if path.startswith(("encoder.layers.", "embeddings.", "final_layer_norm")):
        return f"text_model.{path}"
    return path


def _prefixes() -> Iterator[tuple[FamilyNames, str, str]]:
    for names in FAMILY_NAMES.values():
        for component, prefix in names.flat_prefixes.items():
            yield names, component, prefix
            if component == "denoiser":
                yield from ((names, component, alias) for alias in DENOISER_ALIASES)


def family_of_paths(paths: Iterable[str]) -> str | None:
    """Return the family whose denoiser has most of these paths, or None when none has any."""
    paths = list(paths)
    votes = {name: sum(map(names.tables["denoiser"].knows, paths)) for name, names in FAMILY_NAMES.items()}
    best = max(votes, key=lambda name: votes[name])
    return best if votes[best] else None


__all__ = ["FAMILY_NAMES", "FOLDERS", "FamilyNames", "Found", "Place", "canonical", "component_of", "family_of_paths"]
