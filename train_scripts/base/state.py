"""The state of a training in one file: the same command goes on where a kill ended it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from base.progress import Budget


def save_state(path: Path, parts: Mapping[str, Any], budget: Budget, **others: int) -> None:
    """Write the states of `parts`, where `budget` stands, that of the random numbers and `others` to `path`, whole."""
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= {"spent": budget.spent, "step": budget.step, "random": torch.get_rng_state(), **others}
    if torch.cuda.is_available():
        state["random_cuda"] = torch.cuda.get_rng_state()
    aside = path.with_suffix(".part")
    torch.save(state, aside)
    os.replace(aside, path)


def load_state(path: Path, parts: Mapping[str, Any], budget: Budget, device: torch.device) -> dict[str, Any]:
    """Put all of it back where there is such a file; return what it holds, nothing where there is none."""
    if not path.exists():
        return {}
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    budget.go_on(state["spent"], state["step"])
    torch.set_rng_state(state["random"].cpu())
    if "random_cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["random_cuda"].cpu())
    return state
