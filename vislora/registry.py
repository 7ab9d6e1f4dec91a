"""Names of the replaceable parts, each `name -> "module:attribute"`; a part is imported when it is asked for.

A new algorithm, file format or model family is one file and one line here; the contract tests then run over it. Other
packages have algorithms of their own by entry points: docs/algorithms.md.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from vislora.errors import ConfigError, nearest


class Registry(Mapping[str, Any]):
    """A read-only mapping from a name to a part that is imported on first use.

    `aliases`: other names for some of them, which are understood but not listed. `group`: of entry points, by which
    other packages add parts.
    """

    def __init__(
        self, kind: str, targets: dict[str, str], aliases: Mapping[str, str] | None = None, group: str = ""
    ) -> None:
        self.kind = kind
        self._targets = targets
        self._aliases = dict(aliases or {})
        self._group = group
        self._parts: dict[str, Any] = {}

    @cached_property
    def others(self) -> dict[str, str]:
        """The parts of other packages. Raises `ConfigError` for one that has the name of a part of this package."""
        if not self._group:
            return {}
        from importlib.metadata import entry_points  # takes its time, and few ask for what is not here

        found = {point.name: point.value for point in entry_points(group=self._group)}
        taken = [name for name in found if name in self._targets or name in self._aliases]
        if taken:
            raise ConfigError(
                f"{self.kind} '{taken[0]}' of {found[taken[0]]} has a name that is taken: rename it there"
            )
        return found

    def name_of(self, name: str) -> str:
        """Return the name that an alias stands for; any other name is returned as it is."""
        return self._aliases.get(name, name)

    def aliases_of(self, name: str) -> list[str]:
        """Return the other names of a part."""
        return [alias for alias, target in self._aliases.items() if target == name]

    def __getitem__(self, name: str) -> Any:
        """Import and return the part `name`.

        Raises `ConfigError` for an unknown name, and for a part of another package that cannot be imported.
        """
        name = self.name_of(name)
        if name not in self:
            close = nearest(name, [*self, *self._aliases])
            raise ConfigError(f"unknown {self.kind} '{name}'{close}; known: {', '.join(self)}")
        if name not in self._parts:
            self._parts[name] = self._imported(name)
        return self._parts[name]

    def _imported(self, name: str) -> Any:
        if name in self._targets:
            module, attribute = self._targets[name].split(":")
            return getattr(importlib.import_module(module), attribute)
        try:
            module, attribute = self.others[name].split(":")
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(f"{self.kind} '{name}' cannot be had from {self.others[name]}: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter([*self._targets, *self.others])

    def __len__(self) -> int:
        return len(self._targets) + len(self.others)

    def __contains__(self, name: object) -> bool:
        return name in self._targets or name in self._aliases or name in self.others


_ALGORITHMS = {
    "lora": "vislora.algorithms.lora:LORA",
    "loha": "vislora.algorithms.loha:LOHA",
    "lokr": "vislora.algorithms.lokr:LOKR",
    "full": "vislora.algorithms.full:FULL",
    "norm": "vislora.algorithms.norm:NORM",
    "set": "vislora.algorithms.replace:SET",
    "glora": "vislora.algorithms.glora:GLORA",
    "oft": "vislora.algorithms.oft:OFT",
    "boft": "vislora.algorithms.boft:BOFT",
    "oft_peft": "vislora.algorithms.oft_peft:OFT_PEFT",
    "ia3": "vislora.algorithms.ia3:IA3",
}
_GROUP = "vislora.algorithms"
ALGORITHMS = Registry("algorithm", _ALGORITHMS, group=_GROUP)
TRAINED = Registry(
    "algorithm",
    {name: target for name, target in _ALGORITHMS.items() if name not in ("norm", "set")},
    aliases={"locon": "lora", "diag-oft": "oft"},
    group=_GROUP,
)
"""Those that layers can have afresh; the other two are in files only."""

FORMATS = Registry(
    "format",
    {
        "kohya": "vislora.formats.kohya:KOHYA",
        # before "diffusers": they take the alphas and magnitudes that stand beside their own slots
        "diffusers-old": "vislora.formats.diffusers_old:DIFFUSERS_OLD",
        "diffusers-mid": "vislora.formats.diffusers_old:DIFFUSERS_MID",
        "comfy": "vislora.formats.comfy:COMFY",
        "diffusers": "vislora.formats.diffusers:DIFFUSERS",
        "peft": "vislora.formats.peft:PEFT",
        "xlabs": "vislora.formats.xlabs:XLABS",
        "cloneofsimo": "vislora.formats.cloneofsimo:CLONEOFSIMO",
        "bare": "vislora.formats.bare:BARE",
    },
    aliases={
        "sd-scripts": "kohya",
        "a1111": "kohya",
        "automatic1111": "kohya",
        "webui": "kohya",
        "forge": "kohya",
        "lycoris": "kohya",
        "comfyui": "comfy",
        "bfl": "comfy",
        "ai-toolkit": "comfy",
    },
)

COMPOSITIONS = Registry(
    "composition",
    {
        "sum": "vislora.inject.composition:SUM",
        "switch": "vislora.inject.compositions.switch:Switch",
        "composite": "vislora.inject.compositions.composite:Composite",
        "klora": "vislora.inject.compositions.klora:KLora",
    },
)

FAMILIES = Registry(
    "family",
    {
        "sd": "vislora.models.sd:StableDiffusion",
        # before "sdxl", whose pipelines have the refiner's parts too, and two
        "sdxl-refiner": "vislora.models.sdxl:StableDiffusionXLRefiner",
        "sdxl": "vislora.models.sdxl:StableDiffusionXL",
        "sd3": "vislora.models.sd3:StableDiffusion3",
        "flux": "vislora.models.flux:Flux",
        "pixart": "vislora.models.pixart:PixArt",
        "lumina2": "vislora.models.lumina2:Lumina2",
        "auraflow": "vislora.models.auraflow:AuraFlow",
        "sana": "vislora.models.sana:Sana",
        "qwen-image": "vislora.models.qwen_image:QwenImage",
        "z-image": "vislora.models.z_image:ZImage",
        "flux2": "vislora.models.flux2:Flux2",
    },
)
