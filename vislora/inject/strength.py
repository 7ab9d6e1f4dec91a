"""How strongly an adapter acts: on which component and layers, in which steps, and where in the image.

A `Strength` is a declaration. The strength of one layer at one moment is the product of its parts:

    value * components[component] * layers[first pattern that fits] * steps(progress) * region(place)
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from vislora.errors import ConfigError, nearest
from vislora.globs import matches
from vislora.inject.region import Region
from vislora.inject.targets import near_misses

LARGEST = 100.0
"""A strength or factor beyond it is taken for a mistake."""

Window = tuple[float, float]
Ramp = tuple[tuple[float, float], ...]
Steps = Window | Ramp | Callable[[float], float] | None


@dataclass(frozen=True)
class Strength:
    """The strength of one adapter on one image.

    value: multiplies the trained effect. components: component -> factor; `te` is every text encoder that is not named
    itself. layers: pattern -> factor, where a pattern is a glob (or `re:` and a regular expression) over the path of a
    layer or of a block that it is in; the first that fits decides, layers without one have 1. steps: when it acts, by
    progress, 0 at the first step of a run and 1 at the last; a window (from, to), which includes its start and not its
    end unless that is 1; points (progress, factor), joined by straight lines and constant outside; or a function.
    region: where it acts: a box (left, top, right, bottom), each in [0, 1], or a mask (array, tensor or image, 0 to 1
    or 0 to 255) with the sides of the image, or of its shape.
    Raises `ConfigError` with everything that is wrong.
    """

    value: float = 1.0
    components: Mapping[str, float] = field(default_factory=dict)
    layers: Mapping[str, float] = field(default_factory=dict)
    steps: Steps = None
    region: Any = None

    def __post_init__(self) -> None:
        problems: list[str] = []
        checked = {
            "value": _number("value", self.value, problems),
            "components": _factors("components", self.components, problems),
            "layers": _factors("layers", self.layers, problems),
            "steps": _steps(self.steps, problems),
            "region": _region(self.region, problems),
        }
        for pattern in _factors("layers", self.layers, []):
            _collect(problems, partial(matches, pattern, ""))
        if problems:
            raise ConfigError(problems, where="a strength that cannot be used:")
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def on(self, component: str, path: str) -> float:
        """Return what holds for one layer in every step and place: value, component and layer."""
        if not self.components and not self.layers:
            return self.value
        return self.value * self._on_component(component) * self._on_layer(path)

    def at(self, progress: float) -> float:
        """Return the factor of the steps at `progress` in [0, 1]. Raises `ConfigError` when a function gives none."""
        if self.steps is None:
            return 1.0
        if callable(self.steps):
            problems: list[str] = []
            found = _number(f"steps({progress:g})", self.steps(progress), problems)
            if problems:
                raise ConfigError(problems)
            return found
        if _is_window(self.steps):
            start, end = self.steps
            return float(start <= progress < end or progress == end == 1.0)  # type: ignore[operator]
        return _on_line(self.steps, progress)  # type: ignore[arg-type]

    @property
    def is_plain(self) -> bool:
        """Say whether this is a number only."""
        return not self.components and not self.layers and self.is_constant

    @property
    def is_constant(self) -> bool:
        """Say whether this is the same in every step and place."""
        return self.steps is None and self.region is None

    def require_known(self, name: str, components: Mapping[str, Iterable[str]]) -> None:
        """Raise `ConfigError` when this names what is not there. `components`: component -> the paths of its layers."""
        known = [*components, *(["te"] if any(map(_is_text, components)) else [])]
        problems = [
            f"'{name}': no component '{component}'{nearest(component, known)}; this pipeline has: {', '.join(known)}"
            for component in self.components
            if component not in known
        ]
        paths = [path for found in components.values() for path in found] if self.layers else []
        for pattern in self.layers:
            if not any(covers(pattern, path) for path in paths):
                blocks = [block for path in paths for block in with_blocks(path)]
                near = ", ".join(near_misses(pattern, blocks)) or "none"
                problems.append(f"'{name}': pattern '{pattern}' matches no layer and no block; near misses: {near}")
        if problems:
            raise ConfigError(problems)

    def _on_component(self, component: str) -> float:
        of_text = self.components.get("te", 1.0) if _is_text(component) else 1.0
        return self.components.get(component, of_text)

    def _on_layer(self, path: str) -> float:
        return next((factor for pattern, factor in self.layers.items() if covers(pattern, path)), 1.0)


def covers(pattern: str, path: str) -> bool:
    """Say whether `pattern` fits the layer at `path`, or a block that it is in."""
    return any(matches(pattern, block) for block in with_blocks(path))


def with_blocks(path: str) -> Iterator[str]:
    """Yield `path`, then the blocks that it is in, from inside to outside."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        yield ".".join(parts[:count])


