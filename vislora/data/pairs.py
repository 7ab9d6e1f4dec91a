"""Pairs for models that edit: every training image has a source image, which the model is shown when it makes it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from vislora.data.encode import View
from vislora.data.listing import Listing, list_folder, same_name
from vislora.data.scan import Example, check_images
from vislora.errors import DataError, listed


def find_sources(
    examples: Sequence[Example],
    folder: str | Path,
    sources: str | Path,
    *,
    recursive: bool = True,
    left_out: Iterable[Path] = (),
) -> list[Example]:
    """Return the source image of each example: see `find_beside`. Raises `DataError`."""
    found = find_beside(examples, folder, sources, "source", needed=True, recursive=recursive, left_out=left_out)
    return [source for source in found if source]


def find_beside(
    examples: Sequence[Example],
    folder: str | Path,
    others: str | Path,
    kind: str,
    *,
    needed: bool,
    recursive: bool = True,
    left_out: Iterable[Path] = (),
) -> list[Example | None]:
    """Return the image of this `kind` that goes with each example, with an empty caption, in the same order.

    `folder` is where the examples lie; in `others` an image of the same path, whatever its suffix, goes with it, None
    where there is none and it is not `needed`. `left_out`: images of `folder` that are not used, so that what goes with
    them is of no use either.

    Raises `DataError` with every example without one that is needed, one without an example, several for one example
    and bad ones, all at once; or when there is no such folder.
    """
    listing = list_folder(others, recursive)
    root = Path(folder).expanduser()
    by_name: dict[str, list[Path]] = defaultdict(list)
    for path in listing.images:
        by_name[_name(path, listing.folder)].append(path)
    wanted = [_name(example.path, root) for example in examples]
    unused = {_name(path, root) for path in left_out}
    problems = [f"{listing.name(path)}: {path.suffix} is not supported" for path in listing.unsupported]
    problems += [
        f"{listing.name(path)}: no training image has this name" for path in _surplus(by_name, {*wanted} | unused)
    ]
    problems += [f"{name}: several {kind}s: {_names(paths, listing)}" for name, paths in by_name.items() if paths[1:]]
    if needed:
        pairs = zip(wanted, examples, strict=True)
        problems += [f"{example.path}: no {kind} image" for name, example in pairs if name not in by_name]
    checked = check_images([by_name[name][0] for name in wanted if name in by_name])
    problems += [f"{item.path}: {item.bad}" for item in checked if item.bad]
    if problems:
        title = f"{len(problems)} problem(s) with the {kind} images in {listing.folder}:"
        rule = "each training image needs one" if needed else "a training image may have one"
        steps = f"{rule} {kind} image of the same name, in the same subfolder (see docs/training.md)"
        raise DataError(f"{listed(title, problems, limit=len(problems))}\n{steps}")
    found = {item.path: Example(item.path, "", item.width, item.height, item.sha256) for item in checked}
    return [found[by_name[name][0]] if name in by_name else None for name in wanted]


def source_views(views: Sequence[Sequence[View]], sources: Sequence[Example]) -> list[list[View]]:
    """Return the views of the sources that go with those of the examples: cut to the same bucket at the same place."""
    return [
        [replace(view, example=source) for view in its_views] for its_views, source in zip(views, sources, strict=True)
    ]


def _name(path: Path, folder: Path) -> str:
    return same_name(path.relative_to(folder).with_suffix("").as_posix())


def _surplus(by_name: dict[str, list[Path]], known: set[str]) -> list[Path]:
    return [path for name, paths in by_name.items() if name not in known for path in paths]


def _names(paths: Sequence[Path], listing: Listing) -> str:
    return ", ".join(map(listing.name, paths))
