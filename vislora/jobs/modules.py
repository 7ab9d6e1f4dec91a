"""Adapters on a module of your own: any network with linear or conv layers, trained by any loop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from vislora import formats
from vislora.formats.adapter_file import AdapterFile
from vislora.inject.targets import PRESETS, Target, select
from vislora.inject.trained import AdapterSet, FreshOptions, inject_fresh
from vislora.jobs.adapter_files import modules_of


def adapt(
    model: nn.Module,
    layers: str | Sequence[str] = "attention-ff",
    rank: int = 8,
    alpha: float | None = None,
    *,
    algorithm: str = "lora",
    dora: bool = False,
    name: str = "adapter",
    seed: int = 0,
) -> AdapterSet:
    """Freeze `model`, put a fresh adapter without effect on `layers`, and return what holds its parameters.

    `layers`: a preset (attention, attention-ff, all, every-layer) or patterns over the paths of its modules, such as
    `blocks.*.mlp.*`. The effect is scaled by `alpha` / `rank`, default 1. `dora`: with a magnitude
    per output. Train the parameters that are returned with any optimizer; `eject(model, name)` takes the adapter off.
    Raises `ConfigError` for a pattern that matches no layer, an unknown algorithm, or a name in use.
    """
    if isinstance(layers, str) and layers in PRESETS:
        chosen = select(model, [], layers, Target("", rank, alpha, algorithm))
    else:
        patterns = [layers] if isinstance(layers, str) else layers
        targets = [Target(pattern, rank, alpha, algorithm) for pattern in patterns]
        chosen = select(model, targets, "none", Target("", rank))
    return inject_fresh(model, name, chosen, FreshOptions(dora=dora, seed=seed))


def save_adapter(adapters: AdapterSet, folder: str | Path) -> None:
    """Write what `adapt` returned, as it is now, as PEFT does; `load(model, folder)` and peft read it.

    Names are the paths in the model, which other formats have for known models alone. Raises `AdapterFileError` as
    `formats.save` does.
    """
    modules = modules_of({"denoiser": adapters}, torch.float32)
    formats.save(AdapterFile(modules=modules), folder, "peft")
