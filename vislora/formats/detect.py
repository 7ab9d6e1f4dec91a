"""What is this file? Decided per key, then together; from keys, shapes and scalars alone, without torch.

lora_unet_...lora_down.weight -> kohya      unet.<path>.lora_A.weight -> diffusers      base_model.model... -> peft
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vislora.errors import AdapterFileError, listed
from vislora.formats.container import open_parts
from vislora.formats.contract import Format, folder_of
from vislora.formats.names import family_of_paths
from vislora.formats.parsed import ParsedModule, Part, Ref
from vislora.formats.peft_config import COMPONENT_KEY, METADATA_KEY, write_metadata
from vislora.registry import FORMATS

BUNDLE = "bundle_emb."
# what a file without a LoRA in it is, by a pattern that one of its keys begins with; the first that fits
OTHER_THINGS = (
    (r"lllite_", "a ControlNet-LLLite"),
    (r"lora_controlnet$", "a ControlNet-LoRA (Stability AI)"),
    (r"(control_model|controlnet_cond_embedding|controlnet_down_blocks|input_hint_block|zero_convs)\b", "a ControlNet"),
    (r"(image_proj|ip_adapter)\.", "an IP-Adapter"),
    (r"(emb_params|string_to_param|clip_g)$|string_to_param\.|<[^>]+>$", "a textual inversion embedding"),
    (r"model\.diffusion_model\.|first_stage_model\.|cond_stage_model\.|conditioner\.", "a whole checkpoint"),
    (r"(text_encoder|unet)[^:.]*:\d+:(up|down)$", "a cloneofsimo LoRA, which vislora cannot read yet"),
    (r".*\.processor\.to_(q|k|v|out)_lora\.", "a LoRA in diffusers' oldest form, which vislora cannot read yet"),
    (
        r".*\.(lora|lora_linear_layer)\.(down|up)\.weight$",
        "a LoRA in diffusers' older form, which vislora cannot read yet",
    ),
    (r"diffusion_model\..*lora_", "a LoRA in ComfyUI's generic form, which vislora cannot read yet"),
    (r"(double|single)_blocks\.\d+\..*lora", "a LoRA for Flux in its original names, which vislora cannot read yet"),
    (r"(encoder|decoder|quant_conv|post_quant_conv)\b.*(weight|bias)$", "a VAE or another model's weights"),
    (r"(down_blocks|up_blocks|conv_in|transformer_blocks|joint_blocks)\b.*(weight|bias)$", "a denoiser's weights"),
    (r"(text_model|encoder\.layers|encoder\.block|shared)\b.*weight$", "a text encoder's weights"),
)
OTHER_MODELS = (
    (r"lora_unet_(input|output)_blocks_", "SDXL in its original block names"),
    (r"lora_unet_(double|single)_blocks_", "Flux in its original names"),
    (r"(lora_transformer|lycoris)_single_transformer_blocks_", "Flux"),
)
BASE_VERSIONS = (("sd3", "sd3"), ("sdxl", "sdxl"), ("sd_v1", "sd"), ("sd_v2", "sd"), ("sd_1", "sd"), ("sd_2", "sd"))
ARCHITECTURES = (("stable-diffusion-v", "sd"), ("stable-diffusion-xl", "sdxl"), ("stable-diffusion-3", "sd3"))


@dataclass
class ParsedFile:
    """All that an adapter says before its tensors are read. `format` is None when no module was recognised."""

    path: Path
    parts: list[Part]
    format: str | None
    family: str | None
    modules: list[ParsedModule]
    embeddings: list[Ref] = field(default_factory=list)
    extras: list[Ref] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def notes(self) -> list[str]:
        """Return every module's notes, each once, and one for all modules whose names nobody knows."""
        notes = list(dict.fromkeys(note for module in self.modules for note in module.notes))
        unknown = [module.raw_name for module in self.modules if module.path is None]
        if unknown:
            notes.append(
                f"{len(unknown)} modules are layers of no known family{foreign(unknown)} (first: {unknown[0]})"
            )
        return notes


def parse_file(path: str | Path) -> ParsedFile:
    """Read the headers behind `path` and resolve every key. Raises `AdapterFileError` for a damaged file."""
    path = Path(path)
    parts = open_parts(path)
    modules: list[ParsedModule] = []
    extras: list[Ref] = []
    embeddings: list[Ref] = []
    votes: Counter[str] = Counter()
    for part in parts:
        left = set(part.header.tensors)
        bundle = {key for key in left if key.startswith(BUNDLE)}
        embeddings += [Ref.of(part, key) for key in sorted(bundle)]
        left -= bundle
        for form in _formats_of(part, left):
            keys = [key for key in part.header.tensors if key in left and (part.config is not None or form.claims(key))]
            found = _parsed(form, part, keys)
            votes[form.name] += len(found)
            modules += found
            left -= _keys_used(found)
        extras += [Ref.of(part, key) for key in sorted(left)]
    best = votes.most_common(1)[0][0] if modules else None
    metadata = {key: value for part in parts for key, value in part.header.metadata.items()}
    family = family_of(modules, metadata)
    if any(part.config is not None for part in parts):
        metadata = _with_configs(metadata, parts, modules, family)
    return ParsedFile(path, parts, best, family, modules, embeddings, extras, metadata)


