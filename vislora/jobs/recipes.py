"""The recipe of an image, carried by its PNG: everything that is needed to make it again, bit for bit."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from vislora.errors import ConfigError
from vislora.files import replacing
from vislora.inject.strength import Strength
from vislora.jobs.sources import Source
from vislora.jobs.strengths import as_json, from_json, tag
from vislora.models.base import place_of
from vislora.models.sampling import Sampling, Shot

KEY = "vislora"
OFF = Strength(0.0)


@dataclass(frozen=True)
class Recipe:
    """`batch` holds all shots of the batch that the image was made in and `index` its place: a batch of another size
    changes the last bits. `adapters`: rows of name, path, sha256 and `strength` (see `strengths.as_json`); where the
    images of the batch have stacks of their own, `batch` holds the strength on each. `engine`: merged or stacked.
    `compose`: the composition's method and settings. `source`: the image that was edited or started from.
    `base_parts`: the folder beside a base in one file. `quantize`: see `models.quantized`. `embeddings`: path and
    sha256 of each file of words.
    """

    base: str
    base_hash: str
    adapters: tuple[dict[str, Any], ...]
    sampling: Sampling
    batch: tuple[Shot, ...]
    index: int
    device: str
    precision: str
    engine: str
    threads: int
    versions: dict[str, str]
    compose: dict[str, Any] = field(default_factory=lambda: {"method": "sum"})
    source: Source | None = None
    base_parts: str = ""
    quantize: str = "no"
    embeddings: tuple[dict[str, str], ...] = ()

    @property
    def shot(self) -> Shot:
        """The image's own prompt and seed."""
        return self.batch[self.index]

    @property
    def stacks(self) -> list[dict[str, Strength]]:
        """The stack of each image of the batch."""
        return [
            {
                row["name"]: from_json(row["batch"][index] if "batch" in row else row["strength"])
                for row in self.adapters
            }
            for index in range(len(self.batch))
        ]


def save_png(image: Image.Image, path: Path, recipe: Recipe) -> None:
    """Write a PNG with the recipe as JSON, and the `parameters` text that other programs show."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(KEY, json.dumps(asdict(recipe), ensure_ascii=False))
    info.add_itxt("parameters", _parameters(recipe))
    with replacing(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def read_recipe(path: Path) -> Recipe:
    """Return the recipe of a PNG. Raises `ConfigError` when the file has none."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            text = image.text.get(KEY)  # type: ignore[attr-defined]
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise ConfigError(f"like: {path} cannot be read as a PNG ({error})") from None
    if text is None:
        raise ConfigError(f"like: {path} carries no recipe of vislora; it was made by another program, or stripped")
    try:
        fields = json.loads(text)
        fields["sampling"] = Sampling(**fields["sampling"])
        fields["batch"] = tuple(Shot(**shot) for shot in fields["batch"])
        fields["adapters"], fields["embeddings"] = tuple(fields["adapters"]), tuple(fields.get("embeddings", ()))
        fields["source"] = Source(**fields["source"]) if fields.get("source") else None
        recipe = Recipe(**fields)
        _ = recipe.shot, recipe.stacks  # its place must be in the batch, and every strength one
        return recipe
    except (ValueError, TypeError, LookupError) as error:
        raise ConfigError(f"like: the recipe in {path} is damaged or of another version ({error})") from None


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    packages = ("vislora", "torch", "diffusers", "transformers")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def base_hash(base: str, parts: str = "") -> str:
    """Return a hash that tells bases apart: names, sizes, and the first and last MiB of every weight and config file.

    `base`: as `--base`, '' the embedded one; `parts`: the folder beside a base in one file. A base of many gigabytes is
    not read whole; a hub name (no folder) is its own hash.
    """
    path = place_of(base)
    if path.is_file():
        rest = base_hash(parts) if parts else ""
        return hashlib.sha256(f"{path.stat().st_size} {rest} ".encode() + _ends(path)).hexdigest()
    digest = hashlib.sha256(path.as_posix().encode() if not path.is_dir() else b"")
    for file in sorted(item for item in path.rglob("*") if item.suffix in (".safetensors", ".bin", ".json")):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path).as_posix()} {size}".encode())
        digest.update(_ends(file))
    return digest.hexdigest()


def _ends(file: Path) -> bytes:
    """Return the first and the last MiB of a file."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        first = stream.read(1 << 20)
        stream.seek(max(0, size - (1 << 20)))
        return first + stream.read()


def threads() -> int:
    """Return torch's thread count: another one sums in another order."""
    return torch.get_num_threads()


def adapter_rows(
    paths: Mapping[str, Path], hashes: Mapping[str, str], stacks: Sequence[Mapping[str, Strength]], index: int
) -> tuple[dict[str, Any], ...]:
    """Return what the recipe of image `index` says of the stacks of its batch: a row for each adapter that is used."""
    rows = []
    for name in sorted(paths):
        batch = [as_json(stack.get(name, OFF)) for stack in stacks]
        if any(strength != 0.0 for strength in batch):
            row = {"name": name, "path": str(paths[name]), "sha256": hashes[name], "strength": batch[index]}
            differ = any(strength != batch[0] for strength in batch)
            rows.append({**row, "batch": batch} if differ else row)
    return tuple(rows)


def _parameters(recipe: Recipe) -> str:
    how, shot = recipe.sampling, recipe.shot
    own = recipe.stacks[recipe.index]
    tags = "".join(f" {tag(name, strength)}" for name, strength in own.items() if strength != OFF)
    start = [] if how.change is None else [f"Denoising strength: {how.change:g}"]
    settings: Sequence[str] = (
        f"Steps: {how.steps}",
        f"Sampler: {how.scheduler}",
        f"CFG scale: {how.guidance_scale:g}",
        f"Seed: {shot.seed}",
        f"Size: {how.width}x{how.height}",
        *start,
        *([f"Eta: {how.eta:g}"] if how.eta else []),
        f"Model: {Path(recipe.base).name or 'vislora embedded'}",
        f"Version: vislora {recipe.versions['vislora']}",
    )
    return f"{shot.prompt}{tags}\nNegative prompt: {shot.negative_prompt}\n{', '.join(settings)}"
