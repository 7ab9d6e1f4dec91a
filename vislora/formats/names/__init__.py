"""Names of layers per model family: between the reference (diffusers) tree, the original tree and kohya's flat names.

    sd    lora_unet_mid_block_attentions_0_proj_in           <-> denoiser: mid_block.attentions.0.proj_in
    sd3   lora_unet_joint_blocks_3_context_block_attn_proj   <-> denoiser: transformer_blocks.3.attn.to_add_out

A new family is one file beside this one and one line in `FAMILY_NAMES`. Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from vislora.formats.names.anima import ANIMA
from vislora.formats.names.auraflow import AURAFLOW
from vislora.formats.names.chroma import CHROMA
from vislora.formats.names.cogvideox import COGVIDEOX
from vislora.formats.names.flux import FLUX
from vislora.formats.names.flux2 import FLUX2
from vislora.formats.names.hidream import HIDREAM
from vislora.formats.names.hunyuan import HUNYUAN_IMAGE, HUNYUAN_VIDEO
from vislora.formats.names.krea2 import KREA2
from vislora.formats.names.ltx import LTX
from vislora.formats.names.lumina2 import LUMINA2
from vislora.formats.names.mochi import MOCHI
from vislora.formats.names.pixart import PIXART
from vislora.formats.names.qwen_image import QWEN_IMAGE
from vislora.formats.names.sana import SANA
from vislora.formats.names.sd import SD
from vislora.formats.names.sd3 import SD3
from vislora.formats.names.sdxl import SDXL, SDXL_REFINER
from vislora.formats.names.table import FamilyNames, Found, NameTable, Place, Share, ranked
from vislora.formats.names.text import CLIP, LLM, T5
from vislora.formats.names.wan import WAN
from vislora.formats.names.z_image import Z_IMAGE

_FAMILIES = (
    *(
        SD,
        SDXL,
        SDXL_REFINER,
        SD3,
        FLUX,
        CHROMA,
        FLUX2,
        QWEN_IMAGE,
        Z_IMAGE,
        LUMINA2,
        WAN,
        HUNYUAN_VIDEO,
        HUNYUAN_IMAGE,
    ),
    *(PIXART, SANA, HIDREAM, AURAFLOW, ANIMA, KREA2, LTX, COGVIDEOX, MOCHI),
)
FAMILY_NAMES: dict[str, FamilyNames] = {names.family: names for names in _FAMILIES}
# Wan 2.2 has two: for high noise and for low noise
DENOISERS = ("denoiser", "denoiser_2")
FOLDERS = {
    "unet": "denoiser",
    "transformer": "denoiser",
    "transformer_2": "denoiser_2",
    "text_encoder": "te:clip_l",
    "text_encoder_2": "te:clip_g",
    "text_encoder_3": "te:t5",
}
# `denoiser_2` is the second expert of Wan 2.2, which takes over at low noise; both have the same layers
DENOISERS = ("denoiser", "denoiser_2")
# flat prefixes of kohya's files (its OFT has one of its own), of LyCORIS' (`lycoris_`) and OneTrainer's
FLAT_DENOISERS = ("lora_unet_", "oft_unet_", "lycoris_", "lora_transformer_")
FLAT_TEXT = re.compile(r"(lora_te([123]?)_)")
_FLAT = re.compile("|".join((FLAT_TEXT.pattern, *FLAT_DENOISERS)))


def flat_prefix(raw_name: str) -> str | None:
    """Return the flat prefix that a name begins with, such as `lora_unet_`, or None."""
    found = _FLAT.match(raw_name)
    return found[0] if found else None


def find_text(raw_name: str) -> tuple[str, tuple[Found, ...]] | None:
    """Look up a flat name of a text encoder: (component, where it leads), or None when no text encoder has it.

    The vocabulary decides: `lora_te2_` is CLIP-G in SDXL and SD3, but T5 in OneTrainer's Flux files.
    """
    prefix = FLAT_TEXT.match(raw_name)
    if prefix is None:
        return None
    name = raw_name.removeprefix(prefix[1])
    clip = "te:clip_g" if prefix[2] == "2" else "te:clip_l"
    for component, table in ((clip, CLIP), ("te:t5", T5), ("te:llm", LLM)):
        found = table.find_flat(name)
        if found:
            return component, found
    return None


def choose(
    names: Mapping[str, int | None], flat: bool, hint: str | None = None, components: Collection[str] = ()
) -> tuple[str | None, list[FamilyNames]]:
    """Return the family that these names of a denoiser's layers tell, and every family in the order to try them.

    names: flat (without prefix) or dotted -> the layer's inputs, None where the slots do not tell. components: those
    beside the denoiser. hint: the family that the metadata names. Layers decide first, then components, signs, the
    hint; a variant is not told when the family that it is a variant of fits as well. None when several are left. The
    hint is all there is where no family knows a layer.
    """
    scored = ranked(FAMILY_NAMES.values(), names, flat, components)
    scored.sort(key=lambda item: (item[0], item[1].family == hint), reverse=True)
    order = [names for _, names in scored]
    best = scored[0][0]
    equals = [names.family for score, names in scored if score == best]
    if hint in equals or not best[0]:
        return hint, order
    plain = [family for family in equals if FAMILY_NAMES[family].variant_of not in equals]
    return plain[0] if len(plain) == 1 else None, order


def families_for(
    names: Mapping[str, int | None], flat: bool, hint: str | None = None, components: Collection[str] = ()
) -> list[FamilyNames]:
    """Return every family, the one that these names of a denoiser's layers fit best first; see `choose`."""
    return choose(names, flat, hint, components)[1]


def component_of(folder: str, path: str) -> str:
    """Return the component of a dotted path; `folder` is diffusers' name for it or ''. Vocabulary decides first.

    `text_encoder_2` holds CLIP-G in SDXL and SD3 and T5 in Flux; without a folder a CLIP is taken for CLIP-L.
    """
    if T5.knows(path):
        return "te:t5"
    if CLIP.knows(canonical(path)) and FOLDERS.get(folder, "te:clip_l") not in DENOISERS:
        return FOLDERS.get(folder, "te:clip_l")
    if FOLDERS.get(folder, "").startswith("te:") and LLM.find_dotted(path):
        return "te:llm"
    if folder in FOLDERS:
        return FOLDERS[folder]
    known = any(names.tables["denoiser"].find_dotted(path) for names in FAMILY_NAMES.values())
    return "denoiser" if known else f"unknown:{folder or 'model'}"


def canonical(path: str) -> str:
    """Return a CLIP path with `text_model.` in front; transformers 5 has no such module, files keep the name."""
    if path.startswith(("encoder.layers.", "embeddings.", "final_layer_norm")):
        return f"text_model.{path}"
    return path


__all__ = [
    "DENOISERS",
    "FAMILY_NAMES",
    "FOLDERS",
    "FamilyNames",
    "Found",
    "NameTable",
    "Place",
    "Share",
    "canonical",
    "choose",
    "component_of",
    "families_for",
    "find_text",
    "flat_prefix",
]
