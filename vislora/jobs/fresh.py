"""What a training run learns: fresh adapters on the components of a base, and words, as its settings say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vislora import formats
from vislora.config.train import TrainConfig
from vislora.errors import AdapterMismatchError, ConfigError, listed
from vislora.formats.adapter_file import DORA_ON
from vislora.formats.names import FAMILY_NAMES
from vislora.inject.injection import FileModule, eject
from vislora.inject.parts import Dropout
from vislora.inject.targets import Target, select
from vislora.inject.trained import AdapterSet, Begin, FreshOptions, inject_trained
from vislora.jobs.pipelines import by_component
from vislora.models.base import Family
from vislora.models.words import LearnedWords, has_word

FRESH = "training"
"""What the adapter is called on the model while it trains."""


@dataclass(frozen=True)
class Learned:
    """What is learned: an adapter on each component, and words beside them, if any."""

    adapters: Mapping[str, AdapterSet]
    words: LearnedWords | None


@contextmanager
def learning(
    config: TrainConfig, family: Family, chosen: Mapping[str, Begin], captions: Sequence[str]
) -> Iterator[Learned]:
    """Give what is learned, as it is at first; the base is as it was at the end.

    Raises `ConfigError` for a layer that its algorithm does not fit, a word that no caption has, or a base that learns
    no words; `AdapterMismatchError` for an adapter to go on from that does not fit the base.
    """
    with _injected(config, family, chosen) as adapters, _learning_words(config, family, captions) as words:
        yield Learned(adapters, words)


@contextmanager
def _injected(config: TrainConfig, family: Family, chosen: Mapping[str, Begin]) -> Iterator[dict[str, AdapterSet]]:
    """Give adapters on the denoiser and, when asked for, on every text encoder, with all the rest frozen.

    They are taken off at the end, and when one of the components could not have its adapter.
    """
    options = fresh_options(config)
    adapters: dict[str, AdapterSet] = {}
    try:
        for name, begin in chosen.items():
            adapters[name] = inject_trained(family.components[name], FRESH, begin, options)
        yield adapters
    finally:
        for name in adapters:
            eject(family.components[name], FRESH)


@contextmanager
def _learning_words(config: TrainConfig, family: Family, captions: Sequence[str]) -> Iterator[LearnedWords | None]:
    """Give the words that are learned with the adapter, None where there are none; they are taken back at the end."""
    words = {item.word: (item.vectors, item.begin) for item in config.adapter.words}
    if not words:
        yield None
        return
    lost = [word for word in words if not any(has_word(caption, word) for caption in captions)]
    if lost:
        raise ConfigError(f"adapter.words: no caption has the word {lost[0]!r} in it")
    try:
        learned = LearnedWords(family.pipeline, FRESH, words)
    except AdapterMismatchError as error:
        raise ConfigError(f"adapter.words: {error}") from None
    try:
        yield learned
    finally:
        learned.close()


def chosen_layers(config: TrainConfig, family: Family) -> Mapping[str, Begin]:
    """Return component -> what is trained: path -> target, or the modules of the adapter that is gone on from.

    Raises `ConfigError` for a pattern without layers, for magnitudes on what cannot have them, and for an adapter of
    which something would be lost; `AdapterFileError` for a file that cannot be read.
    """
    adapter = config.adapter
    if adapter.begin is not None:
        return _begun(adapter.begin, family, adapter.text_encoders)
    default = Target("", adapter.rank, adapter.alpha, adapter.algorithm)
    targets = [
        Target(
            item.pattern,
            adapter.rank if item.rank is None else item.rank,
            adapter.alpha if item.alpha is None else item.alpha,
            item.algorithm or adapter.algorithm,
            item.learning_rate,
        )
        for item in adapter.targets
    ]
    chosen = {"denoiser": select(family.components["denoiser"], targets, adapter.preset, default)}
    if adapter.text_encoders:
        for component in _text_encoders(family):
            chosen[component] = select(family.components[component], [], "attention-ff", default)
    kinds = {target.algorithm for layers in chosen.values() for target in layers.values()}
    if adapter.dora and not kinds <= DORA_ON:
        fitting = ", ".join(sorted(DORA_ON))
        raise ConfigError(f"adapter.dora: goes with {fitting}, and not with {min(kinds - DORA_ON)}")
    return chosen


def _begun(path: Path, family: Family, text_encoders: bool) -> dict[str, list[FileModule]]:
    """Return component -> modules of the adapter at `path`."""
    read = formats.load(path)
    lost = [*(f"the word '{name}'" for name in read.embeddings), *read.extras]
    if lost:
        raise ConfigError(listed(f"adapter.begin: {path} holds more than can be gone on from:", lost, limit=5))
    found = by_component(read, family.components)
    absent = [component for component in found if component not in family.components]
    if absent:
        raise ConfigError(f"adapter.begin: {path} has modules for {absent[0]}, which this base has not")
    if text_encoders != any(component != "denoiser" for component in found):
        advice = "has none for" if text_encoders else "has some for"
        raise ConfigError(f"adapter.text_encoders: {path} {advice} text encoders; set it to {not text_encoders}")
    return found


def _text_encoders(family: Family) -> list[str]:
    """Return those that adapter files of this family have a place for. Raises `ConfigError` when there is none."""
    named = FAMILY_NAMES[family.card.name].tables
    found = [component for component in family.components if component != "denoiser" and component in named]
    if not found:
        name = family.card.name
        raise ConfigError(f"adapter.text_encoders: no program reads adapters for the text encoder of '{name}'")
    return found


def fresh_options(config: TrainConfig) -> FreshOptions:
    """Return how the settings want fresh adapters to be made."""
    adapter = config.adapter
    return FreshOptions(
        tucker=adapter.tucker,
        init=adapter.init,
        rule="alpha/sqrt(r)" if adapter.rank_stabilized else "alpha/r",
        dropout=Dropout(adapter.dropout, adapter.rank_dropout, adapter.module_dropout),
        dora=adapter.dora,
        seed=config.seed,
    )
