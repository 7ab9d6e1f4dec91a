"""From a folder of images to cached, endless batches: the data half of `train`."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, cast

import torch

from vislora.config.data import DataConfig
from vislora.data.buckets import Bucket, assign, bucket_notes, bucket_summary, size_notes
from vislora.data.cache import Cache, weights_fingerprint
from vislora.data.captions import at_end, tag_orders
from vislora.data.dataset import TrainingSet, text_name
from vislora.data.encode import View, cache_latents, cache_texts, views
from vislora.data.masks import find_masks, mask_views, require_some, shrunk
from vislora.data.pairs import find_sources, source_views
from vislora.data.sampler import Batch, Sampler, batches
from vislora.data.scan import Example, ScanResult, captions_of, scan
from vislora.data.subsets import Subset
from vislora.errors import ConfigError
from vislora.jobs.drawing import draw_pictures
from vislora.jobs.held_out import Buckets, HeldOut, split
from vislora.jobs.plan import Plan, images_at_once
from vislora.jobs.priors import prior_captions, prior_pictures, prior_views
from vislora.jobs.run_folder import RunFolder
from vislora.models.base import Family, ReadsSource, tokenizers_of
from vislora.models.sampling import cut_off, vae_as
from vislora.records import Note, Record

MaskViews = list[list[View | None]]


@dataclass(frozen=True)
class Prepared:
    """Examples to train on, with everything cached. `sources`: the image that each is made from, or none at all.

    masks: those of all examples that have one, the held-out ones' too. views, mask_views: of all examples, how they
    and their masks are cut.
    """

    examples: list[Example]
    sources: list[Example]
    masks: list[Example]
    buckets: Mapping[Bucket, list[int]]
    dataset: TrainingSet
    sampler: Sampler
    held_out: HeldOut
    views: list[list[View]]
    mask_views: MaskViews | None

    def batches(self, process: int, processes: int) -> Iterator[dict[str, Any]]:
        """Yield this process' share of the batches, for ever."""
        while True:
            # every process counts the batches of all, so that any one's sampler says where the run stands
            turn = [self.sampler.next() for _ in range(processes)]
            yield self.dataset.batch(turn[process])

    def largest_batch(self) -> dict[str, Any]:
        """Return the batch of the most pixels that there is."""
        size, repeats = self.sampler.batch_size, self.sampler.repeats
        shown = {
            bucket: tuple(index for index in indices for _ in range(repeats[index]))[:size]
            for bucket, indices in self.sampler.buckets.items()
        }
        bucket = max(shown, key=lambda item: item.width * item.height * len(shown[item]))
        return self.dataset.batch(Batch(bucket, shown[bucket], (0,) * len(shown[bucket])))


def prepare_data(plan: Plan, family: Family, folder: RunFolder) -> Generator[Record, None, Prepared]:
    """Scan the folder, sort into buckets, encode what the cache does not have. Raises `DataError`."""
    config, data = plan.config, plan.config.data
    cache = Cache(data.cache or folder.root / "cache")
    found, buckets = yield from _scanned(plan, family, folder, cache)
    examples = found.examples
    learned, held = split(examples, buckets, data.held_out, config.seed)
    sources = yield from _sources(plan, family, found)
    wanted = views(
        examples,
        buckets,
        fingerprint=_image_fingerprint(family),
        crop=data.crop,
        flip=data.flip,
        background=data.background_rgb,
    )
    shown = source_views(wanted, sources) if sources else None
    masks, learned_parts = yield from _masks(plan, found, wanted, cache)
    at_once = images_at_once(plan.largest)
    written = captions_of(_in(learned, examples))
    priors = prior_captions(written, config.prior)
    pictures = yield from prior_pictures(plan, family, folder, cache, priors)
    kept = prior_views(pictures, plan, family, _image_fingerprint(family))
    with vae_as(family, torch.float32):
        yield from cache_latents(cache, [*wanted, *(shown or []), kept], family.encode_image, batch_size=at_once)
    orders = _orders(plan, written)
    seen = shown if family.traits.source == "latents and text" else None
    keys = None
    if not config.adapter.reads:
        texts = _texts(wanted, seen, orders, priors, config.slider.ends)
        texts |= {view.example.caption: (view.example.caption, None) for view in kept}
        keys = yield from _cache_texts(cache, family, texts)
    beside: dict[str, Any] = {"sources": shown, "seen": seen is not None, "masks": learned_parts}
    beside["ends"] = config.slider.ends
    make = partial(TrainingSet, cache, wanted, keys, seed=config.seed, **beside)
    dataset = make(caption_dropout=data.caption_dropout, orders=orders, priors=priors, prior_views=kept)
    repeats = {index: examples[index].repeats for indices in learned.values() for index in indices}
    sampler = Sampler(learned, plan.batch_size, config.seed, repeats)
    held_out = HeldOut(_in(held, examples), _in(held, sources), make(), batches(held, plan.batch_size, config.seed, 0))
    if held:
        yield Note(f"{len(held_out.examples)} of {len(examples)} images are held out; the loss on them is measured")
    mine, theirs = _in(learned, examples), _in(learned, sources)
    return Prepared(mine, theirs, masks, learned, dataset, sampler, held_out, wanted, learned_parts)


