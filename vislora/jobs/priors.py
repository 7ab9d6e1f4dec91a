"""What prior preservation compares on: captions without the trigger, and pictures that the base draws of them."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping, Sequence

from vislora.data.buckets import assign
from vislora.data.captions import without_trigger
from vislora.data.encode import View, views
from vislora.data.scan import Example
from vislora.errors import ConfigError
from vislora.files import replacing
from vislora.jobs.plan import Plan, images_at_once
from vislora.jobs.run_folder import RunFolder
from vislora.models.base import Family
from vislora.models.sampling import Shot, make_images, own_sampling
from vislora.records import Progress


def prior_captions(captions: Sequence[str], replace: Mapping[str, Sequence[str]]) -> dict[str, list[str]] | None:
    """Return, for every caption, those without the trigger. Raises `ConfigError` for a part that no caption has."""
    if not replace:
        return None
    lost = [part for part in replace if not part or not any(part in caption for caption in captions)]
    if lost:
        example = f"; the first caption is {captions[0]!r}" if captions else ""
        raise ConfigError(f"prior.replace: no caption has {lost[0]!r} in it{example}")
    return {caption: without_trigger(caption, replace) for caption in captions}


def draw_priors(
    plan: Plan, family: Family, folder: RunFolder, priors: Mapping[str, Sequence[str]] | None
) -> Generator[Progress, None, list[Example]]:
    """Have the base draw `prior.images` pictures into the run folder, of the captions in turn; return them.

    Each is noise of its own seed. Raises `ConfigError` where there is no caption to draw, or a base that cannot.
    """
    count = plan.config.prior.images
    if not count:
        return []
    if priors is None:
        raise ConfigError("prior.images: say in prior.replace what the captions of these pictures leave out")
    if plan.config.data.sources is not None:
        raise ConfigError("prior.images: what is drawn has no source image; leave it 0 where data.sources is given")
    texts = list(dict.fromkeys(text for others in priors.values() for text in others))
    stride = max(1, len(texts) // count)
    shots = [Shot(texts[number * stride % len(texts)], "", number) for number in range(count)]
    how = own_sampling(family, plan.resolution)
    drawn: list[Example] = []
    yield Progress("drawing priors", 0, count)
    folder.priors.mkdir(parents=True, exist_ok=True)
    for left in sorted(folder.priors.glob("*.png"))[count:]:  # of an earlier run of more
        left.unlink(missing_ok=True)
    for images in make_images(family, shots, how, images_at_once(plan.resolution)):
        for image in images:
            shot, path = shots[len(drawn)], folder.priors / f"{len(drawn):04d}.png"
            with replacing(path) as temporary:
                image.save(temporary, format="PNG")
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            drawn.append(Example(path, shot.prompt, *image.size, digest))
        yield Progress("drawing priors", len(drawn), count)
    return drawn


def prior_views(drawn: Sequence[Example], plan: Plan, family: Family, fingerprint: str) -> list[View]:
    """Return the one view of each picture."""
    buckets = assign(drawn, plan.resolution, family.traits.size_step)
    return [view for its_views in views(drawn, buckets, fingerprint=fingerprint) for view in its_views]
