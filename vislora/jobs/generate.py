"""`vislora generate`: images from prompts and a stack of adapters; every PNG says how to make it again."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from itertools import chain, count
from pathlib import Path
from typing import Any

from PIL import Image

from vislora.config.generate import GenerateConfig
from vislora.config.stack import SETTINGS, ComposeConfig
from vislora.errors import AdapterFileError, ConfigError, ModelError
from vislora.files import content_hash, replacing, reserving
from vislora.inject.strength import Strength
from vislora.jobs.pipelines import explain
from vislora.jobs.prompts import Prompt, find_adapter, label_adapters, parse_adapter, parse_prompt, read_prompts
from vislora.jobs.recipes import read_recipe, threads, versions
from vislora.jobs.sources import Source
from vislora.jobs.stacks import label_once
from vislora.jobs.strengths import declared
from vislora.jobs.studio import Job, Picture, Studio, batches, free_numbers, make, open_studio, save_numbered
from vislora.models.base import Family
from vislora.models.emphasis import as_read, has_weights, reads_weights
from vislora.models.sampling import Sampling, Shot, cut_off, picture_step, pipeline_for
from vislora.models.schedulers import own_eta, scheduler_for
from vislora.records import Done, Note, Progress, Record, result
from vislora.registry import COMPOSITIONS
from vislora.reports.sheet import contact_sheet

CHANGE = 0.6
"""How much of an image that is started from changes, when nothing is said."""


def generate(**settings: Any) -> list[Picture]:
    """Make images; `settings` are the fields of `GenerateConfig`. Returns the pictures, in the order of the prompts."""
    return result(run(GenerateConfig.of(settings)))


def run(config: GenerateConfig) -> Iterator[Record]:
    """Make the images of `config`, or repeat the one of `config.like`; yields progress, then the pictures."""
    if config.like is not None:
        yield from _repeat(config, config.like)
        return
    prompts = [parse_prompt(raw) for raw in read_prompts(config.prompt, config.prompts)]
    always = _always(config)
    named = dict.fromkeys([*always, *(name for prompt in prompts for name in prompt.strengths)])
    labels, paths = label_adapters(named, config.adapters)
    source = None if config.source is None else Source.of(config.source)
    studio = open_studio(config.base, config.device, config.precision, config.base_parts, config.quantize)
    studio.source = source
    how = sampling(studio.family, config)
    pipeline_for(studio.family, config.source is not None, how)
    for label, path in paths.items():
        yield from studio.load(label, path, config.allow_partial, config.allow_pickle)
    said = [config.negative_prompt, *(prompt.text for prompt in prompts)]
    for path in config.embedding:
        yield from studio.learn(path, said, config.allow_pickle)
    studio.set_composition(config.compose)
    jobs = [
        Job(Shot(prompt.text, config.negative_prompt, config.seed + number), _stack(always, prompt, labels))
        for prompt in prompts
        for number in range(config.count)
    ]
    if config.negative_prompt and not studio.family.card.negative_prompt:
        yield Note("negative_prompt: this base reads none; it has no effect", "warning")
    if any(map(has_weights, said)) and not reads_weights(studio.family):
        yield Note("this base reads the weights in prompts as text", "warning")
    for end in cut_off(studio.family, [prompt.text for prompt in as_read(studio.family, said)]):
        yield Note(f"a prompt is too long for this base; not read: '{end}'", "warning")
    if config.explain:
        yield from _explained(studio, jobs, studio.at_once(config.batch_size))
    pictures: list[Picture] = []
    yield from _collect(make(studio, jobs, how, studio.at_once(config.batch_size), config.output), pictures)
    lines = [str(picture.path) for picture in pictures]
    if config.sheet:
        path = yield from _sheet(studio, jobs, how, config, pictures)
        lines.append(str(path))
    yield Done(pictures, "\n".join(lines))


def sampling(family: Family, config: GenerateConfig) -> Sampling:
    """Return how images are made: the settings, and the base's own where they are silent."""
    traits, step = family.traits, picture_step(family)
    sides = {"width": config.width or traits.resolution, "height": config.height or traits.resolution}
    wrong = [f"{name}: {side} is no multiple of {step}" for name, side in sides.items() if side % step]
    if wrong:
        raise ConfigError(wrong, where="this base makes no image of that size:")
    change = CHANGE if config.change is None and config.source and not traits.source else config.change
    return Sampling(
        steps=config.steps or traits.steps,
        guidance_scale=traits.guidance_scale if config.guidance_scale is None else config.guidance_scale,
        scheduler=config.scheduler,
        change=change,
        eta=_eta(family, config),
        **sides,
    )


def _eta(family: Family, config: GenerateConfig) -> float:
    """Return the noise between steps. Raises `ConfigError` for a sampler without, and one that the base has not."""
    own = own_eta(scheduler_for(family.pipeline, config.scheduler))
    if own is None and config.eta is not None:
        raise ConfigError(f"eta: the sampler '{config.scheduler}' takes none; of diffusion models, ddim and tcd do")
    return (own or 0.0) if config.eta is None else config.eta


def _always(config: GenerateConfig) -> dict[str, Strength]:
    """Return the adapters of every prompt. Raises `ConfigError` for one given twice, by whatever names."""
    given = [(table.adapter, declared(table)) for table in config.stack]
    given += [(name, Strength(value)) for name, value in map(parse_adapter, config.adapter)]
    label_once([name for name, _ in given], config.adapters)
    return dict(given)


def _stack(always: dict[str, Strength], prompt: Prompt, labels: dict[str, str]) -> dict[str, Strength]:
    """Return the strengths of one prompt: those of all prompts, and over them those that its own text names."""
    return {labels[name]: strength for name, strength in [*always.items(), *prompt.strengths.items()]}


