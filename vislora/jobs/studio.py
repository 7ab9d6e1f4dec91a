"""A loaded base with its adapters, and making images with it: shared by `generate` and the previews of `train`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, groupby
from pathlib import Path

import torch
from PIL import Image

from vislora import formats
from vislora.files import reserving
from vislora.inject.engines import merge, unmerge
from vislora.jobs.devices import DTYPES, pick_device, pick_precision
from vislora.jobs.pipelines import attach, set_strengths
from vislora.jobs.recipes import Recipe, adapter_hash, adapter_rows, base_hash, save_png, threads, versions
from vislora.models.base import EMBEDDED, Family, load_family
from vislora.models.sampling import Sampling, Shot, make_images
from vislora.records import Note, Progress


@dataclass(frozen=True)
class Picture:
    """One image made, and its PNG."""

    path: Path
    recipe: Recipe

    @property
    def image(self) -> Image.Image:
        """Read the image: thousands of pictures are not held in memory."""
        with Image.open(self.path) as image:
            return image.copy()


@dataclass(frozen=True)
class Job:
    """A shot and the stack (name of a loaded adapter -> strength) that it is made with."""

    shot: Shot
    strengths: dict[str, float]


@dataclass
class Studio:
    """What is needed to make images and to say how they were made.

    `paths`, `hashes`: name of a loaded adapter -> its file, and the hash that it had when it was loaded. `stack`: the
    strengths that are set now.
    """

    family: Family
    base: str
    base_hash: str
    precision: str
    device: torch.device
    paths: dict[str, Path] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    stack: dict[str, float] = field(default_factory=dict)

    def load(self, name: str, path: Path, allow_partial: bool = False, allow_pickle: bool = False) -> Iterator[Note]:
        """Load an adapter at strength 0; yields what was odd in its file, and a note for every module without a fit."""
        adapter_file = formats.load(path, allow_pickle)
        yield from (Note(f"adapter '{name}': {line}") for line in adapter_file.notes)
        misfits = attach(self.family.pipeline, adapter_file, name, 0.0, allow_partial)
        self.paths[name], self.hashes[name] = path, adapter_hash(path)
        for line in misfits:
            yield Note(f"adapter '{name}': not applied: {line}", "warning")

    def set_stack(self, strengths: dict[str, float]) -> str:
        """Give every loaded adapter its strength (0 unless named), merge when that is exact enough, and say which.

        In float32 the deltas are merged into a second buffer; in half precision a merge would round small deltas
        away, so there the adapters compute beside the base.
        """
        engine = "merged" if self.precision == "fp32" else "stacked"
        wanted = {name: strengths.get(name, 0.0) for name in self.paths}
        if wanted != self.stack:
            set_strengths(self.family.pipeline, wanted)
            for module in self.family.components.values():
                (merge if engine == "merged" else unmerge)(module)
            self.stack = wanted
        return engine

    def shoot(
        self, shots: Sequence[Shot], strengths: dict[str, float], how: Sampling
    ) -> list[tuple[Image.Image, Recipe]]:
        """Make one batch with one stack; returns each image with its recipe."""
        engine = self.set_stack(strengths)
        rows = adapter_rows(self.paths, self.hashes, strengths)
        images = next(make_images(self.family, shots, how, len(shots)))
        return [(image, self._recipe(rows, how, tuple(shots), index, engine)) for index, image in enumerate(images)]

    def _recipe(
        self, rows: tuple[dict, ...], how: Sampling, batch: tuple[Shot, ...], index: int, engine: str
    ) -> Recipe:
        return Recipe(
            base=self.base,
            base_hash=self.base_hash,
            adapters=rows,
            sampling=how,
            batch=batch,
            index=index,
            device=str(self.device),
            precision=self.precision,
            engine=engine,
            threads=threads(),
            versions=versions(),
        )


def open_studio(base: str, device: str, precision: str) -> Studio:
    """Load a base for generation ('' is the embedded one). Raises `ModelError` or `ConfigError`."""
    where = pick_device(device)
    kind = pick_precision(precision, where)
    family = load_family(base or None, DTYPES[kind], where)
    return Studio(family, base, base_hash(Path(base) if base else EMBEDDED), kind, where)


def make(
    studio: Studio, jobs: Sequence[Job], how: Sampling, batch_size: int, output: Path
) -> Iterator[Progress | Picture]:
    """Make the images of `jobs` in order and write each as a PNG; neighbours with the same stack share batches."""
    numbers = free_numbers(output)
    done = 0
    for _, group in groupby(jobs, key=lambda job: sorted(job.strengths.items())):
        same = list(group)
        for start in range(0, len(same), batch_size):
            batch = same[start : start + batch_size]
            for image, recipe in studio.shoot([job.shot for job in batch], batch[0].strengths, how):
                yield save_numbered(image, output, numbers, recipe)
            done += len(batch)
            yield Progress("generating", done, len(jobs))


def save_numbered(image: Image.Image, folder: Path, numbers: Iterator[int], recipe: Recipe) -> Picture:
    """Write a PNG under the first of `numbers` that is free, such as 00007-42.png for seed 42.

    Several processes may write into one folder at once: no two get one number.
    """
    places = (folder / f"{number:05d}" for number in numbers)
    with reserving(places, taken=lambda place: any(folder.glob(f"{place.name}-*.png"))) as place:
        path = place.with_name(f"{place.name}-{recipe.shot.seed}.png")
        save_png(image, path, recipe)
    return Picture(path, recipe)


def free_numbers(folder: Path) -> Iterator[int]:
    """Count up from the first number that no PNG in `folder` begins with: an image is never overwritten."""
    found = (re.match(r"(\d{5,})-.*\.png$", path.name) for path in folder.glob("*.png"))
    return count(max((int(match[1]) for match in found if match), default=-1) + 1)
