"""Aspect-ratio buckets: every image gets the picture size, of about the same area, that cuts the least off it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from vislora.data.images import cover_box
from vislora.data.listing import shortened
from vislora.data.scan import Example
from vislora.errors import DataError

MAX_ASPECT = 3.0
NOTED_CROP = 0.10


class Bucket(NamedTuple):
    """A picture size in pixels; the images of one batch all have it."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


def bucket_sizes(resolution: int, step: int, max_aspect: float = MAX_ASPECT) -> list[Bucket]:
    """Return the sizes of multiples of `step` whose area is at most resolution squared and neither side can grow.

    `max_aspect`: the long side over the short one, at most; 1 leaves the square alone.
    Raises `DataError` when `resolution` is smaller than `step` or `max_aspect` below 1.
    """
    if step < 1 or resolution < step:
        raise DataError(f"resolution {resolution} is smaller than {step}, the step of this base model's picture sizes")
    if max_aspect < 1:
        raise DataError(f"max_aspect is {max_aspect}; it is the long side over the short one, so 1 or more")
    area = resolution * resolution
    side = resolution // step * step
    sizes = {Bucket(side, side)}
    for short in range(step, side + 1, step):
        long = min(area // short, math.floor(short * max_aspect)) // step * step
        if long * (short + step) > area:
            sizes |= {Bucket(long, short), Bucket(short, long)}
    return sorted(sizes)


def bucket_for(width: int, height: int, sizes: Sequence[Bucket], step: int, upscale: bool = True) -> Bucket:
    """Return the bucket of `sizes` whose aspect is nearest (the larger one of equals).

    Without `upscale`, an image that does not cover it gets a smaller bucket that it covers, at least one `step` a side.
    """
    aspect = math.log(width / height)
    best = min(sizes, key=lambda size: (abs(math.log(size.width / size.height) - aspect), -size.width * size.height))
    if upscale or (width >= best.width and height >= best.height):
        return best
    longest = max(size.width / size.height for size in sizes)
    short = min(width, height)
    limit = math.floor(short * longest)
    area = max(size.width * size.height for size in sizes)
    scale = min(1.0, math.sqrt(area / (min(width, limit) * min(height, limit))))
    return Bucket(*(max(step, int(min(side, limit) * scale) // step * step) for side in (width, height)))


def assign(
    examples: Sequence[Example],
    resolution: int,
    step: int,
    *,
    more: Sequence[int] = (),
    max_aspect: float = MAX_ASPECT,
    upscale: bool = True,
) -> dict[Bucket, list[int]]:
    """Put every example into a bucket: bucket -> places in `examples`, both in ascending order.

    `resolution`: the side of the square whose area no bucket exceeds; `step`: what every side is a multiple of.
    `more`: further resolutions, with a bucket each for an example that need not be enlarged for it; the smallest of all
    takes every example.
    """
    least, *others = sorted({resolution, *more})
    members: dict[Bucket, set[int]] = {}
    for side in (least, *others):
        sizes = bucket_sizes(side, step, max_aspect)
        for index, example in enumerate(examples):
            bucket = bucket_for(example.width, example.height, sizes, step, upscale)
            if side == least or enlargement(example, bucket) <= 1.0:
                members.setdefault(bucket, set()).add(index)
    return {bucket: sorted(members[bucket]) for bucket in sorted(members)}


def cropped_share(example: Example, bucket: Bucket) -> float:
    """Return the share of the image's area, 0 to 1, that its bucket cuts off."""
    left, top, right, bottom = cover_box((example.width, example.height), bucket)
    return max(0.0, 1.0 - (right - left) * (bottom - top) / (example.width * example.height))


def enlargement(example: Example, bucket: Bucket) -> float:
    """Return by how much the image is resized; above 1 it is enlarged."""
    return max(bucket.width / example.width, bucket.height / example.height)


def bucket_summary(members: Mapping[Bucket, Sequence[int]]) -> list[str]:
    """Return a line per bucket: `512x512: 12 images`."""
    return [f"{bucket}: {len(indices)} image{'s' * (len(indices) != 1)}" for bucket, indices in members.items()]


def bucket_notes(examples: Sequence[Example], members: Mapping[Bucket, Sequence[int]]) -> list[str]:
    """Return a line each for the images that lose more than a tenth of their area, and for those that are enlarged."""
    pairs = [(examples[index], bucket) for bucket, indices in members.items() for index in indices]
    notes = []
    cropped = _above(NOTED_CROP, [(cropped_share(*pair), pair[0]) for pair in pairs])
    if cropped:
        names = shortened(f"{name} ({share:.0%})" for share, name in cropped)
        notes.append(f"{len(cropped)} image(s) lose more than {NOTED_CROP:.0%} of their area to the crop: {names}")
    enlarged = _above(1.0, [(enlargement(*pair), pair[0]) for pair in pairs])
    if enlarged:
        names = shortened(f"{name} ({factor:.3g}x)" for factor, name in enlarged)
        notes.append(f"{len(enlarged)} image(s) are smaller than their bucket and get enlarged: {names}")
    return notes


def size_notes(examples: Sequence[Example], members: Mapping[Bucket, Sequence[int]], count: int) -> list[str]:
    """Return a line about the images that have a bucket at fewer than `count` resolutions, for they are too small."""
    times = Counter(index for indices in members.values() for index in indices)
    fewer = [example.path.name for index, example in enumerate(examples) if times[index] < count]
    if not fewer:
        return []
    return [f"{len(fewer)} image(s) are too small for the larger resolutions and not seen there: {shortened(fewer)}"]


def _above(limit: float, values: list[tuple[float, Example]]) -> list[tuple[float, str]]:
    """Return the values above `limit` with the images' names, the largest first, and of one image the largest alone."""
    largest: dict[Path, float] = {}
    for value, example in values:
        largest[example.path] = max(value, largest.get(example.path, value))
    return sorted(((value, path.name) for path, value in largest.items() if value > limit), key=lambda item: -item[0])
