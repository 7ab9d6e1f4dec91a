"""From a folder of images to cached, endless batches: the data half of `train`."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vislora.data.buckets import Bucket, assign, bucket_notes, bucket_summary
from vislora.data.cache import Cache, weights_fingerprint
from vislora.data.captions import without_trigger
from vislora.data.dataset import TrainingSet
from vislora.data.encode import cache_latents, cache_texts, views
from vislora.data.sampler import Sampler
from vislora.data.scan import Example, scan
from vislora.errors import ConfigError
from vislora.jobs.plan import Plan
from vislora.jobs.run_folder import RunFolder
from vislora.models.base import Family, tokenizers_of
from vislora.models.sampling import cut_off, vae_as
from vislora.records import Note, Record


@dataclass(frozen=True)
class Prepared:
    """Examples with everything cached."""

    examples: list[Example]
    buckets: Mapping[Bucket, list[int]]
    dataset: TrainingSet
    sampler: Sampler

    def batches(self, process: int, processes: int) -> Iterator[dict[str, Any]]:
        """Yield this process' share of the batches, for ever."""
        while True:
            # every process counts the batches of all, so that any one's sampler says where the run stands
            turn = [self.sampler.next() for _ in range(processes)]
            yield self.dataset.batch(turn[process])


def prepare_data(plan: Plan, family: Family, folder: RunFolder) -> Generator[Record, None, Prepared]:
    """Scan the folder, sort into buckets, encode what the cache does not have. Raises `DataError`."""
    config, data = plan.config, plan.config.data
    found = scan(
        data.folder,
        captions=data.captions,
        trigger=data.trigger,
        allow_missing_captions=data.allow_missing_captions,
        skip_bad=data.skip_bad,
        recursive=data.recursive,
    )
    for path, reason in found.skipped:
        yield Note(f"skipped {path}: {reason}", "warning")
    step = family.traits.size_step
    buckets = assign(found.examples, plan.resolution, step, max_aspect=data.max_aspect, upscale=data.upscale)
    for line in [*found.notes, *bucket_notes(found.examples, buckets), *bucket_summary(buckets)]:
        yield Note(line)
    yield from _told(family, found.examples)
    cache = Cache(data.cache or folder.root / "cache")
    wanted = views(
        found.examples,
        buckets,
        fingerprint=_image_fingerprint(family),
        crop=data.crop,
        flip=data.flip,
        background=data.background_rgb,
    )
    with vae_as(family, torch.float32):
        yield from cache_latents(cache, wanted, family.encode_image, batch_size=8)
    captions = [example.caption for example in found.examples]
    priors = _priors(captions, config.prior.replace)
    keys = None
    if not config.adapter.text_encoders:
        captions += [other for others in (priors or {}).values() for other in others]
        keys = yield from cache_texts(cache, captions, family.encode_prompt, fingerprint=_text_fingerprint(family))
    dropout = data.caption_dropout
    dataset = TrainingSet(cache, wanted, keys, seed=config.seed, caption_dropout=dropout, priors=priors)
    sampler = Sampler(buckets, plan.batch_size, config.seed, data.repeats)
    return Prepared(found.examples, buckets, dataset, sampler)


def _priors(captions: Sequence[str], replace: Mapping[str, Sequence[str]]) -> dict[str, list[str]] | None:
    """Return, for every caption, those without the trigger. Raises `ConfigError` for a part that no caption has."""
    if not replace:
        return None
    lost = [part for part in replace if not part or not any(part in caption for caption in captions)]
    if lost:
        example = f"; the first caption is {captions[0]!r}" if captions else ""
        raise ConfigError(f"prior.replace: no caption has {lost[0]!r} in it{example}")
    return {caption: without_trigger(caption, replace) for caption in captions}


def _told(family: Family, examples: Sequence[Example]) -> Iterator[Note]:
    """Say how many captions the base reads only in part."""
    ends = cut_off(family, [example.caption for example in examples])
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