def _scanned(
    plan: Plan, family: Family, folder: RunFolder, cache: Cache
) -> Generator[Record, None, tuple[ScanResult, dict[Bucket, list[int]]]]:
    """Return what is in the folder of images, or else what the base draws, and its buckets; say what is odd."""
    data, slider = plan.config.data, plan.config.slider
    if data.folder is None:
        drawing = draw_pictures(plan, family, folder.pictures, cache, slider.captions, slider.pictures)
        found = ScanResult((yield from drawing))
    else:
        found = scan(
            data.folder,
            captions=data.captions,
            each_line=data.caption_lines == "each",
            subsets=_subsets(data),
            allow_missing_captions=data.allow_missing_captions,
            skip_bad=data.skip_bad,
            recursive=data.recursive,
        )
    for path, reason in found.skipped:
        yield Note(f"skipped {path}: {reason}", "warning")
    step = family.traits.size_step
    shape: dict[str, Any] = {"max_aspect": data.max_aspect, "upscale": data.upscale}
    buckets = assign(found.examples, plan.resolution, step, more=data.more_resolutions, **shape)
    notes = [*found.notes, *bucket_notes(found.examples, buckets), *bucket_summary(buckets)]
    notes += size_notes(found.examples, buckets, len({plan.resolution, *data.more_resolutions}))
    for line in notes:
        yield Note(line)
    captions = captions_of(found.examples)
    yield from _told(family, [*captions, *(at_end(each, end) for end in slider.ends.values() for each in captions)])
    return found, buckets


def _subsets(data: DataConfig) -> list[Subset]:
    """Return the subsets of the settings, and last what is in none of them."""
    rest = Subset("*", data.repeats, data.trigger)
    given = [(each.pattern, each.repeats or rest.repeats, each.trigger) for each in data.subsets]
    own = [Subset(name, repeats, rest.trigger if word is None else word) for name, repeats, word in given]
    return [*own, rest]


def _orders(plan: Plan, captions: Sequence[str]) -> dict[str, list[str]]:
    """Return what is seen in the place of each caption. Raises `ConfigError` for tags left out of no order."""
    data, seed = plan.config.data, plan.config.seed
    if data.tag_dropout and data.tag_orders == 1:
        raise ConfigError(
            "data.tag_dropout: tags are left out of other orders than the written one: give data.tag_orders"
        )
    how = data.tag_orders, data.keep_tags, seed, data.tag_dropout
    return {caption: tag_orders(caption, *how) for caption in dict.fromkeys(captions)}


def _in(buckets: Buckets, examples: Sequence[Example]) -> list[Example]:
    """Return those of the `examples` that are in the `buckets`, in their order; of none there are none."""
    if not examples:
        return []
    return [examples[index] for index in sorted({index for indices in buckets.values() for index in indices})]


def _sources(plan: Plan, family: Family, found: ScanResult) -> Generator[Record, None, list[Example]]:
    """Return the source image of each example, or none. Raises `ConfigError` where they do not go with the base."""
    data, kind = plan.config.data, family.traits.source
    if data.sources is None:
        if kind == "latents and text":
            raise ConfigError(
                "data.sources: this base edits images: give the folder of those that training starts from"
            )
        if kind:
            yield Note("no data.sources: this base could edit images; it is trained to make them from captions alone")
        return []
    if not kind:
        name = family.card.name
        raise ConfigError(
            f"data.sources: a base of family '{name}' edits no images; FLUX.1 Kontext, FLUX.2 and Qwen-Image-Edit do"
        )
    if kind == "latents and text" and plan.config.adapter.reads:
        raise ConfigError("adapter.text_encoders: that of this base sees the images too, and is not trained")
    assert data.folder is not None  # the settings have seen to it
    left_out = [path for path, _ in found.skipped]
    return find_sources(found.examples, data.folder, data.sources, recursive=data.recursive, left_out=left_out)


