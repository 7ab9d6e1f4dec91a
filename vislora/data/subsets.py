"""Parts of a training folder by patterns over the images' names: how often each is seen, and its trigger."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vislora.errors import DataError, listed, nearest
from vislora.globs import matches


@dataclass(frozen=True)
class Subset:
    """A pattern over the names of images within the folder, and what its images get.

    repeats: how often each is seen in an epoch. trigger: put before the captions that lack it.
    """

    pattern: str = "*"
    repeats: int = 1
    trigger: str | None = None


def subset_of(name: str, subsets: Sequence[Subset]) -> Subset:
    """Return the first of `subsets` that fits the `name` of an image, or one that changes nothing."""
    return next((subset for subset in subsets if matches(subset.pattern, name)), Subset())


def require_images(subsets: Sequence[Subset], names: Sequence[str]) -> None:
    """Raise `DataError` for each pattern that no image is left for; the last, which takes the rest, may have none."""
    taken = {subset_of(name, subsets) for name in names}
    folders = {name.rpartition("/")[0] for name in names}
    known = [*(f"{folder}/*" for folder in sorted(folders) if folder), *names]
    lines = []
    for pattern in (subset.pattern for subset in subsets[:-1] if subset not in taken):
        fits = any(matches(pattern, name) for name in names)
        reason = "its images belong to a pattern before it" if fits else f"matches no image{nearest(pattern, known)}"
        lines.append(f"'{pattern}': {reason}")
    if lines:
        raise DataError(listed("patterns of data.subsets without images:", lines))


def subset_notes(subsets: Sequence[Subset], names: Sequence[str]) -> Iterator[str]:
    """Yield how many images each has, and their part of an epoch."""
    found = [subset_of(name, subsets) for name in names]
    shown = sum(subset.repeats for subset in found)
    for subset in subsets:
        count = found.count(subset)
        times = "once" if subset.repeats == 1 else f"{subset.repeats} times"
        if count:
            yield f"'{subset.pattern}': {count} image(s), {times} an epoch: {count * subset.repeats / shown:.0%} of it"
