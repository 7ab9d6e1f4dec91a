"""From trained parameters to an adapter file, with the metadata that this and other programs read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from vislora.data.buckets import Bucket
from vislora.data.dataset import counts
from vislora.data.scan import Example, captions_of, dataset_hash
from vislora.errors import ConfigError, listed
from vislora.formats.adapter_file import AdapterFile, AdapterModule
from vislora.formats.kohya import network_keys
from vislora.formats.names import canonical
from vislora.formats.writing import unwritable
from vislora.inject.trained import AdapterSet
from vislora.jobs.devices import DTYPES
from vislora.jobs.fresh import Learned
from vislora.jobs.plan import Plan
from vislora.jobs.recipes import versions
from vislora.models.base import Family
from vislora.models.words import PLAIN, LearnedWords
from vislora.registry import ALGORITHMS, FORMATS

CPU = torch.device("cpu")
A1111 = "string_to_param.*"
"""The slot of a word for the only text encoder of a base, as A1111 reads it within an adapter."""


@dataclass(frozen=True)
class Trained:
    """What is known at the time of saving. `epoch`: pictures in one. `started`: seconds since 1970."""

    family: Family
    base_hash: str
    examples: Sequence[Example]
    buckets: Mapping[Bucket, Sequence[int]]
    epoch: int
    started: float


def adapter_file(learned: Learned, plan: Plan, trained: Trained, name: str, step: int) -> AdapterFile:
    """Return the adapter as it is now, tensors copied."""
    modules = modules_of(learned.adapters, DTYPES[plan.config.save_precision])
    return AdapterFile(
        modules=modules,
        embeddings=_embeddings(learned.words, plan),
        metadata=_metadata(plan, trained, modules, name, step),
        family=trained.family.card.name,
    )


def _embeddings(words: LearnedWords | None, plan: Plan) -> dict[str, dict[str, torch.Tensor]]:
    """Return the words as they are now, under the slots that other programs read."""
    dtype = DTYPES[plan.config.save_precision]
    found = {} if words is None else words.embeddings()
    return {
        name: {A1111 if slot == PLAIN else slot: vectors.to(dtype) for slot, vectors in slots.items()}
        for name, slots in found.items()
    }


def modules_of(adapters: Mapping[str, AdapterSet], dtype: torch.dtype) -> list[AdapterModule]:
    """Return the modules of each component as they are now, tensors copied, in `dtype`.

    DoRA's magnitudes stay float32: what rounds them is a change of the whole weight.
    """
    return [
        AdapterModule(
            component=component,
            path=canonical(path) if component.startswith("te:clip") else path,
            raw_name="",
            algo=meta.algorithm,
            tensors=ALGORITHMS[meta.algorithm].moved(slots, CPU, dtype),
            alpha=meta.alpha,
            rule=meta.rule,
            magnitude=magnitude,
            magnitude_axis=None if magnitude is None else "out",
        )
        for component, parameters in adapters.items()
        for path, meta, slots, magnitude in parameters.modules_with_slots()
    ]


def require_writable(learned: Learned, plan: Plan, family: Family) -> None:
    """Raise `ConfigError` when the format of the settings has no place for what is `learned` as it will be."""
    form = plan.config.format
    modules = modules_of(learned.adapters, DTYPES[plan.config.save_precision])
    generator = torch.Generator().manual_seed(0)
    for module in modules:  # what is zero in all of them, and so the same, will be so no longer
        module.tensors = {
            slot: torch.rand(tensor.shape, generator=generator).to(tensor) if tensor.dim() else tensor
            for slot, tensor in module.tensors.items()
        }
    made = AdapterFile(modules=modules, embeddings=_embeddings(learned.words, plan), family=family.card.name)
    losses = unwritable(made, form)
    if losses:
        able = [other for other in FORMATS if FORMATS[other].writable and not unwritable(made, other)]
        other = "leave those layers out: adapter.targets, rank = 0"
        hint = f"; what can: --format {' or '.join(able)}" if able else f"; {other}"
        raise ConfigError(listed(f"format: a {form} file cannot hold the adapter{hint}", map(str, losses)))


def _metadata(plan: Plan, trained: Trained, modules: Sequence[AdapterModule], name: str, step: int) -> dict[str, str]:
    """All values are strings: a safetensors header holds no others."""
    config = plan.config
    base = config.base or "vislora embedded"
    data = {"hash": dataset_hash(trained.examples), **counts(trained.examples, trained.buckets)}
    own = {
        "vislora.base": json.dumps({"name": base, "hash": trained.base_hash, "family": trained.family.card.name}),
        "vislora.data": json.dumps(data),
        "vislora.config": config.model_dump_json(exclude={"output", "resume", "overwrite", "dry_run", "device"}),
        "vislora.steps": str(step),
        "vislora.versions": json.dumps(versions()),
    }
    return {
        **own,
        **_modelspec(plan, trained, name),
        **network_keys(modules, trained.family.card.name),
        **_ss(plan, trained, name, step),
        **trained.family.traits.tags,
    }


def _modelspec(plan: Plan, trained: Trained, name: str) -> dict[str, str]:
    """Stability AI's ModelSpec 1.0.1."""
    data = plan.config.data
    given = [
        data.trigger,
        *(subset.trigger for subset in data.subsets),
        *(own.word for own in plan.config.adapter.words),
    ]
    words = dict.fromkeys(word for word in given if word)
    found = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": name,
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S"),
        "modelspec.resolution": f"{plan.resolution}x{plan.resolution}",
        "modelspec.encoder_layer": "1",
    }
    return {**found, "modelspec.trigger_phrase": ", ".join(words)} if words else found


