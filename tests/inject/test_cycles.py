"""A thousand random cycles of loading, strengths, engines and ejecting: the bytes and the memory are as they were."""

from __future__ import annotations

import gc
import hashlib
import itertools
import random

import pytest
import torch
from torch import nn

from tests.inject.helpers import Picture
from tests.layers import drawn
from vislora.inject.engines import choose_engine
from vislora.inject.injection import FileModule, eject, inject_modules
from vislora.inject.stack import settle, stack_of
from vislora.inject.strength import Strength
from vislora.inject.targets import adaptable, index
from vislora.registry import ALGORITHMS

KINDS = ("lora", "loha", "lokr", "oft", "full", "dora", "norm")


class Net(nn.Module):
    """A conv and tokens with a norm: every kind of layer that such adapters are for."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.conv(x).flatten(2).mT
        return self.down(torch.relu(self.up(self.norm(tokens))))


def net(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().to(dtype).requires_grad_(False), torch.randn(2, 3, 4, 4).to(dtype)


def modules_of(model: nn.Module, kind: str, seed: int) -> list[FileModule]:
    """Return an adapter of one kind for every layer that takes it."""
    draw = torch.Generator().manual_seed(seed)
    if kind == "norm":
        sizes = {path: len(norm.weight) for path, norm in index(model).norms.items()}
        tensors = {path: torch.randn(2, size, generator=draw) for path, size in sizes.items()}
        return [FileModule(path, "norm", {"w_norm": pair[0]}, 1.0, bias=pair[1]) for path, pair in tensors.items()]
    found = []
    for path, layer in adaptable(model).items():
        name = "lora" if kind == "dora" else kind
        slots = {key: slot.float() for key, slot in drawn(layer, ALGORITHMS[name], 2, seed=seed).items()}
        magnitude = torch.rand(layer.weight.shape[0], generator=draw) + 0.5 if kind == "dora" else None
        found.append(FileModule(path, name, slots, 0.5, magnitude=magnitude))
    return found


def sha256(model: nn.Module) -> str:
    found = hashlib.sha256()
    for value in model.state_dict().values():
        found.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def living() -> int:
    """Count the numbers in all tensors that are alive."""
    gc.collect()
    return sum(item.numel() for item in gc.get_objects() if type(item) in (torch.Tensor, nn.Parameter))


STRENGTHS = (0.0, 1.0, -0.3, [0.5, None], [1.0, -1.0], Strength(0.7, layers={"up": 0.0, "conv": 2.0}))


@pytest.mark.quick("dtype0")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_a_thousand_random_cycles_leave_the_bytes_and_the_memory_as_they_were(dtype):
    model, x = net(dtype)
    pool = {f"{kind}{seed}": modules_of(model, kind, seed) for kind in KINDS for seed in (1, 2)}
    draw, on = random.Random(0), set()
    before, base, picture, memory = sha256(model), model(x), Picture.of(model), living()
    for step in range(1000):
        name = draw.choice(list(pool))
        if name not in on and len(on) < 5:
            inject_modules(model, name, pool[name], draw.choice(STRENGTHS))
            on.add(name)
        elif name in on and draw.random() < 0.6:
            eject(model, name)
            on.remove(name)
        elif name in on:
            stack_of(model).set_strength(name, draw.choice(STRENGTHS))
        settle(model)
        if on:
            choose_engine(model, draw.choice(["auto", "merged", "stacked"]))
        if step % 4 == 0:
            assert model(x).shape == base.shape
        if step % 100 == 0:
            assert sha256(model) == before
    for name in sorted(on):
        eject(model, name)
    assert sha256(model) == before
    assert torch.equal(model(x), base)
    picture.require_same(model)
    assert living() == memory


@pytest.mark.parametrize("engine", ["merged", "stacked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_every_order_of_a_stack_gives_the_same_bytes(dtype, engine):
    model, x = net(dtype)
    pool = {kind: modules_of(model, kind, 1) for kind in ("lora", "loha", "dora", "norm")}
    outputs = set()
    for order in itertools.permutations(pool):
        for name in order:
            inject_modules(model, name, pool[name], 0.1 + 0.2 * list(pool).index(name))
        choose_engine(model, engine)
        outputs.add(model(x).view(torch.uint8).numpy().tobytes())
        for name in reversed(order):
            eject(model, name)
    assert len(outputs) == 1


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
@torch.no_grad()
def test_merged_and_stacked_agree_to_the_rounding_of_the_type(dtype, tolerance):
    """Relative to the largest output; the weight of a merge is rounded once, to this type."""
    model, x = net(dtype)
    for kind in KINDS:
        inject_modules(model, kind, modules_of(model, kind, 1), 0.2)
    found = {}
    for engine in ("merged", "stacked"):
        choose_engine(model, engine)
        found[engine] = model(x).float()
    largest = found["stacked"].abs().max()
    assert (found["merged"] - found["stacked"]).abs().max() <= tolerance * largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_strength_zero_is_the_base_for_every_kind_and_engine(dtype):
    model, x = net(dtype)
    base = model(x)
    for kind in KINDS:
        inject_modules(model, kind, modules_of(model, kind, 1), 0.0)
    for engine in ("merged", "stacked"):
        choose_engine(model, engine)
        assert torch.equal(model(x), base)
    for kind in KINDS:
        stack_of(model).set_strength(kind, [0.0, 0.0])
    settle(model)
    assert torch.equal(model(x), base)


@torch.no_grad()
def test_the_work_of_a_switch_does_not_grow_with_the_adapters_that_are_loaded(monkeypatch):
    """Counted: the layers that are told, and the adapters that are joined or merged for them."""
    work = {}
    for resident in (6, 50):
        model, x = net()
        pool = [modules_of(model, "lora", seed) for seed in range(3)]
        for number in range(resident):
            inject_modules(model, f"{number:02}", pool[number % 3], float(number < 5))
        model(x)
        seen = []
        tuned = type(stack_of(model))._tune
        monkeypatch.setattr(
            type(stack_of(model)), "_tune", lambda *given, seen=seen, tuned=tuned: seen.append(1) or tuned(*given)
        )
        stack_of(model).set_strengths({"04": (Strength(0.0),), "05": (Strength(1.0),)})
        model(x)
        monkeypatch.undo()
        layers = [module.__dict__["_vislora_layer"] for module in adaptable(model).values()]
        assert all(sum(len(part.adapters) for part in state.parts) == 5 for state in layers)
        work[resident] = len(seen)
    assert work[6] == work[50] == 2 * 3
