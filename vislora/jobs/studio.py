"""A loaded base with its adapters, and making images with it: shared by `generate` and the previews of `train`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vislora import formats
from vislora.config.stack import ComposeConfig
from vislora.errors import ConfigError, nearest
from vislora.files import content_hash, reserving
from vislora.inject.moment import varies
from vislora.inject.strength import Strength
from vislora.jobs.devices import DTYPES, pick_device, pick_precision
from vislora.jobs.importance import prompt_shares
from vislora.jobs.pipelines import attach, load_embedding, set_composition, set_strengths
from vislora.jobs.recipes import OFF, Recipe, adapter_rows, base_hash, save_png, threads, versions
from vislora.jobs.sources import Source, read_source
from vislora.models.base import Family, load_family
from vislora.models.sampling import Sampling, Shot, make_images
from vislora.models.words import has_word
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
    strengths: dict[str, Strength]


@dataclass
class Studio:
    """What is needed to make images and to say how they were made.

    `paths`, `hashes`, `triggers`: name of a loaded adapter -> its file, the hash that this had when it was loaded, and
    the trigger phrase that it names. `words`: file of an embedding -> its hash. `stack`: the strengths that are set
    now. `source`: the image that it begins with.
    """

    family: Family
    base: str
    base_hash: str
    precision: str
    device: torch.device
    paths: dict[str, Path] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    triggers: dict[str, str] = field(default_factory=dict)
    words: dict[Path, str] = field(default_factory=dict)
    stack: dict[str, Sequence[Strength]] = field(default_factory=dict)
    compose: ComposeConfig = field(default_factory=ComposeConfig)
    source: Source | None = None
    base_parts: str = ""
    quantize: str = "no"

    def load(self, name: str, path: Path, allow_partial: bool = False, allow_pickle: bool = False) -> Iterator[Note]:
        """Load an adapter at strength 0; yields what was odd in its file, and a note for every module without a fit."""
        adapter_file = formats.load(path, allow_pickle)
        yield from (Note(f"adapter '{name}': {line}") for line in adapter_file.notes)
        misfits = attach(self.family.pipeline, adapter_file, name, 0.0, allow_partial)
        self.paths[name], self.hashes[name] = path, content_hash(path)
        self.triggers[name] = adapter_file.metadata.get("modelspec.trigger_phrase", "")
        for line in misfits:
            yield Note(f"adapter '{name}': not applied: {line}", "warning")

    def learn(self, path: Path, prompts: Sequence[str], allow_pickle: bool = False) -> Iterator[Note]:
        """Learn the words of an embedding; yields a note for each that none of the `prompts` has."""
        for word in load_embedding(self.family.pipeline, path, f"embedding {path.stem}", allow_pickle=allow_pickle):
            if not any(has_word(prompt, word) for prompt in prompts):
                yield Note(f"embedding {path}: no prompt has its word '{word}'", "warning")
        self.words[path] = content_hash(path)

    def at_once(self, batch_size: int) -> int:
        """Return how many images are made at once: a text encoder that sees images sees one."""
        return 1 if self.family.traits.source == "latents and text" else batch_size

    def set_composition(self, compose: ComposeConfig) -> None:
        """Choose how the loaded adapters act together. Raises `ConfigError`."""
        odd = [name for name in compose.words if name not in self.paths]
        if odd:
            shown = ", ".join(self.paths) or "none"
            raise ConfigError(
                f"compose.words: no adapter named '{odd[0]}'{nearest(odd[0], self.paths)}; loaded: {shown}"
            )
        if self.paths:
            set_composition(self.family.pipeline, compose.method, **compose.settings)
        self.compose = compose

    def set_stacks(self, stacks: Sequence[Mapping[str, Strength]]) -> str:
        """Give every loaded adapter its strength on each image of a batch (0 unless named); return the engine.

        One strength for all images is merged in float32; see `engines`.
        """
        given = {name: [stack.get(name, OFF) for stack in stacks] for name in self.paths}
        wanted: dict[str, Sequence[Strength]] = {
            name: found if any(one != found[0] for one in found) else found[:1] for name, found in given.items()
        }
        if wanted != self.stack:
            set_strengths(self.family.pipeline, wanted, engine="auto")
            self.stack = wanted
        changes = self.compose.method != "sum" or any(varies(found) for found in wanted.values())
        is_merged = self.precision == "fp32" and not changes
        return "merged" if is_merged else "stacked"

    def shoot(
        self, shots: Sequence[Shot], stacks: Sequence[Mapping[str, Strength]], how: Sampling
    ) -> list[tuple[Image.Image, Recipe]]:
        """Make one batch, each image with its own stack; returns each with its recipe."""
        engine = self.set_stacks(stacks)
        compose = {"method": self.compose.method, **self.compose.settings, **self._shares(shots[0].prompt, stacks[0])}
        if self.compose.by_prompt:
            set_composition(self.family.pipeline, **compose)
        shown = None if self.source is None else read_source(self.source.path, how.width, how.height)
        images = next(make_images(self.family, shots, how, len(shots), shown))
        rows = [adapter_rows(self.paths, self.hashes, stacks, index) for index in range(len(shots))]
        return [
            (image, self._recipe(rows[index], how, tuple(shots), index, engine, compose))
            for index, image in enumerate(images)
        ]

    def _shares(self, prompt: str, stack: Mapping[str, Strength]) -> dict[str, dict[str, float]]:
        """Return the shares of a stack by its words in the prompt, where the composition wants them so."""
        words = {**self.triggers, **self.compose.words}
        active = {name: words[name] for name, strength in stack.items() if strength != OFF}
        if not self.compose.by_prompt or len(active) < 2:
            return {}
        silent = [name for name, phrase in active.items() if not phrase]
        if silent:
            raise ConfigError(f"compose.by_prompt: '{silent[0]}' names no trigger phrase: give compose.words for it")
        return {"shares": prompt_shares(self.family.pipeline, prompt, active)}

    def _recipe(
        self,
        rows: tuple[dict, ...],
        how: Sampling,
        batch: tuple[Shot, ...],
        index: int,
        engine: str,
        compose: dict[str, Any],
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
            compose=compose,
            source=self.source,
            base_parts=self.base_parts,
            quantize=self.quantize,
            embeddings=tuple({"path": str(path), "sha256": digest} for path, digest in self.words.items()),
        )


def open_studio(base: str, device: str, precision: str, parts: str = "", quantize: str = "no") -> Studio:
    """Load a base for generation ('' is the embedded one). Raises `ModelError` or `ConfigError`."""
    where = pick_device(device)
    kind = pick_precision(precision, where)
    family = load_family(base or None, DTYPES[kind], where, parts or None, quantize)
    return Studio(family, base, base_hash(base, parts), kind, where, base_parts=parts, quantize=quantize)


def batches(
    jobs: Sequence[Job], batch_size: int, compose: ComposeConfig
) -> Iterator[tuple[list[Shot], list[dict[str, Strength]]]]:
    """Yield the shots and stacks of each batch, in order.

    Neighbours share one whatever their stacks are, but under a composition, where they must have the same stack, and
    the same prompt where it depends on that.
    """

    def alike(job: Job) -> Any:
        return None if compose.method == "sum" else (job.strengths, compose.by_prompt and job.shot.prompt)

    for group in (list(found) for _, found in groupby(jobs, key=alike)):
        for start in range(0, len(group), batch_size):
            batch = group[start : start + batch_size]
            yield [job.shot for job in batch], [job.strengths for job in batch]


def make(
    studio: Studio, jobs: Sequence[Job], how: Sampling, batch_size: int, output: Path
) -> Iterator[Progress | Picture]:
    """Make the images of `jobs` in order and write each as a PNG."""
    numbers = free_numbers(output)
    done = 0
    for shots, stacks in batches(jobs, batch_size, studio.compose):
        for image, recipe in studio.shoot(shots, stacks, how):
            yield save_numbered(image, output, numbers, recipe)
        done += len(shots)
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
