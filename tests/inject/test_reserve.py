"""Reserved models: adapters come, change and go without a recompilation; counted, and equal to what is not compiled."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from tests import tiny
from tests.inject.helpers import Picture, chosen, training
from tests.layers import drawn
from vislora.errors import AdapterMismatchError, ConfigError
from vislora.inject.injection import FileModule, eject, inject_modules, release_room, reserve_room
from vislora.inject.stack import existing_stack, settle, stack_of
from vislora.inject.strength import Strength
from vislora.inject.targets import adaptable
from vislora.registry import ALGORITHMS


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


def modules_of(model: nn.Module, name: str, seed: int, rank: int, every: int = 1) -> list[FileModule]:
    layers = adaptable(model)
    paths = [path for path in chosen(model, name) if not isinstance(layers[path], nn.Embedding)][::every]
    found = []
    for index, path in enumerate(paths):
        slots = drawn(layers[path], ALGORITHMS["lora"], rank=rank, seed=1000 * seed + index)
        found.append(FileModule(path, "lora", {key: slot.float() for key, slot in slots.items()}, 0.5))
    return found


def near(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def set_strength(model, name, strength):
    stack_of(model).set_strength(name, strength)
    settle(model)


@pytest.mark.quick("False-clip", "True-flux")
@pytest.mark.parametrize("name", ["flux", "clip", "unet"])
@pytest.mark.parametrize("in_place", [False, True])
@torch.no_grad()
def test_no_change_of_adapters_recompiles(counter, name, in_place):
    if (name, in_place) == ("unet", True):
        pytest.skip("the whole UNet takes dynamo ten seconds; once is enough")
    model, plain = tiny.model(name), tiny.model(name)
    if in_place:
        compiled = model
        model.compile(backend=counter)
    else:
        compiled = torch.compile(model, backend=counter)
    reserve_room(compiled, 8)
    base = tiny.output(compiled, name)
    near(base, tiny.output(plain, name))
    frames = counter.frame_count
    assert frames >= 1
    for adapter, seed, rank, every in (("b", 1, 2, 1), ("a", 2, 4, 2), ("c", 3, 1, 3)):
        for target in (compiled, plain):
            inject_modules(target, adapter, modules_of(model, name, seed, rank, every), 0.7)
        near(tiny.output(compiled, name), tiny.output(plain, name))
    for adapter, strength in {
        "a": 0.0,
        "b": Strength(-1.5, layers={"*.to_q": 0.5} if name != "clip" else {"*.fc1": 0.5}),
        "c": [1.0, 0.25],
    }.items():
        for target in (compiled, plain):
            set_strength(target, adapter, strength)
        near(tiny.output(compiled, name), tiny.output(plain, name))
    for adapter in "cba":
        for target in (compiled, plain):
            eject(target, adapter)
        near(tiny.output(compiled, name), tiny.output(plain, name))
    assert torch.equal(tiny.output(compiled, name), base)
    assert counter.frame_count == frames


@torch.no_grad()
def test_a_reserved_model_is_one_graph_and_leaves_nothing_behind(counter):
    model = tiny.model("vit")
    before = tiny.output(model, "vit")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    tiny.output(compiled, "vit")  # transformers marks what runs compiled
    picture = Picture.of(model)
    reserve_room(compiled, 4, "attention-ff")
    assert torch.equal(tiny.output(model, "vit"), before)
    inject_modules(compiled, "a", modules_of(model, "vit", 1, 2))
    tiny.output(compiled, "vit")
    assert counter.frame_count == 2
    release_room(compiled)
    assert not existing_stack(model).clocks
    kept = tiny.output(model, "vit")
    eject(compiled, "a")
    picture.require_same(model)
    inject_modules(model, "a", modules_of(model, "vit", 1, 2))
    assert torch.equal(tiny.output(model, "vit"), kept)


@torch.no_grad()
def test_every_order_of_loading_gives_the_same_bytes():
    outputs = []
    for order in ("abc", "cab", "bca"):
        model = tiny.model("vit")
        reserve_room(model, 8)
        for name in order:
            inject_modules(model, name, modules_of(model, "vit", ord(name), 2), 0.3)
        outputs.append(tiny.output(model, "vit"))
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@torch.no_grad()
def test_ranks_beyond_the_room_are_refused_and_nothing_changes():
    model = tiny.model("vit")
    reserve_room(model, 4)
    inject_modules(model, "a", modules_of(model, "vit", 1, 3), 0.5)
    out = tiny.output(model, "vit")
    with pytest.raises(
        ConfigError, match=r"rank 5 together \('a' 3, 'b' 2\), and the model is reserved for max_rank=4"
    ):
        inject_modules(model, "b", modules_of(model, "vit", 2, 2))
    assert list(stack_of(model).strengths) == ["a"]
    inject_modules(model, "b", modules_of(model, "vit", 2, 2), 0.0)
    with pytest.raises(ConfigError, match="max_rank=4"):
        set_strength(model, "b", 1.0)
    assert torch.equal(tiny.output(model, "vit"), out)
    stack_of(model).set_strengths({"b": (Strength(1.0),), "a": (Strength(0.0),)})
    alone = tiny.model("vit")
    inject_modules(alone, "b", modules_of(alone, "vit", 2, 2))
    near(tiny.output(model, "vit"), tiny.output(alone, "vit"))


@torch.no_grad()
def test_what_a_reserved_model_cannot_run_is_refused():
    model = tiny.model("vit")
    reserve_room(model, 4, "attention")
    picture = Picture.of(model)
    with pytest.raises(AdapterMismatchError, match="layers that are not reserved; reserve with layers='every-layer'"):
        inject_modules(model, "a", modules_of(model, "vit", 1, 2))
    query = [path for path in adaptable(model) if path.endswith(("q_proj", "query", "to_q"))][:1]
    slots = drawn(adaptable(model)[query[0]], ALGORITHMS["loha"], rank=2)
    with pytest.raises(AdapterMismatchError, match=r"is not of plain LoRA on 1 layers.*\(--as lora\)"):
        inject_modules(model, "a", [FileModule(query[0], "loha", slots, 1.0)])
    with pytest.raises(AdapterMismatchError):
        training(model, "vit")
    with pytest.raises(ConfigError, match="reserved already"):
        reserve_room(model, 8)
    fitting = [FileModule(query[0], "lora", drawn(adaptable(model)[query[0]], ALGORITHMS["lora"], rank=2), 1.0)]
    for strength, message in {
        "has a region": Strength(region=(0, 0, 0.5, 1)),
        "differs by component or layer": (Strength(), Strength(layers={"*": 0.5})),
    }.items():
        with pytest.raises(ConfigError, match=strength):
            inject_modules(model, "a", fitting, message)
    picture.require_same(model)
    with pytest.raises(ConfigError, match="are no layers of"):
        reserve_room(tiny.model("vit"), 4, "nothing.*")


@torch.no_grad()
def test_the_work_of_a_switch_does_not_grow_with_the_adapters_that_are_loaded(monkeypatch):
    """Counted: copies into the room, and adapters looked at."""

    def copies(resident):
        model = tiny.model("vit")
        reserve_room(model, 10)
        for number in range(resident):
            inject_modules(model, f"{number:02}", modules_of(model, "vit", number % 3, 2), float(number < 5))
        copied = []
        monkeypatch.setattr("vislora.inject.reserve.scaled", lambda tensor, factor: copied.append(1) or tensor * factor)
        stack_of(model).set_strengths({"04": (Strength(0.0),), "05": (Strength(1.0),)})
        monkeypatch.undo()
        return len(copied)

    assert copies(6) == copies(50) > 0