def family_of(modules: Iterable[ParsedModule], metadata: Mapping[str, str]) -> str | None:
    """Return the family that an adapter is for. The tensors decide; metadata is asked when they do not tell."""
    modules = list(modules)
    denoiser = [module for module in modules if module.component == "denoiser" and module.path]
    family = family_of_paths(module.path for module in denoiser if module.path)
    if family == "sd" and _looks_like_sdxl(modules):
        return "sdxl"
    if family is None and not denoiser:
        said = {module.family for module in modules if module.family}
        family = said.pop() if len(said) == 1 else None
        if any(module.component in ("te:clip_g", "te:t5") for module in modules) and family == "sd3":
            family = None  # SDXL's and Flux' text encoders have the same names
    return family or family_in_metadata(metadata)


def family_in_metadata(metadata: Mapping[str, str]) -> str | None:
    """Return the family that kohya's or modelspec's metadata names, or None."""
    said = metadata.get("ss_base_model_version", "").lower()
    for prefix, family in BASE_VERSIONS:
        if said.startswith(prefix):
            return family
    said = metadata.get("modelspec.architecture", "").lower()
    return next((family for prefix, family in ARCHITECTURES if said.startswith(prefix)), None)


def looks_like(keys: Collection[str]) -> str:
    """Say in words what a file with these keys is, when it is no adapter that vislora knows."""
    for pattern, thing in OTHER_THINGS:
        if any(re.match(pattern, key) for key in keys):
            return thing
    return "a safetensors file without a LoRA in it" if keys else "a safetensors file without any tensor"


def foreign(names: Collection[str]) -> str:
    """Return `, they look like those of SDXL ...` for names of a model that vislora does not know yet, or ''."""
    for pattern, model in OTHER_MODELS:
        if any(re.match(pattern, name) for name in names):
            return f", they look like those of {model}"
    return ""


def unknown_file(parsed: ParsedFile) -> AdapterFileError:
    """Return the error for a file of which not one module was recognised."""
    keys = [key for part in parsed.parts for key in part.header.tensors]
    if parsed.modules:
        names = [module.raw_name for module in parsed.modules]
        said = foreign(names) or (f", its metadata says {parsed.family}" if parsed.family else "")
        title = f"{parsed.path}: none of its {len(names)} modules is a layer of a known model family{said}; it has:"
        return AdapterFileError(listed(title, names, limit=3))
    return AdapterFileError(listed(f"{parsed.path}: this is {looks_like(keys)}; it begins with:", keys, limit=3))


def _formats_of(part: Part, keys: Collection[str]) -> list[Format]:
    formats: list[Format] = [FORMATS[name] for name in FORMATS]
    if part.config is not None:  # a folder with adapter_config.json is PEFT's whatever the keys are
        return [item for item in formats if item.container == "folder"]
    return [item for item in formats if item.matches(keys, part.header.metadata)]


def _parsed(form: Format, part: Part, keys: list[str]) -> list[ParsedModule]:
    try:
        return form.parse(part, keys)
    except AdapterFileError as error:
        message = str(error)
        raise AdapterFileError(message if message.startswith(str(part.path)) else f"{part.path}: {message}") from error


def _keys_used(modules: Iterable[ParsedModule]) -> set[str]:
    used = set()
    for module in modules:
        refs = [*module.refs.values(), module.magnitude, module.bias]
        used |= {ref.key for ref in refs if ref is not None}
        used.add(f"{module.raw_name}.alpha")
    return used


def _with_configs(
    metadata: Mapping[str, str], parts: list[Part], modules: list[ParsedModule], family: str | None
) -> dict[str, str]:
    """Return the metadata with PEFT's configs in the form that diffusers has for them."""
    configs: dict[str, Mapping[str, Any]] = {}
    for module in modules:
        part = next((ref.part for ref in module.refs.values()), None)
        if part is not None and part.config is not None:
            configs.setdefault(folder_of(module.component, family, module.path or ""), part.config)
    kept = {key: value for key, value in metadata.items() if key != COMPONENT_KEY}
    return {**kept, METADATA_KEY: write_metadata(configs)}


def _looks_like_sdxl(modules: Iterable[ParsedModule]) -> bool:
    """SDXL's UNet has SD's names; it alone has a second text encoder, add_embedding or deep transformer blocks."""
    for module in modules:
        path = module.path or ""
        down = module.refs.get("down")
        wide = path.endswith("attn2.to_k") and down is not None and down.shape[-1:] == (2048,)
        if module.component == "te:clip_g" or path.startswith("add_embedding") or wide:
            return True
        if re.search(r"\.transformer_blocks\.[1-9]", path):
            return True
    return False
