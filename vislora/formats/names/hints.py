"""The model family of an adapter: its layers decide, what the metadata names is only a hint. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping

from vislora.formats.names import FAMILY_NAMES, FamilyNames, choose

OWN_KEY = "vislora.base"
KEYS = ("ss_base_model_version", "modelspec.architecture")


def family_of(
    paths: Mapping[str, int | None],
    metadata: Mapping[str, str],
    components: Collection[str] = (),
    told: Collection[str] = (),
) -> str | None:
    """Return the family with these paths (-> inputs) of a denoiser; what else is known decides where they do not tell.

    components: those of the adapter beside the denoiser. told: the families that the names in the file tell, where they
    say more than the paths: original names are those of one family, where the paths of several are alike. Without
    layers of a denoiser the metadata decides; None when nothing does.
    """
    said = family_in_metadata(metadata)
    hint = next(iter(told)) if len(told) == 1 else said
    if len(told) == 1 and hint in FAMILY_NAMES and _knows_all(FAMILY_NAMES[hint], paths):
        return hint
    return choose(paths, flat=False, hint=hint, components=components)[0]


def _knows_all(names: FamilyNames, paths: Collection[str]) -> bool:
    return bool(paths) and all(names.tables["denoiser"].find_dotted(path) for path in paths)


def family_in_metadata(metadata: Mapping[str, str]) -> str | None:
    """Return the family that the metadata of vislora, kohya or modelspec names, or None.

    The longest version that fits wins.
    """
    own = _own_family(metadata.get(OWN_KEY, ""))
    if own in FAMILY_NAMES:
        return own
    for key in KEYS:
        said = _plain(metadata.get(key, ""))
        fits = [
            (len(start), names.family)
            for names in FAMILY_NAMES.values()
            for start in names.versions
            if said.startswith(_plain(start))
        ]
        if fits:
            return max(fits)[1]
    return "sd" if metadata.get("ss_v2", "").lower() == "true" else None  # all that OneTrainer writes for SD 2


def _plain(version: str) -> str:
    return version.lower().replace("_", "-")


def _own_family(base: str) -> str | None:
    """Return the family in vislora's own `vislora.base`, such as {"name": ..., "hash": ..., "family": "sd"}."""
    try:
        found = json.loads(base)
    except (ValueError, RecursionError):
        return None
    family = found.get("family") if isinstance(found, dict) else None
    return family if isinstance(family, str) else None