def _ss(plan: Plan, trained: Trained, name: str, step: int) -> dict[str, str]:
    """sd-scripts' keys, which web user interfaces show. Values that have no counterpart here are left out."""
    config = plan.config
    adapter, loop, optimizer = config.adapter, config.loop, config.optimizer
    folders = _by_folder(trained.examples)
    values: dict[str, Any] = {
        "output_name": name,
        "sd_model_name": config.base or "vislora embedded",
        "network_dropout": adapter.dropout,
        "seed": config.seed,
        "steps": step,
        "max_train_steps": plan.steps,
        "num_epochs": -(-step * plan.batch_size * loop.gradient_accumulation // trained.epoch),
        "num_train_images": trained.epoch,
        "num_reg_images": 0,
        "batch_size_per_device": plan.batch_size,
        "gradient_accumulation_steps": loop.gradient_accumulation,
        "gradient_checkpointing": loop.gradient_checkpointing,
        "mixed_precision": loop.mixed_precision,
        "learning_rate": plan.learning_rate,
        "unet_lr": plan.learning_rate,
        "text_encoder_lr": plan.text_learning_rate if adapter.text_encoders else 0.0,
        "optimizer": optimizer.name,
        "lr_scheduler": optimizer.schedule,
        "lr_warmup_steps": optimizer.warmup_steps,
        "max_grad_norm": optimizer.max_grad_norm,
        "min_snr_gamma": loop.min_snr_gamma,
        "noise_offset": loop.noise_offset,
        "caption_dropout_rate": config.data.caption_dropout,
        "resolution": f"({plan.resolution}, {plan.resolution})",
        "enable_bucket": True,
        "bucket_info": json.dumps(_bucket_info(trained.buckets)),
        "dataset_dirs": json.dumps(
            {name: {"n_repeats": some[0].repeats, "img_count": len(some)} for name, some in folders.items()}
        ),
        "tag_frequency": json.dumps({name: _tags(some) for name, some in folders.items()}),
        "training_started_at": trained.started,
        "training_finished_at": datetime.now(UTC).timestamp(),
    }
    return {f"ss_{key}": str(value) for key, value in values.items()}


def _bucket_info(buckets: Mapping[Bucket, Sequence[int]]) -> dict[str, Any]:
    rows = {
        str(number): {"resolution": [bucket.width, bucket.height], "count": len(indices)}
        for number, (bucket, indices) in enumerate(sorted(buckets.items()))
    }
    return {"buckets": rows}


def _by_folder(examples: Sequence[Example]) -> dict[str, list[Example]]:
    """Return the examples by the name of their folder, as sd-scripts has them; `2_name` where repeats differ in one."""
    found: dict[tuple[str, int], list[Example]] = {}
    for example in examples:
        found.setdefault((example.path.parent.name, example.repeats), []).append(example)
    often = Counter(name for name, _ in found)
    return {f"{repeats}_{name}" if often[name] > 1 else name: some for (name, repeats), some in found.items()}


def _tags(examples: Sequence[Example]) -> dict[str, int]:
    tags = (tag.strip() for caption in captions_of(examples) for tag in caption.split(","))
    return dict(Counter(tag for tag in tags if tag).most_common(200))
