"""A training run without its steps: what it would see, how often, and a picture of that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vislora.data.buckets import cropped_share
from vislora.data.encode import View
from vislora.data.images import load_image
from vislora.files import replacing
from vislora.jobs.datasets import Prepared
from vislora.jobs.plan import Plan
from vislora.records import Note
from vislora.reports.seen import Seen, seen_sheet
from vislora.reports.sheet import fitted

MOST = 60
"""Of more images those that lose the most to the crop are drawn."""
CELL = 192
_THREADS = 4


def draw_images(data: Prepared, picture: Path) -> Iterator[Note]:
    """Draw the images as training sees them to `picture`; say so where these are not all."""
    chosen = list(range(len(data.views)))
    if len(chosen) > MOST:
        chosen = sorted(chosen, key=lambda index: -_cut_off(data.views[index]))[:MOST]
        yield Note(f"of {len(data.views)} images, the {MOST} that lose the most to the crop are drawn")
    with ThreadPoolExecutor(_THREADS) as pool:
        seen = list(pool.map(lambda index: _seen(data, index), chosen))
    with replacing(picture) as temporary:
        seen_sheet(seen, cell=CELL).save(temporary, format="PNG")


def outlook(plan: Plan, data: Prepared, processes: int) -> str:
    """Return how often each image would be seen, in one line."""
    at_once = plan.batch_size * plan.config.loop.gradient_accumulation * processes
    visits = plan.steps * at_once / data.sampler.pictures
    shown = f"{visits:,.0f}" if visits >= 10 else f"{visits:.2g}"
    return f"{plan.steps} steps on {len(data.examples)} images, {at_once} at once: each is seen {shown} times"


def _cut_off(views: Sequence[View]) -> float:
    """Return the largest share, 0 to 1, that a view of an image leaves out."""
    return max(cropped_share(view.example, view.bucket) for view in views)


def _seen(data: Prepared, index: int) -> Seen:
    views = data.views[index]
    example = views[0].example
    masks = [] if data.mask_views is None else [view for view in data.mask_views[index] if view]
    cut_off = _cut_off(views)
    facts = [
        ", ".join(str(bucket) for bucket in dict.fromkeys(view.bucket for view in views)),
        f"{cut_off:.0%} cut off" if cut_off >= 0.005 else "",
        "held out" if any(example is held for held in data.held_out.examples) else "",
        f"{example.repeats} times" if example.repeats > 1 else "",
    ]
    width, height = example.width, example.height
    boxes = {view.box for view in views}
    return Seen(
        image=fitted(load_image(example.path, views[0].background), CELL),
        boxes=[(left / width, top / height, right / width, bottom / height) for left, top, right, bottom in boxes],
        lines=[example.path.name, "; ".join(filter(None, facts)), *example.captions],
        mask=fitted(load_image(masks[0].example.path, masks[0].background), CELL) if masks else None,
    )
