"""The contract of a file format. A new format is one file with one `Format` in it, and one line in the registry.

Nothing here imports torch: `vislora inspect` parses files with it and never reads a tensor. `pack` handles tensors, but
only by passing them on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from vislora.formats.names import FAMILY_NAMES, FOLDERS, Place
from vislora.formats.parsed import ParsedModule, Part

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Stored:
    """A module as it will stand in the file: renamed, fused where the format fuses, its tensors under native slots.

    alpha: None for a kind without a scale, or whose scale no alpha changes. rule: "own" for such kinds.
    """

    component: str
    name: str
    algo: str
    tensors: dict[str, Tensor]
    rank: int
    alpha: float | None
    rule: str
    magnitude: Tensor | None = None
    magnitude_axis: str | None = None
    bias: Tensor | None = None


@dataclass
class Packed:
    """One safetensors file to write. A float becomes a float32 scalar. `folder`, `config`: of a PEFT folder."""

    tensors: dict[str, Tensor | float]
    metadata: dict[str, str]
    folder: str = ""
    config: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)


def _agreeing(modules: list[Stored]) -> dict[str, list[str]]:
    """Return nothing: in most formats one module does not bind another."""
    return {}


def _nowhere(component: str, path: str, family: str | None) -> Place | None:
    """Return None: a format that is only read stores no layer."""
    return None


def _no_name(component: str, stored: str, family: str | None) -> str | None:
    """Return None: no module of a whole fused layer can be written."""
    return None


@dataclass(frozen=True)
class Format:
    """One way to write an adapter down.

    about: in a few words, who makes and reads such files. container: a file, or a folder.
    claims(key): is this key named in this format's way? No two formats may claim one key.
    parse(part, keys): the modules of these keys, which are all claimed.

    A format that is written too has these; one that is only read leaves them out:
    place(component, path, family): where a layer is stored, or None when the format has no name for it.
    whole(component, stored, family): the name of a layer of the original tree, for a module that fuses or reorders
    layers and cannot be cut; None when the format has the reference tree's names only.
    suffixes: slot -> end of key; a slot that is not among them cannot be written. `bias` stands for a module's bias.
    foreign: whether slots of other packages' algorithms are written, under their own names.
    pack(modules, family, metadata): the files to write. zero_alpha: what an alpha of 0 means to its readers.
    magnitudes: where DoRA may be - on any module, per output or input; or on all of a component, per output.
    embeddings: may its files carry textual inversion embeddings, as `bundle_emb.NAME.slot`?
    scales_all: do its readers multiply a bias, and LoKr of two full factors, by the scale as well?
    conflicts(modules): names of modules that cannot stand beside the others of an adapter, by reason (with `{}` for how
    many).
    """

    name: str
    about: str
    container: Literal["file", "folder"]
    claims: Callable[[str], bool]
    parse: Callable[[Part, list[str]], list[ParsedModule]]
    place: Callable[[str, str, str | None], Place | None] = _nowhere
    whole: Callable[[str, str, str | None], str | None] = _no_name
    suffixes: Mapping[str, str] = field(default_factory=dict)
    foreign: bool = False
    pack: Callable[[list[Stored], str | None, dict[str, str]], list[Packed]] | None = None
    zero_alpha: Literal["no effect", "rank"] = "no effect"
    magnitudes: Literal["any", "all, per output"] = "all, per output"
    embeddings: bool = False
    scales_all: bool = False
    conflicts: Callable[[list[Stored]], dict[str, list[str]]] = _agreeing

    @property
    def writable(self) -> bool:
        """Say whether adapters can be written in this format, not only read."""
        return self.pack is not None

    def matches(self, keys: Collection[str], metadata: Mapping[str, str]) -> bool:
        """Say whether any of these keys is this format's. `metadata` is only a hint and never decides."""
        return any(map(self.claims, keys))


def folder_of(component: str, family: str | None, path: str = "") -> str:
    """Return diffusers' name of a component (`unet`, `text_encoder_2`, ...); without a family the path decides."""
    if component.startswith("unknown:"):
        return component.removeprefix("unknown:")
    if family in FAMILY_NAMES:
        known = FAMILY_NAMES[family].folders
        if component in known:
            return known[component]
    if component == "denoiser":
        return "unet" if path.startswith(("down_blocks.", "mid_block.", "up_blocks.", "conv_")) else "transformer"
    return next((folder for folder, item in FOLDERS.items() if item == component), component.replace(":", "_"))
