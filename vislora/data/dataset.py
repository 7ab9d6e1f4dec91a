"""From a batch of places to tensors: reads the cache, drops captions, picks a view of each image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from vislora.data.buckets import Bucket
from vislora.data.cache import Cache, Tensors
from vislora.data.captions import at_end
from vislora.data.draws import draw
from vislora.data.encode import View
from vislora.data.sampler import Batch, Sampler
from vislora.data.scan import Example, captions_of
from vislora.errors import DataError


@dataclass(eq=False)
class TrainingSet(Dataset):
    """Cached examples as batches of tensors.

    `views`: as `encode.views` returned them. `text_keys`: caption -> key, as `cache_texts` returned it, or None when
    the text encoders are trained and need the captions themselves. `caption_dropout`: the chance, 0 to 1, that an
    example is seen with the empty caption; else each visit shows one of its captions, drawn anew. `orders`: caption ->
    what is seen in its place, another at each visit.
    `priors`: caption -> those for which the base's prediction is kept, or None. `prior_views`: the images on which it
    is kept, with captions of their own; empty: the examples themselves, with `priors`. `sources`: for each example the
    views of its source image, as many as its own, or None. `seen`: the text encoder sees them too, so that `text_keys`
    has `text_name(caption, view of the source)`. `masks`: in the same way those of its mask, with None where it has
    none.
    `ends`: end of a slider, `more` or `less` -> what a caption is there.
    """

    cache: Cache
    views: Sequence[Sequence[View]]
    text_keys: Mapping[str, str] | None
    seed: int = 0
    caption_dropout: float = 0.0
    orders: Mapping[str, Sequence[str]] = field(default_factory=dict)
    priors: Mapping[str, Sequence[str]] | None = None
    prior_views: Sequence[View] = ()
    sources: Sequence[Sequence[View]] | None = None
    seen: bool = False
    masks: Sequence[Sequence[View | None]] | None = None
    ends: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, place: tuple[int, int, Bucket]) -> dict[str, Any]:
        """Return the example at (index, visit) as it is in a bucket: `latents`, `caption`, `text`, the sizes.

        With priors, one's as well; with sources, the latents of its own as `source`; with masks, `mask`; with ends, the
        caption and text at each.
        """
        index, visit, bucket = place
        fitting = [number for number, view in enumerate(self.views[index]) if view.bucket == bucket]
        chosen = fitting[int(draw(self.seed, visit, "view", index) * len(fitting))]
        view, source = self.views[index][chosen], None if self.sources is None else self.sources[index][chosen]
        captions = view.example.captions
        written = captions[int(draw(self.seed, visit, "line", index) * len(captions))]
        caption = self._caption(written, visit, index)
        found = {**self._image(view), "caption": caption, "text": self._text(caption, source)}
        if source is not None:
            found["source"] = self._image(source)["latents"]
        if self.masks is not None:
            found["mask"] = self._mask(self.masks[index][chosen], found["latents"])
        for name, end in self.ends.items():
            there = at_end(caption, end)
            found |= {f"{name}_caption": there, f"{name}_text": self._text(there, source)}
        if self.priors is not None or self.prior_views:
            others = (self.priors or {}).get(written, ())
            found |= self._prior(others, source, draw(self.seed, visit, "prior", index))
        return found

    def _mask(self, view: View | None, latents: Tensor) -> Tensor:
        """Return how much of each cell of `latents` (..., height, width) is learned: (1, height, width), 0 to 1."""
        size = latents.shape[-2:]
        if view is None:
            return torch.ones(1, *size)
        stored = self._read(view.key, f"the mask {view.example.path}")["latents"]
        return F.interpolate(stored[None].float(), size=size, mode="area")[0]

    def _caption(self, written: str, visit: int, index: int) -> str:
        if is_dropped(self.seed, visit, index, self.caption_dropout):
            return ""
        orders = self.orders.get(written, (written,))
        return orders[int(draw(self.seed, visit, "tags", index) * len(orders))]

    def _image(self, view: View) -> dict[str, Any]:
        """Return the latents and the sizes."""
        stored = self._read(view.key, f"the latents of {view.example.path}")
        return {**stored, "target_size": torch.tensor([view.bucket.height, view.bucket.width])}

    def _prior(self, others: Sequence[str], source: View | None, chance: float) -> dict[str, Any]:
        """Return one of the captions `others`, or an image with its own. `chance`, 0 to 1, decides which."""
        if self.prior_views:
            own = self.prior_picture(int(chance * len(self.prior_views)))
            return {f"prior_{name}": part for name, part in own.items()}
        prior = others[int(chance * len(others))]
        return {"prior_caption": prior, "prior_text": self._text(prior, source)}

    def prior_picture(self, number: int) -> dict[str, Any]:
        """Return one of `prior_views` as an example, with its `number`."""
        view = self.prior_views[number]
        caption = view.example.caption
        about = {"number": torch.tensor(number), "caption": caption, "text": self._text(caption, None)}
        return {**self._image(view), **about}

    def _text(self, caption: str, source: View | None) -> Tensors | None:
        if self.text_keys is None:
            return None
        name = text_name(caption, source if self.seen else None)
        return self._read(self.text_keys.get(name, ""), f"the features of the caption {caption!r}")

    def batch(self, batch: Batch) -> dict[str, Any]:
        """Return the collated tensors of a batch (see `collate`). Raises `DataError` when the cache lost an entry."""
        places = zip(batch.indices, batch.visits, strict=True)
        return collate([self[index, visit, batch.bucket] for index, visit in places])

    def batches(self, sampler: Sampler) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """Yield (batch, tensors) for ever, as `sampler` goes."""
        for batch in sampler:
            yield batch, self.batch(batch)

    def _read(self, key: str, what: str) -> Tensors:
        tensors = self.cache.get(key) if key else None
        if tensors is None:
            raise DataError(f"{what} are not in the cache {self.cache.folder}; run the same command again to make them")
        return tensors


def text_name(caption: str, source: View | None) -> str:
    """Return what the features of a caption are called, and with them the source image that the text encoder saw."""
    return caption if source is None else f"{caption}\n{source.key}"


def is_dropped(seed: int, visit: int, index: int, probability: float) -> bool:
    """Say whether the example at `index` is seen without its caption on this visit."""
    return draw(seed, visit, "caption", index) < probability


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stack examples of one bucket.

    Returns `latents` (batch, channels, height, width); `original_size`, `crop_top_left` and `target_size`, each
    (batch, 2) as (height, width) or (top, left); `captions`, a list of strings; `text`, features by name with a batch
    dimension in front, or a list of them where they have different lengths, or None; with priors, `prior_captions` and
    `prior_text` too, and where they have images of their own `prior_latents`, their sizes and `prior_number`; so
    `more_` and `less_` with the ends of a slider; with sources, `source` (batch, channels, height, width); with masks,
    `mask` (batch, 1, height, width). Raises `DataError` when shapes differ.
    """
    plain = [name for name, value in items[0].items() if isinstance(value, Tensor)]
    result: dict[str, Any] = {name: _stacked(name, [item[name] for item in items]) for name in plain}
    for of in ("", "prior_", "more_", "less_"):
        if f"{of}caption" in items[0]:
            result[f"{of}captions"] = [item[f"{of}caption"] for item in items]
            result[f"{of}text"] = _features([item[f"{of}text"] for item in items])
    return result


def _features(items: Sequence[Mapping[str, Tensor] | None]) -> dict[str, Tensor | list[Tensor]] | None:
    if items[0] is None:
        return None
    rows = {name: [item[name] for item in items if item is not None] for name in items[0]}
    return {
        name: list(found) if len({row.shape for row in found}) > 1 else torch.stack(found)
        for name, found in rows.items()
    }


def counts(examples: Sequence[Example], buckets: Mapping[Bucket, Sequence[int]]) -> dict[str, int]:
    """Return the figures for an adapter's metadata: images, different captions, images without one, buckets."""
    captions = [example.caption for example in examples]
    return {
        "images": len(captions),
        "captions": len(set(captions_of(examples)) - {""}),
        "uncaptioned": captions.count(""),
        "buckets": len(buckets),
    }


def _stacked(name: str, tensors: list[Tensor]) -> Tensor:
    shapes = sorted({tuple(tensor.shape) for tensor in tensors})
    if len(shapes) > 1:
        raise DataError(f"'{name}' has different shapes in one batch: {', '.join(map(str, shapes))}")
    return torch.stack(tensors)
