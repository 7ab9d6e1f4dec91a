"""Many adapters on one pipeline within a memory budget: what is used stays loaded, the longest unused goes first."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ByteSize, TypeAdapter, ValidationError

from vislora.errors import ConfigError
from vislora.jobs.library import Entry, Index
from vislora.jobs.pipelines import Given, eject, load, loaded_strengths, set_strengths


@dataclass(frozen=True)
class Resident:
    """An adapter that this library has loaded. size: bytes of its file, which its tensors take in memory too."""

    sha256: str
    size: int


class Library(Index):
    """A library whose adapters are loaded on demand.

    memory: what the loaded adapters of a pipeline may take, such as "2GB" or a number of bytes; None: all stay.
    """

    def __init__(self, folders: Iterable[str | Path], memory: str | int | None = None) -> None:
        """Read what is in `folders`. Raises `ConfigError`."""
        super().__init__(folders)
        self.memory = None if memory is None else _bytes(memory)
        self._residents: weakref.WeakKeyDictionary[Any, dict[str, Resident]] = weakref.WeakKeyDictionary()

    def residents(self, pipeline: Any) -> list[str]:
        """Return the names of the adapters that are loaded on `pipeline` by this library, the longest unused first."""
        return list(self._residents.get(pipeline, {}))

    def apply(self, pipeline: Any, strengths: Mapping[str, Given]) -> None:
        """Make `strengths`, name of an adapter -> strength (see `vislora.set_strengths`), the stack of `pipeline`.

        What is missing, or has changed on the disk, is loaded; this library's others stay at 0, as long as the budget
        allows. Adapters that were loaded without it are left alone. Raises `ConfigError` for an unknown name and for a
        stack beyond the budget, and what `load` and `set_strengths` do; the pipeline is then as it was.
        """
        wanted = {name: self.current(self.find(name)) for name in strengths}
        self._require_room(wanted)
        before = loaded_strengths(pipeline)
        residents = self._residents.setdefault(pipeline, {})
        for name in [name for name in residents if name not in before]:  # ejected by somebody else
            del residents[name]
        stale = [name for name, entry in wanted.items() if name in residents and residents[name].sha256 != entry.sha256]
        missing = [name for name in wanted if name not in residents]
        done: list[str] = []
        try:
            for name in missing:
                load(pipeline, wanted[name].path, 0.0, name)
                done.append(name)
            for name in stale:  # under another name first, so that a bad file leaves all as it is
                load(pipeline, wanted[name].path, 0.0, f"{name} (new)")
                done.append(f"{name} (new)")
            idle = {name: 0.0 for name in residents if name not in wanted}
            set_strengths(pipeline, {**idle, **strengths})
        except BaseException:
            for name in done:
                eject(pipeline, name)
            set_strengths(pipeline, before)
            raise
        for name in stale:
            eject(pipeline, f"{name} (new)")
            eject(pipeline, name)
            load(pipeline, wanted[name].path, strengths[name], name)
        for name, entry in wanted.items():
            residents.pop(name, None)
            residents[name] = Resident(entry.sha256, entry.size)
        self._evict(pipeline, residents, len(wanted))

    def _evict(self, pipeline: Any, residents: dict[str, Resident], used: int) -> None:
        """Eject the longest unused of the idle adapters until the rest is within the budget."""
        if self.memory is None:
            return
        for name in list(residents)[: len(residents) - used]:
            if sum(item.size for item in residents.values()) <= self.memory:
                return
            eject(pipeline, name)
            del residents[name]

    def _require_room(self, wanted: Mapping[str, Entry]) -> None:
        total = sum(entry.size for entry in wanted.values())
        if self.memory is not None and total > self.memory:
            raise ConfigError(
                f"this stack takes {total / 1e6:.1f} MB, the library may hold {self.memory / 1e6:.1f} MB: "
                "raise `memory`, or use fewer or smaller adapters (vislora resize)"
            )


def _bytes(given: str | int) -> int:
    try:
        return int(TypeAdapter(ByteSize).validate_python(given))
    except ValidationError:
        raise ConfigError(f"memory is {given!r}: give a number of bytes, or such as '2GB'") from None
