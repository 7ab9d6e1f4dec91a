"""Tables of layer names: templates with `{}` for numbers, looked up in either direction, never guessed.

A flat name has lost the difference between `.` and `_`, so only a table can give it back. Torch-free.

    lora_unet_double_blocks_0_img_attn_qkv      -> transformer_blocks.0.attn.to_q, .to_k, .to_v
    diffusion_model.single_blocks.3.linear2     -> single_transformer_blocks.3.proj_out
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

from vislora.errors import AdapterFileError

Swap = Literal["never", "always", "two rows per input"]
Numbers = tuple[int, ...]
_DIGITS = re.compile(r"[0-9]+")
_MOST_DIGITS = 6  # of a number in a name; no model has a million blocks
# outline of a name -> its templates: what the runs of digits must be (None: any number), and the row
_Index = dict[str, list[tuple[tuple[str | None, ...], "Row"]]]


@dataclass(frozen=True)
class Share:
    """Which of the layers that a stored layer fuses by rows. `sizes`: the rows of each, as proportions."""

    index: int
    sizes: tuple[int, ...] = (1, 1, 1)

    def rows(self, total: int, name: str) -> tuple[int, int]:
        """Return (first, one past the last) of `total` rows. Raises `AdapterFileError` when they cannot be shared."""
        if total <= 0 or total % sum(self.sizes):
            shares = ":".join(map(str, self.sizes))
            raise AdapterFileError(f"'{name}' should have output rows in the proportions {shares}, it has {total} rows")
        unit = total // sum(self.sizes)
        start = unit * sum(self.sizes[: self.index])
        return start, start + unit * self.sizes[self.index]


@dataclass(frozen=True)
class Renumber:
    """How the numbers of a path become those of its stored name, and back; None where there is no such layer.

    Both get the numbers of all `{}` of one name and return those of the other.
    """

    to_stored: Callable[[Numbers], Numbers | None]
    to_path: Callable[[Numbers], Numbers | None]


@dataclass(frozen=True)
class Row:
    """One layer under two names. `path`: reference tree; `stored`: original tree ('' means the same).

    part: which rows of the original, when it fuses several layers. swap: is a modulation's output in halves of the
    other order? 'two rows per input' means: when it has two chunks only, as in the last block. renumber: when the two
    trees count their blocks in different ways; a path without a number in the original keeps its own name.
    """

    path: str
    stored: str = ""
    part: Share | None = None
    swap: Swap = "never"
    renumber: Renumber | None = None

    def found(self, numbers: Numbers) -> Found | None:
        """Return where the stored name with these numbers leads, None when no layer is behind it."""
        at_path = numbers if self.renumber is None else self.renumber.to_path(numbers)
        if at_path is None:
            return None
        return Found(self.path.format(*at_path), (self.stored or self.path).format(*numbers), self.part, self.swap)

    def place(self, numbers: Numbers) -> Place:
        """Return where the path with these numbers is stored."""
        stored = numbers if self.renumber is None else self.renumber.to_stored(numbers)
        if stored is None:
            return Place(self.path.format(*numbers))
        return Place((self.stored or self.path).format(*stored), self.part, self.swap)


@dataclass(frozen=True)
class Found:
    """Where a stored name leads: a path of the reference tree, maybe a part of the stored layer."""

    path: str
    stored: str
    part: Share | None = None
    swap: Swap = "never"


@dataclass(frozen=True)
class Place:
    """Where a path of the reference tree is stored: a name, maybe as one part of a fused layer."""

    name: str
    part: Share | None = None
    swap: Swap = "never"


class NameTable:
    """The layers of one model, for any number of blocks and any width.

    `aliases`: rows under further stored names, which some tools write; they are read, never written. Templates are
    sorted when a name is first looked up: a file needs the tables of few families.
    """

    def __init__(self, rows: Iterable[Row], aliases: Iterable[Row] = ()) -> None:
        self._rows = tuple(rows)
        self._aliases = tuple(aliases)

    @property
    def an_example(self) -> str:
        """Return the path of one layer."""
        return self._rows[0].path.replace("{}", "0")

    @cached_property
    def _by_path(self) -> _Index:
        return _index((row.path, row) for row in self._rows)

    @cached_property
    def _by_stored(self) -> _Index:
        return _index((row.stored or row.path, row) for row in (*self._rows, *self._aliases))

    @cached_property
    def _by_flat(self) -> _Index:
        rows = (*self._rows, *self._aliases)
        stored = [(row.stored or row.path, row) for row in rows]
        same = {row.path for row in rows if row.stored in ("", row.path)}
        # some tools flatten the reference tree instead
        paths = dict.fromkeys(row.path for row in self._rows if row.path not in same)
        names = [*stored, *((path, Row(path)) for path in paths)]
        return _index((template.replace(".", "_"), row) for template, row in names)

    @lru_cache(maxsize=16384)  # noqa: B019
    def find_flat(self, name: str) -> tuple[Found, ...]:
        """Return every path that a flat name stands for: one, the parts of a fused layer, or none at all."""
        return _found(self._by_flat, name)

    @lru_cache(maxsize=16384)  # noqa: B019 - tables live as long as the program, and a file asks more than once
    def find_dotted(self, name: str) -> tuple[Found, ...]:
        """Return every path that a dotted name of the reference tree, or else of the original one, stands for."""
        return (Found(name, name),) if self.knows(name) else _found(self._by_stored, name)

    def find(self, name: str, flat: bool) -> tuple[Found, ...]:
        """Return every path that a name stands for, flat or dotted."""
        return self.find_flat(name) if flat else self.find_dotted(name)

    def place(self, path: str) -> Place | None:
        """Return the (dotted) stored name of a path, or None when this model has no such layer."""
        return next((row.place(numbers) for row, numbers in _matches(self._by_path, path)), None)

    def knows(self, path: str) -> bool:
        """Say whether this model has a layer at `path`."""
        return next(iter(_matches(self._by_path, path)), None) is not None

    def may_know(self, outlines: Collection[str], flat: bool) -> bool:
        """Say quickly whether a name with one of these outlines could be a layer's; see `outline_of`."""
        indices = (self._by_flat,) if flat else (self._by_path, self._by_stored)
        return any(outline in index for index in indices for outline in outlines)


