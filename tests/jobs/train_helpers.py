"""Small training runs on tiny models: a few steps on a few drawn images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from tests import tiny
from vislora.config.train import TrainConfig
from vislora.jobs.train import run
from vislora.records import Done, Note, Record

torch.set_num_threads(1)
CAPTIONS = ("a red cat", "the house, ink", "a blue dog", "")


def image_folder(folder: Path, count: int = 4, size: tuple[int, int] = (24, 24)) -> Path:
    """Draw `count` images with captions, each of its own colour."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image = Image.new("RGB", size, (40 * number % 256, 90, 200 - 30 * number))
        ImageDraw.Draw(image).ellipse((2, 2, 10 + number, 12), fill=(255, 255, 20 * number))
        image.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(CAPTIONS[number % len(CAPTIONS)] or "ink")
    return folder


def config(root: Path, family: str = "sd3", **settings: Any) -> TrainConfig:
    """Return settings for four steps on four images in `root`/images; `a__b` is the setting `a.b`."""
    if not (root / "images").exists():
        image_folder(root / "images")
    values: dict[str, Any] = {
        "output": root / "run",
        "base": str(tiny.saved(family)),
        "data": {"folder": root / "images"},
        "adapter": {"rank": 2},
        "optimizer": {"learning_rate": 1e-2},
        "loop": {"steps": 4, "batch_size": 2, "save_every": 0},
        "device": "cpu",
    }
    for name, value in settings.items():
        *parents, last = name.split("__")
        section = values
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return TrainConfig.of(values)


def trained(root: Path, family: str = "sd3", **settings: Any) -> tuple[Any, list[Record]]:
    """Train; return the value of the run and all of its records."""
    records = list(run(config(root, family, **settings)))
    assert isinstance(records[-1], Done)
    return records[-1].value, records


def same(one: Path, other: Path) -> bool:
    """Say whether two files hold the same tensors, bit for bit."""
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def notes(records: list[Record]) -> str:
    """Return the texts of all notes."""
    return "\n".join(record.text for record in records if isinstance(record, Note))
