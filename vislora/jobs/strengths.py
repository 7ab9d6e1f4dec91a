"""Strengths as people write them and as recipes keep them.

[[stack]]      adapter = "ink", strength = 0.8, components = {te = 0.5}, steps = [0.2, 0.8]
in a prompt    <lora:ink:0.8:te=0.5:steps=0.2-0.8>
in a recipe    {"value": 0.8, "components": {"te": 0.5}, "steps": [0.2, 0.8]}, or just 0.8
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from vislora.config.stack import StackedConfig
from vislora.errors import ConfigError
from vislora.inject.region import Region
from vislora.inject.strength import Strength, strength_in_range

_COMPONENT = re.compile(r"denoiser|te(\.\w+)?")
_WINDOW = re.compile(r"([\d.]+)-([\d.]+)")


def declared(table: StackedConfig) -> Strength:
    """Return the strength of one `[[stack]]` table. Raises `ConfigError`, naming the adapter."""
    with _of(f"stack: '{table.adapter}'"):
        region = read_mask(table.region) if isinstance(table.region, Path) else table.region
        steps: Any = table.steps  # a strength checks its steps itself, and says more of them
        return Strength(table.strength, table.components, table.layers, steps, region)


def read_mask(path: Path) -> Image.Image:
    """Return a mask image as grey, 0 (outside) to 255. Raises `ConfigError` when it cannot be read."""
    try:
        with Image.open(path) as image:
            return image.convert("L")
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(f"region: the mask {path} cannot be read as an image ({error})") from None


def parse_parts(name: str, parts: Sequence[str]) -> Strength:
    """Return the strength that the parts of `<lora:name:part:part>` tell; 1 without any.

    A part without `=` is the value, and comes first. `steps=0.2-0.8` is a window, `steps=0@1,0.7@0` are points
    progress@factor; `region=0,0,0.5,1` is a box; `denoiser=`, `te=` and `te.clip_g=` are components; any other name is
    a pattern over layers. Raises `ConfigError`, naming the tag.
    """
    value, rest = 1.0, list(parts)
    if rest and "=" not in rest[0]:
        first = rest.pop(0)
        value = strength_in_range(name, _number(f"the strength of '{name}'", first)) if first else 1.0
    components, layers, others = {}, {}, {}
    with _of(f"<lora:{':'.join([name, *parts])}>"):
        for part in rest:
            key, equals, text = part.partition("=")
            if not equals or not key:
                raise ConfigError(f"'{part}' is no part of a tag: write NAME=VALUE, and the strength first")
            if key == "steps":
                others[key] = _steps(text)
            elif key == "region":
                others[key] = tuple(_number(key, side) for side in text.split(","))
            elif _COMPONENT.fullmatch(key):
                components[key.replace(".", ":")] = _number(key, text)
            else:
                layers[key] = _number(key, text)
        return Strength(value, components, layers, **others)


def tag(name: str, strength: Strength) -> str:
    """Return the tag of a prompt that `parse_parts` reads back; masks and patterns with a colon have no place there."""
    parts = [f"{strength.value:g}"]
    parts += [f"{key.replace(':', '.')}={factor:g}" for key, factor in strength.components.items()]
    parts += [f"{key}={factor:g}" for key, factor in strength.layers.items() if not re.search(r"[:<>=]", key)]
    steps, region = strength.steps, strength.region
    if isinstance(steps, tuple):
        ends = [item for item in steps if not isinstance(item, tuple)]
        text = "-".join(f"{end:g}" for end in ends) if ends else ",".join(f"{at:g}@{to:g}" for at, to in steps)  # type: ignore[misc]
        parts.append(f"steps={text}")
    if region is not None and region.box is not None:
        parts.append("region=" + ",".join(f"{side:g}" for side in region.box))
    return f"<lora:{':'.join([name, *parts])}>"


def as_json(strength: Strength) -> Any:
    """Return a strength as JSON values, whole: a mask is kept as the text of a PNG. A plain one is its number."""
    if strength.is_plain:
        return strength.value
    found: dict[str, Any] = {"value": strength.value}
    found |= {key: dict(getattr(strength, key)) for key in ("components", "layers") if getattr(strength, key)}
    if strength.steps is not None:
        found["steps"] = [list(item) if isinstance(item, tuple) else item for item in strength.steps]  # type: ignore[union-attr]
    if strength.region is not None:
        found["region"] = _region_as_json(strength.region)
    return found


def from_json(found: Any) -> Strength:
    """Return the strength that `as_json` was given. Raises `ConfigError`, `TypeError` or `ValueError`."""
    if not isinstance(found, Mapping):
        return Strength(found)
    region = found.get("region")
    if isinstance(region, str):
        with Image.open(io.BytesIO(base64.b64decode(region)), formats=["PNG"]) as image:
            region = image.convert("L")
    return Strength(**{**found, "region": region})


def _region_as_json(region: Region) -> Any:
    if region.box is not None:
        return list(region.box)
    assert region.mask is not None
    levels = (region.mask * 255.0).round().to(torch.uint8).numpy()  # masks of files have 256 levels: nothing is lost
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(levels)).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _steps(text: str) -> Any:
    window = _WINDOW.fullmatch(text)
    if window:
        return tuple(_number("steps", end) for end in window.groups())
    pairs = [point.partition("@") for point in text.split(",")]
    if not all(at for _, at, _ in pairs):
        raise ConfigError(f"steps is '{text}': write a window such as 0.2-0.8, or points such as 0@1,0.7@0")
    return tuple((_number("steps", progress), _number("steps", factor)) for progress, _, factor in pairs)


def _number(what: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{what} is '{text}', which is no number") from None


@contextmanager
def _of(what: str) -> Iterator[None]:
    """Say in every problem what it is of."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError([f"{what}: {problem}" for problem in error.problems]) from None
