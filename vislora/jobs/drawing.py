"""Pictures that the base draws for a training run: those of its priors, or those that a slider learns on."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vislora.data.cache import Cache, key_of
from vislora.data.scan import Example
from vislora.files import replacing
from vislora.jobs.plan import Plan, images_at_once
from vislora.jobs.recipes import base_hash, threads, versions
from vislora.models.base import Family
from vislora.models.sampling import Shot, make_images, own_sampling
from vislora.records import Progress


def draw_pictures(
    plan: Plan, family: Family, folder: Path, cache: Cache, captions: Sequence[str], count: int
) -> Generator[Progress, None, list[Example]]:
    """Have the base draw `count` pictures into `folder`, of the captions in turn; return them.

    Each is noise of its own seed. What `cache` has is not drawn again.
    """
    texts = list(dict.fromkeys(captions))
    stride = max(1, len(texts) // count)
    shots = [Shot(texts[number * stride % len(texts)], "", number) for number in range(count)]
    drawn: list[Example] = []
    what = f"drawing {folder.name}"
    yield Progress(what, 0, count)
    folder.mkdir(parents=True, exist_ok=True)
    for left in sorted(folder.glob("*.png"))[count:]:  # of an earlier run of more
        left.unlink(missing_ok=True)
    for images in _pictures(plan, family, shots, cache):
        for image in images:
            shot, path = shots[len(drawn)], folder / f"{len(drawn):04d}.png"
            with replacing(path) as temporary:
                image.save(temporary, format="PNG")
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            drawn.append(Example(path, shot.prompt, *image.size, digest))
        yield Progress(what, len(drawn), count)
    return drawn


def _pictures(plan: Plan, family: Family, shots: Sequence[Shot], cache: Cache) -> Iterator[list[Image.Image]]:
    """Yield the pictures of `shots` batch by batch; each batch is kept under all that its pixels depend on."""
    config, size = plan.config, images_at_once(plan.resolution)
    how = own_sampling(family, plan.resolution)
    base = [base_hash(config.base, config.base_parts), config.quantize, config.loop.mixed_precision]
    made_by = [*base, str(family.pipeline.device), threads(), versions(), asdict(how)]
    for start in range(0, len(shots), size):
        batch = shots[start : start + size]
        key = key_of("priors", made_by, [asdict(shot) for shot in batch])
        kept = cache.get(key)
        if kept is None:
            made = next(make_images(family, batch, how, size))
            kept = {"pixels": torch.stack([torch.tensor(np.asarray(image)) for image in made])}
            cache.put(key, kept)
        yield [Image.fromarray(pixels.numpy()) for pixels in kept["pixels"]]
