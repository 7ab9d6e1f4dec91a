"""Adapters with an effect for the tiny models, and a picture of a model to compare with later."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.layers import drawn
from vislora.inject.injection import FileModule, inject_modules
from vislora.inject.targets import Target, adaptable, select
from vislora.inject.trained import AdapterSet, FreshOptions, inject_fresh
from vislora.registry import ALGORITHMS

PRESET = {"cnn": "every-layer", "vit": "attention-ff", "clip": "attention-ff", "t5": "attention-ff"}
"""The preset that covers a tiny model best; "all" for the others."""


def chosen(model: nn.Module, name: str, rank: int = 2) -> dict[str, Target]:
    return select(model, [], PRESET.get(name, "all"), Target("", rank))


def file_modules(
    model: nn.Module, name: str, seed: int = 0, scale: float = 0.5, algorithm: str = "lora", every: int = 1
) -> list[FileModule]:
    """Return the modules of a file with an effect on every `every`-th of the layers that `chosen` gives."""
    layers = adaptable(model)
    paths = list(chosen(model, name))[::every]
    found = []
    for index, path in enumerate(paths):
        slots = drawn(layers[path], ALGORITHMS[algorithm], rank=2, seed=1000 * seed + index)
        found.append(FileModule(path, algorithm, {key: slot.float() for key, slot in slots.items()}, scale))
    return found


def loaded(model: nn.Module, name: str, adapter: str = "a", seed: int = 0, strength: float = 1.0) -> nn.Module:
    """Put an adapter with an effect on `model` and return it."""
    assert inject_modules(model, adapter, file_modules(model, name, seed), strength) == []
    return model


def training(model: nn.Module, name: str, options: FreshOptions | None = None, adapter: str = "fresh") -> AdapterSet:
    return inject_fresh(model, adapter, chosen(model, name), options or FreshOptions())


def randomise(adapters: AdapterSet, seed: int = 0) -> AdapterSet:
    """Give a fresh adapter an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return adapters


def as_dora(adapters: AdapterSet, seed: int = 0) -> AdapterSet:
    """Give a fresh adapter with magnitudes an effect: they stay near the norms of the weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for slot in adapters.slots():
            slot.copy_(0.2 * torch.randn(slot.shape, generator=generator))
        for magnitude in adapters.magnitudes():
            magnitude.mul_(1.0 + 0.2 * torch.rand(magnitude.shape, generator=generator))
    return adapters


@dataclass(frozen=True)
class Picture:
    """Everything of a model that an ejected adapter must leave as it was."""

    tree: list[tuple[str, nn.Module]]
    classes: list[type]
    attributes: list[list[str]]
    state: Mapping[str, Tensor]
    flags: dict[str, bool]
    identities: dict[str, int]

    @staticmethod
    def of(model: nn.Module) -> Picture:
        modules = list(model.named_modules())
        return Picture(
            tree=modules,
            classes=[type(module) for _, module in modules],
            attributes=[list(module.__dict__) for _, module in modules],
            state=copy.deepcopy(model.state_dict()),
            flags={name: parameter.requires_grad for name, parameter in model.named_parameters()},
            identities={name: id(parameter) for name, parameter in model.named_parameters()},
        )

    def require_same(self, model: nn.Module) -> None:
        now = Picture.of(model)
        assert now.classes == self.classes
        assert [(path, id(module)) for path, module in now.tree] == [(path, id(module)) for path, module in self.tree]
        assert now.attributes == self.attributes
        assert now.flags == self.flags
        assert now.identities == self.identities
        require_equal_states(now.state, self.state)


def require_equal_states(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    assert list(one) == list(other)
    assert all(torch.equal(one[key], other[key]) for key in one)