def strength_in_range(name: str, strength: Any) -> float:
    """Return `strength` as a float. Raises `ConfigError` when it is not a finite number of sensible size."""
    problems: list[str] = []
    value = _number(f"strength of '{name}'", strength, problems)
    if problems:
        raise ConfigError(problems)
    return value


def per_image(name: str, given: Any) -> tuple[Strength, ...]:
    """Return one `Strength` per image of the batch, or a single one for all of them; None stands for 0.

    Raises `ConfigError`.
    """
    if isinstance(given, Strength):
        return (given,)
    if isinstance(given, Sequence) and not isinstance(given, str):
        if not given:
            raise ConfigError(f"strength of '{name}' is an empty list: give one strength per image of the batch")
        return tuple(_one(name, 0.0 if item is None else item) for item in given)
    return (_one(name, given),)


def _one(name: str, given: Any) -> Strength:
    return given if isinstance(given, Strength) else Strength(strength_in_range(name, given))


def _is_text(component: str) -> bool:
    return component.startswith("te:")


def _number(what: str, given: Any, problems: list[str]) -> float:
    try:
        value = float(given)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value) or abs(value) > LARGEST:
        problems.append(f"{what} is {given!r}: give a finite number between {-LARGEST:g} and {LARGEST:g}")
    return value


def _factors(what: str, given: Any, problems: list[str]) -> dict[str, float]:
    if not isinstance(given, Mapping):
        problems.append(f"{what} is {given!r}: give names with a factor each")
        return {}
    wrong = [key for key in given if not isinstance(key, str)]
    problems += [f"{what}: {key!r} is no name" for key in wrong]
    return {key: _number(f"{what}: '{key}'", value, problems) for key, value in given.items() if key not in wrong}


def _steps(given: Any, problems: list[str]) -> Steps:
    if given is None or callable(given):
        return given
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        problems.append(f"steps is {given!r}: give (from, to), points (progress, factor), or a function of progress")
        return None
    if any(isinstance(item, Sequence) for item in given):
        return _ramp(given, problems)
    ends = tuple(_number("steps", item, problems) for item in given)
    if len(ends) != 2 or not 0.0 <= ends[0] < ends[1] <= 1.0:
        problems.append(f"steps is {tuple(given)}: a window is (from, to) with 0 <= from < to <= 1")
        return None
    return ends[0], ends[1]


def _ramp(given: Sequence[Any], problems: list[str]) -> Ramp:
    if not all(isinstance(point, Sequence) and not isinstance(point, str) and len(point) == 2 for point in given):
        problems.append(f"steps is {list(given)}: every point is (progress, factor)")
        return ()
    points = tuple((_number("steps", x, problems), _number("steps", y, problems)) for x, y in given)
    places = [x for x, _ in points]
    if places != sorted(set(places)) or not 0.0 <= places[0] <= places[-1] <= 1.0:
        problems.append(
            f"steps is {list(points)}: the progress of the points rises from one to the next, within 0 to 1"
        )
    return points


def _region(given: Any, problems: list[str]) -> Region | None:
    if given is None or isinstance(given, Region):
        return given
    found: list[Region] = []
    _collect(problems, lambda: found.append(Region.of(given)))
    return found[0] if found else None


def _collect(problems: list[str], check: Callable[[], Any]) -> None:
    try:
        check()
    except ConfigError as error:
        problems += error.problems


def _is_window(steps: Any) -> bool:
    return not isinstance(steps[0], tuple)


def _on_line(points: Ramp, progress: float) -> float:
    """Return the height of the line through `points` at `progress`."""
    index = bisect_right(points, progress, key=lambda point: point[0])
    if index in (0, len(points)):
        return points[max(index - 1, 0)][1]
    (left, low), (right, high) = points[index - 1 : index + 1]
    return low + (high - low) * (progress - left) / (right - left)
