"""Encode images and captions once; each result lies under a hash of all that made it, so that none is ever stale."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor

from vislora import files
from vislora.data.buckets import Bucket
from vislora.data.cache import Cache, Tensors, key_of
from vislora.data.images import PREPROCESSING, WHITE, Colour, cover_box, crop_positions, load_image, to_pixels
from vislora.data.scan import Example
from vislora.errors import DataError, listed
from vislora.records import Progress

Item = TypeVar("Item")
Rows = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class View:
    """One way to cut an example to its bucket. `position`: where the crop lies, as `images.cover_box` takes it.

    `fingerprint` identifies the image encoder: weights, class and scaling.
    """

    example: Example
    bucket: Bucket
    position: tuple[float, float]
    flip: bool
    background: Colour
    fingerprint: str

    @cached_property
    def key(self) -> str:
        """The key of its latents: the image's bytes, everything done to them, and the encoder."""
        # The box instead of the position: places that come to the same pixels share one entry.
        box = [round(side, 3) for side in self.box]
        how = (list(self.bucket), box, self.flip, list(self.background))
        return key_of("latents", PREPROCESSING, self.example.sha256, *how, self.fingerprint)

    @property
    def box(self) -> tuple[float, float, float, float]:
        """The part of the upright image that is used: left, top, right, bottom in its pixels."""
        return cover_box((self.example.width, self.example.height), self.bucket, self.position)

    def pixels(self) -> Tensor:
        """Read the image and return it as float32 (3, height, width) in [-1, 1]."""
        image = load_image(self.example.path, self.background)
        return to_pixels(image, self.bucket, self.position, self.flip)


def views(
    examples: Sequence[Example],
    buckets: Mapping[Bucket, Sequence[int]],
    *,
    fingerprint: str,
    crop: str = "center",
    flip: bool = False,
    background: Colour = WHITE,
) -> list[list[View]]:
    """Return for every example its views, at least one for each bucket; training takes one of them per visit.

    `crop`: `center`, `top` or `random` (a few places per image). `flip` adds the mirror image of each.
    `fingerprint` identifies the image encoder: weights, class and scaling (see `weights_fingerprint`).
    """
    found: list[list[View]] = [[] for _ in examples]
    mirrored = (False, True) if flip else (False,)
    for bucket, indices in buckets.items():
        for index in indices:
            found[index] += [
                View(examples[index], bucket, position, flipped, background, fingerprint)
                for position in crop_positions(crop, examples[index].sha256)
                for flipped in mirrored
            ]
    lost = [str(examples[index].path) for index, its_views in enumerate(found) if not its_views]
    if lost:
        raise DataError(listed("images that are in no bucket:", lost))
    return found


def cache_latents(
    cache: Cache,
    wanted: Sequence[Sequence[View]],
    encode: Callable[[Tensor], Tensor],
    *,
    batch_size: int = 1,
    what: str = "latents",
) -> Generator[Progress, None, int]:
    """Encode every view that `cache` does not have; yield progress, of `what`; return how many were encoded.

    `wanted`: what `views` returned. `encode`: pixels (batch, 3, height, width) in [-1, 1], float32 on the CPU ->
    latents (batch, channels, height', width'), one per image in the same order.
    A cache entry holds `latents` (channels, height', width'), `original_size` (height, width) of the upright image and
    `crop_top_left` (top, left) in pixels of the resized one.

    Raises `DataError` when an image was changed since the scan, or the latents are not finite.
    """
    unique = {view.key: view for its_views in wanted for view in its_views}
    todo = [view for view in unique.values() if cache.get(view.key) is None]
    done = len(unique) - len(todo)
    yield Progress(f"caching {what}", done, len(unique))
    by_bucket = groupby(sorted(todo, key=lambda view: view.bucket), key=lambda view: view.bucket)
    parts = (part for _, group in by_bucket for part in _chunks(list(group), batch_size))
    for part, pixels in _read_ahead(parts):
        for view, latents in zip(part, _encoded(encode, pixels, part), strict=True):
            cache.put(view.key, {"latents": latents, **_geometry(view)})
        done += len(part)
        yield Progress(f"caching {what}", done, len(unique))
    return len(todo)