def _masks(
    plan: Plan, found: ScanResult, wanted: Sequence[Sequence[View]], cache: Cache
) -> Generator[Record, None, tuple[list[Example], MaskViews | None]]:
    """Return the masks that there are, and their views beside those of the examples, cached; or none at all."""
    data = plan.config.data
    if data.masks is None:
        return [], None
    assert data.folder is not None  # the settings have seen to it
    left_out = [path for path, _ in found.skipped]
    masks = find_masks(found.examples, data.folder, data.masks, recursive=data.recursive, left_out=left_out)
    shown = mask_views(wanted, masks)
    there = [[view for view in its_views if view] for its_views in shown]
    yield from cache_latents(cache, there, shrunk, batch_size=images_at_once(plan.largest), what="masks")
    require_some(cache, chain.from_iterable(there))
    yield Note(f"{sum(map(bool, masks))} of {len(masks)} images have a mask")
    return [mask for mask in masks if mask], shown


Texts = dict[str, tuple[str, View | None]]


def _texts(
    wanted: Sequence[Sequence[View]],
    sources: Sequence[Sequence[View]] | None,
    orders: Mapping[str, Sequence[str]],
    priors: Mapping[str, Sequence[str]] | None,
    ends: Mapping[str, str],
) -> Texts:
    """Return, by their names, all texts that training reads, those of priors and ends too; with what is seen."""
    texts: Texts = {}
    for index, its_views in enumerate(wanted):
        captions = its_views[0].example.captions
        here = ["", *captions, *(text for caption in captions for text in orders.get(caption, ()))]
        there = [at_end(text, end) for end in ends.values() for text in here]
        for source in [None] if sources is None else sources[index]:
            kept = [text for caption in captions for text in (priors or {}).get(caption, ())]
            for text in (*here, *there, *kept):
                texts[text_name(text, source)] = text, source
    return texts


def _cache_texts(cache: Cache, family: Family, texts: Texts) -> Generator[Record, None, dict[str, str]]:
    """Encode what the cache does not have of `texts`, with the images that the text encoder sees beside them."""

    def encode(names: list[str]) -> Mapping[str, Any]:
        captions = [texts[name][0] for name in names]
        sources = [source.pixels() for name in names if (source := texts[name][1]) is not None]
        if not sources:
            return family.encode_prompt(captions)
        return cast(ReadsSource, family).encode_prompt(captions, torch.stack(sources))

    # images of one batch must be of one size
    size = 8 if all(source is None for _, source in texts.values()) else 1
    fingerprint = _text_fingerprint(family)
    return (yield from cache_texts(cache, texts, encode, fingerprint=fingerprint, batch_size=size))


def _told(family: Family, captions: Sequence[str]) -> Iterator[Note]:
    """Say how many captions the base reads only in part."""
    ends = cut_off(family, captions)
    if ends:
        text = f"{len(ends)} captions are too long for this base; the end of the first, not read: '{ends[0]}'"
        yield Note(text, "warning")


def _image_fingerprint(family: Family) -> str:
    """Return a hash over the VAE; what its config says of its own whereabouts (`_name_or_path`) does not enter."""
    vae = family.pipeline.vae
    return weights_fingerprint(vae, {key: value for key, value in vae.config.items() if not key.startswith("_")})


def _text_fingerprint(family: Family) -> str:
    """Return a hash over the text encoders and the vocabularies of their tokenizers."""
    digest = hashlib.sha256()
    for component, module in family.components.items():
        if component != "denoiser":
            digest.update(weights_fingerprint(module, str(module.dtype)).encode())
    for tokenizer in tokenizers_of(family.pipeline).values():
        digest.update(repr((tokenizer.model_max_length, sorted(tokenizer.get_vocab().items()))).encode())
    return digest.hexdigest()
