"""Dotted names of a denoiser's layers, of whichever tree: the original one or the reference one. Torch-free.

    double_blocks.0.img_attn.qkv         -> transformer_blocks.0.attn.to_q, .to_k, .to_v (by rows)
    transformer_blocks.0.attn.to_q       -> as it stands

Formats differ in what stands before such a name: they strip it and ask here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from vislora.formats.cutting import parts
from vislora.formats.names import Found, choose
from vislora.formats.names.hints import family_in_metadata
from vislora.formats.parsed import ParsedModule

# modules of one denoiser, each with its dotted name there
Named = Sequence[tuple[ParsedModule, str]]


def at_denoiser(named: Named, metadata: Mapping[str, str], components: Collection[str] = ()) -> list[ParsedModule]:
    """Return these modules where their names lead in the family that knows most of them.

    components: those of the file beside this denoiser, a hint at its family. A fused layer becomes one module per
    member. A name that the family does not have leaves path None.
    """
    found: list[ParsedModule] = []
    for (module, _), leads in zip(named, _leads(named, metadata, components), strict=True):
        found += parts(module, leads) if leads else [module]
    return found


def at_denoiser_or_as_named(
    named: Named, metadata: Mapping[str, str], components: Collection[str] = ()
) -> list[ParsedModule]:
    """Do as `at_denoiser`, but take a name that no family knows for a path: such files are made for any model.

    Where the family knows fewer than half of the names, it shares them by chance: all are taken as they stand.
    """
    known = _leads(named, metadata, components)
    if 2 * sum(map(bool, known)) < len(known):
        known = [()] * len(known)
        for module, _ in named:
            module.family = None
    found: list[ParsedModule] = []
    for (module, name), leads in zip(named, known, strict=True):
        found += parts(module, leads or [Found(name, name)])
    return found


def _leads(named: Named, metadata: Mapping[str, str], components: Collection[str]) -> list[tuple[Found, ...]]:
    """Return where each name leads, and note in the modules which family all of them tell."""
    layers = {name: module.inputs for module, name in named}
    if not layers:
        return []
    family, order = choose(layers, flat=False, hint=family_in_metadata(metadata), components=components)
    leads = [order[0].tables["denoiser"].find_dotted(name) for _, name in named]
    for (module, _), found in zip(named, leads, strict=True):
        module.family = family if found else None
    return leads