def _explained(studio: Studio, jobs: list[Job], batch_size: int) -> Iterator[Note]:
    """Say how the stacks are computed; batches that are alike are told once."""
    told: set[str] = set()
    for _, stacks in batches(jobs, batch_size, studio.compose):
        studio.set_stacks(stacks)
        lines = explain(studio.family.pipeline)
        if "\n".join(lines) not in told:
            told.add("\n".join(lines))
            yield from map(Note, lines)


def _collect(records: Iterator[Progress | Picture], pictures: list[Picture], task: str = "") -> Iterator[Progress]:
    """Move the pictures into `pictures` and pass the progress on, under the name `task` when one is given."""
    for record in records:
        if isinstance(record, Picture):
            pictures.append(record)
        else:
            yield Progress(task or record.task, record.done, record.total)


def _sheet(
    studio: Studio, jobs: list[Job], how: Sampling, config: GenerateConfig, stacked: list[Picture]
) -> Generator[Progress, None, Path]:
    """Make every job in the sheet's other ways too, write them all as one picture; return its path."""
    columns: list[tuple[str, list[Image.Image]]] = []
    for label, compose, part in _columns(studio, jobs, config):
        pictures: list[Picture] = []
        studio.set_composition(compose)
        folder = config.output / label.replace("/", "-")
        made = make(studio, part, how, studio.at_once(config.batch_size), folder)
        yield from _collect(made, pictures, f"sheet: {label}")
        columns.append((label.replace("/", "-"), [picture.image for picture in pictures]))
    if studio.paths:
        label = next(iter(studio.paths)) if len(studio.paths) == 1 else "stack"
        label = label if config.compose.method == "sum" else config.compose.method
        label += "-by-prompt" if config.compose.by_prompt else ""
        columns.append((label, [picture.image for picture in stacked]))
    rows = list(zip(*(images for _, images in columns), strict=True))
    sheet = contact_sheet(rows, [job.shot.prompt for job in jobs], [label for label, _ in columns])
    names = chain(["sheet"], (f"sheet-{number}" for number in count(2)))  # an image is never overwritten
    with reserving(config.output / f"{name}.png" for name in names) as path, replacing(path) as temporary:
        sheet.save(temporary, format="PNG")
    return path


def _columns(studio: Studio, jobs: list[Job], config: GenerateConfig) -> Iterator[tuple[str, ComposeConfig, list[Job]]]:
    """Yield what the sheet shows beside the stack itself: the base, each adapter alone, the other compositions."""
    plain = ComposeConfig()
    yield "base", plain, [Job(job.shot, {}) for job in jobs]
    if len(studio.paths) < 2:
        return
    for name in studio.paths:
        yield name, plain, [Job(job.shot, {name: job.strengths.get(name, Strength(1.0))}) for job in jobs]
    for method in COMPOSITIONS if config.compositions else ():
        names = {"content": config.compose.content, "style": config.compose.style} if method == "klora" else {}
        if None not in names.values():
            yield from ((label, made, jobs) for label, made in _ways(method, names, config.compose))


def _ways(method: str, names: dict[str, Any], chosen: ComposeConfig) -> Iterator[tuple[str, ComposeConfig]]:
    """Yield a method as it is and, where the chosen one weighs by the prompt, so too; without the chosen one itself."""
    if method != chosen.method or chosen.by_prompt:
        yield method, ComposeConfig.of({"method": method, **names})
    if chosen.by_prompt and method != chosen.method and "shares" in SETTINGS[method]:
        yield f"{method}-by-prompt", ComposeConfig.of({"method": method, "by_prompt": True, "words": chosen.words})


def _repeat(config: GenerateConfig, source: Path) -> Iterator[Record]:
    """Make the image of a recipe again: same base, adapters, batch. Raises a `VisloraError` when one has changed."""
    recipe = read_recipe(source)
    studio = open_studio(recipe.base, config.device, recipe.precision, recipe.base_parts, recipe.quantize)
    if studio.base_hash != recipe.base_hash:
        raise ModelError(f"like: the base '{recipe.base or 'embedded'}' is not the one that {source} was made with")
    for row in recipe.adapters:
        path = find_adapter(row["path"], config.adapters)
        if content_hash(path) != row["sha256"]:
            raise AdapterFileError(f"like: {path} has changed since {source} was made")
        yield from studio.load(row["name"], path, config.allow_partial, config.allow_pickle)
    said = [text for shot in recipe.batch for text in (shot.prompt, shot.negative_prompt)]
    for row in recipe.embeddings:
        path = Path(row["path"])
        if not path.is_file() or content_hash(path) != row["sha256"]:
            raise AdapterFileError(f"like: the embedding {path} is gone or has changed since {source} was made")
        yield from studio.learn(path, said, config.allow_pickle)
    now = {**versions(), "device": str(studio.device), "threads": str(threads())}
    then = {**recipe.versions, "device": recipe.device, "threads": str(recipe.threads)}
    changed = [f"{name} was {then.get(name)}, is {now[name]}" for name in now if now[name] != then.get(name)]
    if changed:
        yield Note(f"the last bits may differ: {'; '.join(changed)}", "warning")
    studio.set_composition(ComposeConfig.of(recipe.compose))
    studio.source = recipe.source
    if recipe.source is not None and Source.of(Path(recipe.source.path)) != recipe.source:
        raise ConfigError(f"like: the source image, {recipe.source.path}, has changed since {source} was made")
    image, again = studio.shoot(recipe.batch, recipe.stacks, recipe.sampling)[recipe.index]
    picture = save_numbered(image, config.output, free_numbers(config.output), again)
    yield Done([picture], str(picture.path))
