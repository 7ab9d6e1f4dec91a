"""Optimizers by name, and the learning rate as a function of the step: no scheduler object, so nothing to restore."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vislora.errors import ConfigError, missing_extra, nearest

_TORCH: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("AdamW", {"fused": True}),
    "adam": ("Adam", {"fused": True}),
    "adafactor": ("Adafactor", {}),
    "sgd": ("SGD", {"momentum": 0.9}),
}


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a peak learning rate. `decays`: weight decay pulls them to zero."""

    parameters: Iterable[nn.Parameter]
    learning_rate: float
    decays: bool = True


def make_optimizer(name: str, groups: list[ParameterGroup], weight_decay: float) -> torch.optim.Optimizer:
    """Return an optimizer; each of its groups remembers its peak rate as `peak`. Empty groups are left out.

    Raises `ConfigError` for an unknown name, or when the package of the optimizer is not installed.
    """
    built = [
        {
            "params": parameters,
            "lr": group.learning_rate,
            "peak": group.learning_rate,
            "weight_decay": weight_decay if group.decays else 0.0,
        }
        for group in groups
        if (parameters := list(group.parameters))
    ]
    if name in _TORCH:
        class_name, options = _TORCH[name]
        return getattr(torch.optim, class_name)(built, **options)
    return _external(name)(built)


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set every group's rate to `factor` times its peak; return the first group's."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak"]
    return optimizer.param_groups[0]["lr"]


def rate_factor(step: int, total: int, schedule: str, warmup: int) -> float:
    """Return the factor on the peak rate at `step` (counted from 0) of `total`, in (0, 1]."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - warmup)
    if schedule == "linear":
        return 1.0 - progress
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0


def _external(name: str) -> Any:
    try:
        import pytorch_optimizer
    except ImportError:
        hint = nearest(name, _TORCH)
        error = missing_extra("pytorch-optimizer", "optimizers", f"optimizer '{name}'{hint}")
        raise error from None
    try:
        return pytorch_optimizer.load_optimizer(name)
    except (NotImplementedError, KeyError, ValueError):
        known = [*_TORCH, *pytorch_optimizer.get_supported_optimizers()]
        raise ConfigError(f"unknown optimizer '{name}'{nearest(name, known)}") from None
