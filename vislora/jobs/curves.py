"""The losses of a training run as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vislora.files import replacing
from vislora.reports.curve import Point, draw_curves

SMOOTH = 50
"""The loss of a step says little by itself: what is drawn is the mean over this share of all, one in so many."""


def draw_losses(log: Path, picture: Path) -> None:
    """Draw the losses in `log`, of the steps and on the held-out images, to `picture`, if there are two to draw."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    steps = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    held_out = [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]
    curves = {"training, smoothed": _smoothed(steps)}
    if held_out:
        curves["held-out images"] = held_out
    image = draw_curves(curves, "steps")
    if image:
        with replacing(picture) as temporary:
            image.save(temporary, format="PNG")


def _smoothed(points: list[Point]) -> list[Point]:
    window = max(1, len(points) // SMOOTH)
    parts = [points[start : start + window] for start in range(0, len(points), window)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]
