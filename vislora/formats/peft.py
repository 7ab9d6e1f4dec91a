"""PEFT adapter folders: `adapter_model.safetensors` beside `adapter_config.json`, the only place of alpha and rank.

    base_model.model.mid_block.attentions.0.proj_in.lora_A.weight                 (rank, in, 1, 1)
    base_model.model.text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight   (out, rank)

Spec: https://huggingface.co/docs/peft/developer_guides/checkpoint. A folder holds one component; an adapter of several
is a folder of such folders, named as diffusers names components (unet, transformer, text_encoder, text_encoder_2, ...).
"""

from __future__ import annotations

import re
from itertools import chain
from typing import TYPE_CHECKING

from vislora.formats.contract import Format, Packed, Stored, folder_of
from vislora.formats.dotted import at_denoiser_or_as_named
from vislora.formats.names import DENOISERS, FAMILY_NAMES, FOLDERS, Place, canonical, component_of
from vislora.formats.parsed import ParsedModule, Part, collect, module_of
from vislora.formats.peft_config import COMPONENT_KEY, METADATA_KEY, apply_config, prepared, read_metadata
from vislora.formats.peft_writing import conflicts, entries, make_config
from vislora.formats.slots import PEFT_SUFFIXES

if TYPE_CHECKING:
    from torch import Tensor

ROOT = "base_model.model."
_PREFIX = re.compile(rf"(?:({'|'.join(FOLDERS)})\.)?(?:base_model\.model\.)+(?:({'|'.join(FOLDERS)})\.)?")


def claims(key: str) -> bool:
    """Say whether a key begins with `base_model.model.`, maybe after a component's name."""
    return _PREFIX.match(key) is not None


def parse(part: Part, keys: list[str]) -> list[ParsedModule]:
    """Strip the prefixes; the component is the folder's, the key's or the one whose vocabulary this is."""
    modules: list[ParsedModule] = []
    denoisers: dict[str, list[tuple[ParsedModule, str]]] = {}
    config = None if part.config is None else prepared(part.config)
    for raw_name, slots in collect(part, keys).items():
        module = module_of(part, raw_name, slots)
        found = _PREFIX.match(raw_name)
        path = raw_name[found.end() :] if found else raw_name
        folder = part.folder or (found[1] or found[2] if found else "") or ""
        said = part.header.metadata.get(COMPONENT_KEY) if part.config is not None else None
        module.component = said if said and said in FOLDERS.values() else component_of(folder, path)
        if config is not None:
            apply_config(module, path, config)
        elif module.alpha is None:
            module.notes.append("there is no adapter_config.json: alpha is taken for the rank")
        if module.component in DENOISERS:
            denoisers.setdefault(module.component, []).append((module, path))
        else:
            module.path = canonical(path) if module.component.startswith("te:clip") else path
            modules.append(module)
    texts = {module.component for module in modules}
    at_home = (at_denoiser_or_as_named(named, part.header.metadata, texts) for named in denoisers.values())
    return [*chain(*at_home), *modules]


def place(component: str, path: str, family: str | None) -> Place | None:
    """Return `<component>.base_model.model.<path>`; the component becomes the folder. Any path can be written.

    PEFT matches a folder's names exactly, so they are those of the module tree of today's transformers.
    """
    names = FAMILY_NAMES.get(family or "")
    flat = names is not None and component in names.flattened
    return Place(f"{folder_of(component, family, path)}.{ROOT}{path.removeprefix('text_model.') if flat else path}")


def pack(modules: list[Stored], family: str | None, metadata: dict[str, str]) -> list[Packed]:
    """Write one folder per component, or a single one without sub-folders when there is but one component."""
    by_folder: dict[str, list[Stored]] = {}
    for module in modules:
        by_folder.setdefault(module.name.partition(".")[0], []).append(module)
    base = read_metadata(metadata)
    kept = {key: value for key, value in metadata.items() if key != METADATA_KEY}
    packed = []
    for folder, members in by_folder.items():
        paths = {module.name: module.name.partition(f".{ROOT}")[2] for module in members}
        tensors: dict[str, Tensor | float] = {}
        for module in members:
            tensors.update(entries(module, f"{ROOT}{paths[module.name]}"))
        said = {"format": "pt", **kept, COMPONENT_KEY: members[0].component}
        config = make_config(members, paths, base.get(folder, {}))
        packed.append(Packed(tensors, said, folder if len(by_folder) > 1 else "", config))
    return packed


PEFT = Format(
    name="peft",
    about="PEFT's save_pretrained; a folder per component",
    container="folder",
    claims=claims,
    parse=parse,
    place=place,
    suffixes=PEFT_SUFFIXES,
    pack=pack,
    scales_all=True,
    conflicts=conflicts,
)