def text_key(caption: str, fingerprint: str) -> str:
    """Return the key of a caption's features. `fingerprint` identifies the text encoders and their tokenizers."""
    return key_of("text", caption, fingerprint)


def cache_texts(
    cache: Cache,
    captions: Iterable[str],
    encode: Callable[[list[str]], Mapping[str, Rows]],
    *,
    fingerprint: str,
    batch_size: int = 8,
) -> Generator[Progress, None, dict[str, str]]:
    """Encode every caption that `cache` does not have; yield progress; return caption -> key.

    `encode`: captions -> features by name, each a tensor (batch, ...) or a list of tensors, with one row per caption. A
    row must not depend on the others of its batch. An entry holds the rows, without the batch dimension.
    Raises `DataError` when features are not finite or have another number of rows.
    """
    keys = {caption: text_key(caption, fingerprint) for caption in dict.fromkeys(captions)}
    todo = [caption for caption, key in keys.items() if cache.get(key) is None]
    done = len(keys) - len(todo)
    yield Progress("caching captions", done, len(keys))
    for part in _chunks(todo, batch_size):
        with torch.no_grad():
            features = encode(part)
        for name, rows in features.items():
            _check_rows(f"the text features '{name}'", rows, [repr(caption) for caption in part])
        for row, caption in enumerate(part):
            cache.put(keys[caption], {name: rows[row] for name, rows in features.items()})
        done += len(part)
        yield Progress("caching captions", done, len(keys))
    return keys


def _geometry(view: View) -> Tensors:
    """Return the sizes that SDXL is conditioned on; a mirrored image is cropped as if it had been mirrored before."""
    width, height = view.example.width, view.example.height
    left, top, right, _ = view.box
    scale = max(view.bucket.width / width, view.bucket.height / height)
    corner = [round(top * scale), round((width - right if view.flip else left) * scale)]
    return {"original_size": torch.tensor([height, width]), "crop_top_left": torch.tensor(corner)}


def _chunks(items: list[Item], size: int) -> Iterator[list[Item]]:
    for start in range(0, len(items), max(1, size)):
        yield items[start : start + max(1, size)]


def _read_ahead(parts: Iterable[list[View]]) -> Iterator[tuple[list[View], Tensor]]:
    """Yield each part with its pixels (batch, 3, height, width), while the next one is being read."""
    reading: deque[tuple[list[View], Future[Tensor]]] = deque()
    with ThreadPoolExecutor(1) as reader:
        for part in parts:
            reading.append((part, reader.submit(_pixels, part)))
            if len(reading) > 1:
                before, pixels = reading.popleft()
                yield before, pixels.result()
        for last, pixels in reading:
            yield last, pixels.result()


def _pixels(part: list[View]) -> Tensor:
    changed = [str(view.example.path) for view in part if files.sha256(view.example.path) != view.example.sha256]
    if changed:
        raise DataError(listed("images changed while they were being read; run the same command again:", changed))
    return torch.stack([view.pixels() for view in part])


def _encoded(encode: Callable[[Tensor], Tensor], pixels: Tensor, part: list[View]) -> Tensor:
    with torch.no_grad():
        latents = encode(pixels)
    _check_rows("the latents", latents, [str(view.example.path) for view in part])
    return latents


def _check_rows(what: str, rows: Rows, names: list[str]) -> None:
    if len(rows) != len(names):
        raise DataError(f"{what} have {len(rows)} rows for {len(names)} inputs")
    bad = [name for name, row in zip(names, rows, strict=True) if row.is_floating_point() and not row.isfinite().all()]
    if bad:
        hint = "; an encoder in float16 often overflows, so run it in float32 or bfloat16"
        raise DataError(listed(f"{what} are not finite (NaN or infinity){hint}:", bad))
