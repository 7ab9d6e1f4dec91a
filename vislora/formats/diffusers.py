"""diffusers' LoRA files of today: the reference tree's own names, PEFT's slots, alpha in the header.

    unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k.lora_A.weight    (rank, in)
    text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_B.weight               (out, rank)

Spec: diffusers loaders/lora_base.py. `__metadata__["lora_adapter_metadata"]` holds a LoraConfig per component; without
it alpha = rank. Embeddings (`lora_embedding_A`) and `.alpha` keys are read as well.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from vislora.formats.contract import Format, Packed, Stored, folder_of
from vislora.formats.dotted import at_denoiser_or_as_named
from vislora.formats.names import DENOISERS, FOLDERS, Place, canonical, component_of
from vislora.formats.parsed import ParsedModule, Part, collect, module_of
from vislora.formats.peft_config import METADATA_KEY, apply_config, prepared, read_metadata, write_metadata
from vislora.formats.peft_writing import MAGNITUDE, conflicts, entries, make_config
from vislora.formats.slots import DIFFUSERS_SUFFIXES, split_key

if TYPE_CHECKING:
    from torch import Tensor


def claims(key: str) -> bool:
    """Say whether a key is `<component>.<path>.<slot>`, and not PEFT's `unet.base_model.model.<path>.<slot>`."""
    prefix, _, rest = key.partition(".")
    found = split_key(rest)
    return prefix in FOLDERS and not rest.startswith("base_model.") and found is not None and found[1] != "weight"


def parse(part: Part, keys: list[str]) -> list[ParsedModule]:
    """Take paths as they stand, original names by table.

    Alpha comes from the header's config, else from `.alpha` keys, else it is the rank.
    """
    configs = {folder: prepared(config) for folder, config in read_metadata(part.header.metadata).items()}
    modules: list[ParsedModule] = []
    denoisers: dict[str, list[tuple[ParsedModule, str]]] = {}
    for raw_name, slots in collect(part, keys).items():
        folder, _, path = raw_name.partition(".")
        module = module_of(part, raw_name, slots)
        module.component = component_of(folder, path)
        if folder in configs:
            apply_config(module, path, configs[folder])
        if module.component in DENOISERS:
            denoisers.setdefault(module.component, []).append((module, path))
        else:
            module.path = canonical(path) if module.component.startswith("te:clip") else path
            modules.append(module)
    texts = {module.component for module in modules}
    found = (at_denoiser_or_as_named(named, part.header.metadata, texts) for named in denoisers.values())
    return [*chain(*found), *modules]


def place(component: str, path: str, family: str | None) -> Place | None:
    """Return `<component>.<path>`; any path can be written."""
    return Place(f"{folder_of(component, family, path)}.{path}")


def pack(modules: list[Stored], family: str | None, metadata: dict[str, str]) -> list[Packed]:
    """Write the slots, and every rank and alpha exactly in the header, so that no alpha is folded into a tensor."""
    tensors: dict[str, Tensor | float] = {}
    by_folder: dict[str, list[Stored]] = {}
    for module in modules:
        by_folder.setdefault(module.name.partition(".")[0], []).append(module)
        tensors.update(_entries(module))
    base = read_metadata(metadata)
    paths = {module.name: module.name.partition(".")[2] for module in modules}
    configs = {folder: make_config(members, paths, base.get(folder, {})) for folder, members in by_folder.items()}
    return [Packed(tensors, {"format": "pt", **metadata, METADATA_KEY: write_metadata(configs)})]


def _entries(module: Stored) -> dict[str, Tensor]:
    """Return the tensors of `module`. transformers loads text encoders by their parameters' own names alone."""
    found = entries(module, module.name)
    if not module.component.startswith("te:"):
        return found
    return {f"{key}.weight" if key.endswith(MAGNITUDE) else key: tensor for key, tensor in found.items()}


DIFFUSERS = Format(
    name="diffusers",
    about="diffusers' save_lora_weights and load_lora_weights",
    container="file",
    claims=claims,
    parse=parse,
    place=place,
    suffixes=DIFFUSERS_SUFFIXES,
    pack=pack,
    scales_all=True,
    conflicts=conflicts,
)
