"""What is this file? Decided per key, then together; from keys, shapes and scalars alone, without torch.

lora_unet_...lora_down.weight -> kohya      unet.<path>.lora_A.weight -> diffusers      base_model.model... -> peft
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vislora.errors import AdapterFileError, listed
from vislora.formats.container import open_parts
from vislora.formats.contract import Format, folder_of
from vislora.formats.embeddings import embedding_name, is_embedding
from vislora.formats.names import DENOISERS
from vislora.formats.names.hints import family_of
from vislora.formats.other_things import looks_like
from vislora.formats.parsed import ParsedModule, Part, Ref
from vislora.formats.peft_config import COMPONENT_KEY, METADATA_KEY, write_metadata
from vislora.registry import FORMATS

# tensors that slider tools leave beside an adapter's own
HELPERS = "_aux."


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
        """Return every module's notes, each once, and one each for modules and tensors that have no place."""
        notes = list(dict.fromkeys(note for module in self.modules for note in module.notes))
        unknown = [module.raw_name for module in self.modules if module.path is None and not module.uncut]
        if unknown:
            notes.append(f"{len(unknown)} modules are layers of no known family (first: {unknown[0]})")
        if self.embeddings:
            names = dict.fromkeys(embedding_name(ref.key)[0] for ref in self.embeddings)
            notes.append(f"it carries {len(names)} textual inversion embeddings (first: {next(iter(names))})")
        return notes + (_about_extras([ref.key for ref in self.extras]) if self.modules else [])


def parse_file(path: str | Path, allow_pickle: bool = False) -> ParsedFile:
    """Read the headers behind `path` and resolve every key. Raises `AdapterFileError` for a damaged file.

    `allow_pickle`: take the tensors out of a pickle, in a process of its own that can do nothing else.
    """
    path = Path(path)
    parts = open_parts(path, allow_pickle)
    modules: list[ParsedModule] = []
    extras: list[Ref] = []
    embeddings: list[Ref] = []
    votes: Counter[str] = Counter()
    for part in parts:
        left = set(part.header.tensors)
        carried = {key for key in left if is_embedding(key, part.header.metadata)}
        embeddings += [Ref.of(part, key) for key in sorted(carried)]
        left -= carried
        for form in _formats_of(part, left):
            keys = [key for key in part.header.tensors if key in left and (part.config is not None or form.claims(key))]
            found = _parsed(form, part, keys)
            votes[form.name] += len(found)
            modules += found
            left.difference_update(*(module.keys for module in found))
        extras += [Ref.of(part, key) for key in sorted(left)]
    best = votes.most_common(1)[0][0] if modules else None
    metadata = {key: value for part in parts for key, value in part.header.metadata.items()}
    family = family_of_modules(modules, metadata)
    if any(part.config is not None for part in parts):
        metadata = _with_configs(metadata, parts, modules, family)
    return ParsedFile(path, parts, best, family, modules, embeddings, extras, metadata)


def family_of_modules(modules: Iterable[ParsedModule], metadata: Mapping[str, str]) -> str | None:
    """Return the family that an adapter is for. The tensors decide; metadata is asked when they do not tell."""
    modules = list(modules)
    denoiser = {item.tree_name: item.inputs for item in modules if item.component in DENOISERS and item.tree_name}
    components = {module.component for module in modules} - set(DENOISERS)
    return family_of(denoiser, metadata, components, {module.family for module in modules if module.family})


def unknown_file(parsed: ParsedFile) -> AdapterFileError:
    """Return the error for a file of which not one module was recognised."""
    keys = [key for part in parsed.parts for key in part.header.tensors]
    if parsed.modules:
        names = [module.raw_name for module in parsed.modules]
        said = f", its metadata says {parsed.family}" if parsed.family else ""
        title = f"{parsed.path}: none of its {len(names)} modules is a layer of a known model family{said}; it has:"
        return AdapterFileError(listed(title, names, limit=3))
    said = looks_like(keys)
    hint = " (generate takes it as --embedding)" if "textual inversion" in said else ""
    return AdapterFileError(listed(f"{parsed.path}: this is {said}{hint}; it begins with:", keys, limit=3))


def _about_extras(keys: Collection[str]) -> list[str]:
    helpers = [key for key in keys if key.startswith(HELPERS)]
    others = [key for key in keys if not key.startswith(HELPERS)]
    told = ((helpers, "are by-products of the tool that made the file"), (others, "belong to no module"))
    return [f"{len(found)} tensors {what} and are not used (first: {found[0]})" for found, what in told if found]


def _formats_of(part: Part, left: Collection[str]) -> Iterator[Format]:
    """Yield the formats that claim any of the keys that are left when their turn comes."""
    for name in FORMATS:
        form: Format = FORMATS[name]
        if part.config is not None:  # a folder with adapter_config.json is PEFT's whatever the keys are
            if form.container == "folder":
                yield form
        elif form.matches(left, part.header.metadata):
            yield form


def _parsed(form: Format, part: Part, keys: list[str]) -> list[ParsedModule]:
    try:
        return form.parse(part, keys)
    except AdapterFileError as error:
        message = str(error)
        raise AdapterFileError(message if message.startswith(str(part.path)) else f"{part.path}: {message}") from error


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
