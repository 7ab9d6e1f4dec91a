"""Regular expressions that a file brings along, matched in a time that grows with their length only. Torch-free.

    "to_k"                             any module whose last name is to_k
    "^mid_block.attentions.0.proj_in"  one module, as diffusers writes it
    "(down|up)_blocks\\..*attn1"        a real expression

`re` tries the ways to match one after the other: `(a+)+$` takes it longer than a life. Here all states of the
expression go through the text together (Thompson's automaton); only single characters are left to `re`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from vislora.errors import AdapterFileError

LONGEST = 500
MOST_STATES = 2000
_NAME = re.compile(r"\^?[\w.-]+")
_TOKEN = re.compile(
    r"(?P<open>\((?:\?:|\?P<\w+>)?(?!\?))"
    r"|(?P<repeat>[*+?]|\{(?:\d+(?:,\d*)?|,\d*)\})\??(?!\+)"
    r"|(?P<sign>[|)^$])"
    r"|(?P<letter>\\[^0-9bBAZ]|\[\^?\]?(?:\\.|[^\]\\])*\]|[^\\(\[*+?])",
    re.DOTALL,
)
_BOUNDS = {"*": (0, None), "+": (1, None), "?": (0, 1)}


class Patterns:
    """What PEFT's `rank_pattern` or `alpha_pattern` says: the first expression that fits a module decides.

    It fits when `re.match(rf"(.*\\.)?({pattern})$", path)` does (peft/utils/other.py, get_pattern_key).
    Raises `AdapterFileError` for an expression that is wrong, too long or looks around.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = list(values.values())
        self._names: dict[str, list[tuple[int, str]]] = {}
        self._machines: list[tuple[int, _Machine]] = []
        for place, pattern in enumerate(values):
            if _NAME.fullmatch(pattern):
                self._names.setdefault(re.split(r"[.^]", pattern)[-1], []).append((place, pattern))
            else:
                self._machines.append((place, _machine(pattern)))

    def find(self, paths: Iterable[str], default: Any) -> Any:
        """Return the value of the first expression that fits one of `paths`, else `default`."""
        first = min((place for path in paths for place in self._fitting(path)), default=None)
        return default if first is None else self._values[first]

    def _fitting(self, path: str) -> Iterator[int]:
        for end, named in self._names.items():
            if path.endswith(end):
                yield from (place for place, name in named if _is_named(path, name))
        yield from (place for place, machine in self._machines if machine.matches(path))


def _is_named(path: str, name: str) -> bool:
    """Say whether `path`, or its end after a dot, is `name`, in which a dot stands for any character."""
    plain = name.removeprefix("^")
    start = len(path) - len(plain)
    if start < 0 or (start > 0 and (name != plain or path[start - 1] != ".")):
        return False
    return path.endswith(plain) or all(one in (other, ".") for one, other in zip(plain, path[start:], strict=True))


@dataclass
class _Machine:
    """An automaton. A state's test is what the next letter must be to go on, '^' or '$', or None to go on freely."""

    tests: list[str | None] = field(default_factory=list)
    ways: list[list[int]] = field(default_factory=list)

    def add(self, test: str | None, *ways: int) -> int:
        """Add a state that leads to `ways`, and return its number."""
        if len(self.tests) >= MOST_STATES:
            raise AdapterFileError(f"a pattern of the config repeats too much (more than {MOST_STATES} states)")
        self.tests.append(test)
        self.ways.append(list(ways))
        return len(self.tests) - 1

    def matches(self, text: str) -> bool:
        """Say whether the whole of `text` leads from the last state that was added to the first."""
        states = self._freely([len(self.tests) - 1], text, 0)
        for position, letter in enumerate(text, 1):
            left = [way for state in states if _fits(self.tests[state], letter) for way in self.ways[state]]
            states = self._freely(left, text, position)
        return 0 in states

    def _freely(self, states: list[int], text: str, position: int) -> set[int]:
        """Add what can be reached without a letter."""
        seen: set[int] = set()
        signs = {None} | ({"^"} if position == 0 else set()) | ({"$"} if position == len(text) else set())
        while states:
            state = states.pop()
            if state not in seen:
                seen.add(state)
                states += self.ways[state] if self.tests[state] in signs else ()
        return seen


@lru_cache(4096)
def _fits(test: str | None, letter: str) -> bool:
    return test not in (None, "^", "$") and re.fullmatch(test or "", letter) is not None


def _machine(pattern: str) -> _Machine:
    if len(pattern) > LONGEST:
        raise AdapterFileError(f"a pattern of the config is longer than {LONGEST} characters: {pattern[:60]}...")
    machine = _Machine()
    try:
        re.compile(f"({pattern})")
        tree = _Parser(rf"(?:.*\.)?(?:{pattern})").tree
        _build(machine, tree, machine.add(None))
    except (re.error, OverflowError, RecursionError) as error:
        raise AdapterFileError(f"the config's pattern '{pattern}' is no regular expression: {error}") from error
    return machine


class _Parser:
    """Reads an expression into nested tuples: ("letter" | "sign", text), ("all" | "any", nodes), ("repeat", ...)."""

    def __init__(self, text: str) -> None:
        self._tokens = list(_tokens(text))
        self.tree = self._any()

    def _any(self) -> tuple[Any, ...]:
        branches = [self._all()]
        while self._tokens and self._tokens[0][1] == "|":
            self._tokens.pop(0)
            branches.append(self._all())
        return ("any", branches)

    def _all(self) -> tuple[Any, ...]:
        nodes = []
        while self._tokens and self._tokens[0] not in (("sign", "|"), ("sign", ")")):
            kind, text = self._tokens.pop(0)
            node: tuple[Any, ...] = (kind, text)
            if kind == "open":
                node = self._any()
                self._tokens.pop(0)
            if self._tokens and self._tokens[0][0] == "repeat":
                node = ("repeat", node, *_bounds(self._tokens.pop(0)[1]))
            nodes.append(node)
        return ("all", nodes)


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    position = 0
    while position < len(text):
        found = _TOKEN.match(text, position)
        if found is None or found.lastgroup is None:
            raise AdapterFileError(f"the config's pattern '{text}' looks around or sets flags: write the names out")
        yield found.lastgroup, found[found.lastgroup]
        position = found.end()


def _bounds(text: str) -> tuple[int, int | None]:
    if text in _BOUNDS:
        return _BOUNDS[text]
    low, comma, high = text[1:-1].partition(",")
    return int(low or 0), int(high) if high else None if comma else int(low)


def _build(machine: _Machine, node: tuple[Any, ...], after: int) -> int:
    """Add the states of `node`, which lead to the state `after`; return the one to begin with."""
    kind, content, *bounds = node
    if kind == "any":
        return machine.add(None, *[_build(machine, branch, after) for branch in content])
    if kind == "all":
        for part in reversed(content):
            after = _build(machine, part, after)
        return machine.add(None, after)
    if kind in ("letter", "sign"):
        return machine.add(content, after)
    low, high = bounds
    if high is None:
        loop = machine.add(None, after)
        machine.ways[loop].append(_build(machine, content, loop))
        after = loop
    for _ in range((high or low) - low):
        after = machine.add(None, after, _build(machine, content, after))
    for _ in range(low):
        after = _build(machine, content, after)
    return machine.add(None, after)
