"""How far a training is: its steps, the rate that follows from them, and a log."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from vislora.reports.curve import draw_curves

WARMUP = 0.02
SAVE_EVERY = {"cuda": 60.0, "cpu": 300.0}
"""Seconds between two states on disk. On a CPU a grid of examples takes some of them."""


class Budget:
    """Counts steps and time. Steps, not minutes, say when a training ends: so it can be repeated.

    `step`: how many were begun, the one at work included.
    """

    def __init__(self, steps: int, log: Path, what: str) -> None:
        self.total, self.what, self._log = steps, what, log
        self.go_on(0.0, 0)

    def go_on(self, spent: float, step: int) -> None:
        """Begin, now, where an earlier run was after so many seconds and steps."""
        self.step, self.images, self._first = step, 0, step
        self._before, self._began = spent, time.perf_counter()
        self._told = self._saved = self._began

    @property
    def spent(self) -> float:
        """Return the seconds spent so far, those of earlier runs included."""
        return self._before + time.perf_counter() - self._began

    def steps(self) -> Iterator[float]:
        """Yield the factor of the learning rate for every step: warm-up, then a cosine."""
        while self.step < self.total:
            done = self.step / self.total
            self.step += 1
            yield min(1.0, done / WARMUP + 1e-3) * 0.5 * (1.0 + math.cos(math.pi * done))

    def due(self, every: float, images: int) -> bool:
        """Count `images`, and say whether it is time to tell how far it is, every so many seconds."""
        self.images += images
        return time.perf_counter() - self._told >= every

    def saves(self, device: torch.device) -> bool:
        """Say whether it is time to save the state."""
        now = time.perf_counter()
        due = now - self._saved > SAVE_EVERY.get(device.type, SAVE_EVERY["cpu"])
        self._saved = now if due else self._saved
        return due

    def tell(self, **figures: float) -> None:
        """Print and log where it stands."""
        now = time.perf_counter()
        rate = self.images / max(now - self._began, 1e-9)
        left = (now - self._began) / max(self.step - self._first, 1) * (self.total - self.step)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        print(
            f"{self.what}: step {self.step} of {self.total}, {rate:.0f} images/s, {left:.0f} s left, {shown}",
            flush=True,
        )
        with self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"what": self.what, "step": self.step, "seconds": self.spent, **figures}) + "\n")
        self._told = now


def draw_curve(log: Path, what: str, figure: str, out: Path) -> None:
    """Draw one figure of a log over the steps, on a logarithmic scale, as a PNG."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []  # a short run has told nothing yet
    points: list[tuple[float, float]] = []
    for row in map(json.loads, lines):
        if row["what"] != what or figure not in row:
            continue
        while points and points[-1][0] >= row["step"]:  # told by a run that was killed, and then again
            points.pop()
        points.append((row["step"], row[figure]))
    image = draw_curves({f"{what}: {figure}": points}, "steps")
    if image:
        image.save(out)