@dataclass(frozen=True)
class Sign:
    """Something that a family shows: a layer whose path matches `pattern`, with one of these numbers of `inputs`.

    No `inputs` means any number. The numbers are those of the released models.
    """

    pattern: str
    inputs: tuple[int, ...] = ()

    def seen(self, layers: Mapping[str, int | None]) -> bool:
        """Say whether it is there, in `layers`: path -> inputs, None where the slots do not tell."""
        widths = (path for path, inputs in layers.items() if not self.inputs or inputs in self.inputs)
        return any(map(re.compile(self.pattern).fullmatch, widths))


@dataclass(frozen=True)
class FamilyNames:
    """How the files of one model family name its components and their layers.

    `flat_prefixes`: kohya's, per component; `folders`: diffusers' component names, also its key prefixes;
    `flattened`: text encoders of the class CLIPTextModel, in whose tree transformers 5 has no `text_model`;
    `flat_from`: which tree of the denoiser kohya's files flatten, the original (stored) or the reference (path).
    `signs`, `against`: what tells this family from others whose layers have the same names. `variant_of`: the family
    that an adapter is taken for when it fits both and shows nothing of this one.
    `network_module`: sd-scripts' module that trains it, as kohya's metadata has it.
    `versions`: how ss_base_model_version or modelspec.architecture begins in its files, in small letters; the first one
    is written. Programs differ in `-` and `_`: when reading they are the same.
    """

    family: str
    tables: dict[str, NameTable]
    flat_prefixes: dict[str, str]
    folders: dict[str, str]
    flattened: frozenset[str] = frozenset()
    flat_from: Literal["stored", "path"] = "stored"
    signs: tuple[Sign, ...] = ()
    against: tuple[Sign, ...] = ()
    versions: tuple[str, ...] = ()
    variant_of: str = ""
    network_module: str = "networks.lora"

    @property
    def an_example(self) -> str:
        """Return the path of a layer of the denoiser."""
        return self.tables["denoiser"].an_example

    def signs_in(self, layers: Mapping[str, int | None]) -> int:
        """Return how many of its signs these layers (path -> inputs) show, less those that are against it."""
        return sum(sign.seen(layers) for sign in self.signs) - sum(sign.seen(layers) for sign in self.against)


def ranked(
    families: Iterable[FamilyNames], names: Mapping[str, int | None], flat: bool, components: Collection[str] = ()
) -> list[tuple[tuple[int, int, int], FamilyNames]]:
    """Rank families by how many of these layers of a denoiser they know, then of the other components, then by signs.

    names: flat or dotted -> inputs, None where the slots do not tell. Best first. Only those that know most of the
    layers are asked for their signs.
    """
    outlines = {outline_of(name) for name in names}
    leads: dict[str, dict[str, tuple[Found, ...]]] = {}
    for family in families:
        table = family.tables["denoiser"]
        asked = names if table.may_know(outlines, flat) else ()
        leads[family.family] = {name: found for name in asked if (found := table.find(name, flat))}
    most = max(map(len, leads.values()), default=0)
    scored = []
    for family in families:
        known = leads[family.family]
        layers = {lead.path: names[name] for name, found in known.items() for lead in found}
        others = sum(component in family.tables for component in components)
        signs = family.signs_in(layers) if len(known) == most else 0
        scored.append(((len(known), others, signs), family))
    return sorted(scored, key=lambda item: item[0], reverse=True)


def outline_of(name: str) -> str:
    """Return a name with `#` for every run of digits."""
    return _split(name)[0]


def _index(templates: Iterable[tuple[str, Row]]) -> _Index:
    index: _Index = {}
    for template, row in templates:
        # a `{}` becomes two digits with a leading zero, which no literal number of a template is
        outline, digits = _split(template.replace("{}", "00"))
        index.setdefault(outline, []).append((tuple(None if run == "00" else run for run in digits), row))
    return index


@lru_cache(maxsize=16384)
def _split(name: str) -> tuple[str, tuple[str, ...]]:
    """Split a name into its outline and its runs of digits."""
    return _DIGITS.sub("#", name), tuple(_DIGITS.findall(name))


def _found(index: _Index, name: str) -> tuple[Found, ...]:
    leads = (row.found(numbers) for row, numbers in _matches(index, name))
    return tuple(lead for lead in leads if lead is not None)


def _matches(index: _Index, name: str) -> Iterable[tuple[Row, Numbers]]:
    outline, digits = _split(name)
    for wanted, row in index.get(outline, ()):
        numbers = _numbers(wanted, digits)
        if numbers is not None:
            yield row, numbers


@lru_cache(maxsize=16384)
def _numbers(wanted: tuple[str | None, ...], digits: tuple[str, ...]) -> Numbers | None:
    """Return the numbers at the places where any is wanted; None when one differs, or begins with a 0."""
    if len(wanted) != len(digits):
        return None
    numbers = []
    for want, run in zip(wanted, digits, strict=True):
        if want is None and len(run) <= _MOST_DIGITS and (run == "0" or run[0] != "0"):
            numbers.append(int(run))
        elif want != run:
            return None
    return tuple(numbers)
