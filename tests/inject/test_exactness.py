"""What goes in comes out exactly: base untouched, order of loading without effect, strength 0 and eject bit for bit."""

from __future__ import annotations

import copy
import hashlib
import itertools
import random
from pathlib import Path

import pytest
import torch
from torch import nn

from tests import tiny
from tests.inject.helpers import Picture, file_modules, loaded, require_equal_states, training
from vislora.errors import ConfigError
from vislora.inject.engines import merge, unmerge
from vislora.inject.injection import eject, inject_modules
from vislora.inject.stack import existing_stack, stack_of

# the last block of an MM-DiT throws the text's half of its attention away
UNUSED = {"sd3": {"transformer_blocks/1/attn/add_q_proj:up"}}

NAMES = pytest.mark.parametrize("name", tiny.MODELS)


def folder_hash(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@NAMES
def test_load_then_eject_restores_everything(name):
    model = tiny.model(name)
    picture, before = Picture.of(model), tiny.output(model, name)
    loaded(model, name)
    assert not torch.allclose(tiny.output(model, name), before, atol=1e-4)
    eject(model, "a")
    assert torch.equal(tiny.output(model, name), before)
    picture.require_same(model)


@NAMES
def test_a_fresh_adapter_leaves_the_output_bit_equal_and_the_base_frozen(name):
    model = tiny.model(name)
    if name == "clip":
        next(model.parameters()).requires_grad_(False)
    picture = Picture.of(model)
    # a frozen copy: torch multiplies frozen matrices in another way, and T5 shows it in the last bit
    before = tiny.output(copy.deepcopy(model).requires_grad_(False), name)
    adapters = training(model, name)
    after = tiny.output(model, name)
    assert torch.equal(after, before)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    after.square().sum().backward()
    ups = {key: p for key, p in adapters.named_parameters() if key.endswith("up")}
    assert len(ups) == len(adapters.trained)
    idle = {key for key, p in ups.items() if p.grad is None or not p.grad.any()}
    assert idle == UNUSED.get(name, set())
    eject(model, "fresh")
    picture.require_same(model)


@NAMES
def test_keys_and_values_of_the_base_stay_while_injected(name):
    model, other = tiny.model(name), tiny.model(name)
    loaded(model, name)
    training(model, name)
    merge(model)
    require_equal_states(model.state_dict(), other.state_dict())
    assert [key for key, _ in model.named_parameters()] == [key for key, _ in other.named_parameters()]
    assert [key for key, _ in model.named_modules()] == [key for key, _ in other.named_modules()]
    model.load_state_dict(other.state_dict(), strict=True)
    for module, plain in zip(model.modules(), other.modules(), strict=True):
        assert isinstance(module, type(plain))


@pytest.mark.parametrize("name", ["unet", "sd3", "clip", "vit"])
def test_save_pretrained_of_an_adapted_base_writes_the_same_bytes(name, tmp_path):
    model = tiny.model(name)
    model.save_pretrained(tmp_path / "plain")
    loaded(model, name)
    model.save_pretrained(tmp_path / "adapted")
    assert folder_hash(tmp_path / "plain") == folder_hash(tmp_path / "adapted")


@pytest.mark.parametrize("name", ["unet", "cnn"])
def test_the_order_of_loading_does_not_matter(name):
    outputs = []
    for order in itertools.permutations([("a", 1, 0.7), ("b", 2, -0.4), ("c", 3, 1.3)]):
        model = tiny.model(name)
        for adapter, seed, strength in order:
            loaded(model, name, adapter, seed, strength)
        outputs.append(tiny.output(model, name))
        merge(model)
        outputs.append(tiny.output(model, name))
    assert all(torch.equal(one, outputs[0]) for one in outputs[::2])
    assert all(torch.equal(one, outputs[1]) for one in outputs[1::2])


@NAMES
def test_strength_zero_is_the_base(name):
    model = tiny.model(name)
    before = tiny.output(model, name)
    loaded(model, name, strength=0.0)
    assert torch.equal(tiny.output(model, name), before)
    merge(model)
    assert torch.equal(tiny.output(model, name), before)
    stack_of(model).set_strength("a", 1.0)
    assert not torch.allclose(tiny.output(model, name), before, atol=1e-4)
    stack_of(model).set_strength("a", -0.0)
    assert torch.equal(tiny.output(model, name), before)


def test_strength_multiplies_the_effect():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    before = model[0](x)
    inject_modules(model, "a", file_modules(model, "cnn"), 1.0)
    effect = model[0](x) - before
    stack_of(model).set_strength("a", 2.5)
    torch.testing.assert_close(model[0](x) - before, 2.5 * effect, rtol=0, atol=1e-12)


def test_a_hundred_random_changes_end_where_they_began():
    model = tiny.model("cnn")
    picture, before = Picture.of(model), tiny.output(model, "cnn")
    draw, on = random.Random(0), set()
    for step in range(100):
        name = draw.choice("abcd")
        if name not in on:
            modules = file_modules(model, "cnn", seed=ord(name), every=draw.choice([1, 2, 3]))
            inject_modules(model, name, modules, draw.uniform(-2, 2))
            on.add(name)
        elif draw.random() < 0.5:
            eject(model, name)
            on.remove(name)
        else:
            stack_of(model).set_strength(name, draw.choice([0.0, 1.0, -0.3]))
        draw.choice([merge, unmerge])(model)
        assert tiny.output(model, "cnn").isfinite().all(), step
        if not on:
            assert torch.equal(tiny.output(model, "cnn"), before)
    for name in on:
        eject(model, name)
    assert torch.equal(tiny.output(model, "cnn"), before)
    picture.require_same(model)


def test_an_ejected_adapter_leaves_the_others_as_if_it_had_never_been_there():
    model = tiny.model("unet")
    loaded(model, "unet", "b", seed=2)
    alone = tiny.output(model, "unet")
    loaded(model, "unet", "a", seed=1)
    eject(model, "a")
    assert torch.equal(tiny.output(model, "unet"), alone)
    assert list(existing_stack(model).strengths) == ["b"]


def test_ejecting_an_unknown_adapter_names_the_nearest_and_leaves_nothing():
    model = tiny.model("cnn")
    picture = Picture.of(model)
    with pytest.raises(ConfigError, match="no adapter named 'ink'; loaded: none"):
        eject(model, "ink")
    picture.require_same(model)
    loaded(model, "cnn", "ink")
    with pytest.raises(ConfigError, match=r"no adapter named 'inc' \(did you mean 'ink'\?\); loaded: ink"):
        eject(model, "inc")
    with pytest.raises(ConfigError, match="did you mean 'ink'"):
        stack_of(model).set_strength("inc", 1.0)


def test_two_objects_that_share_a_unet_see_one_stack():
    one, other = tiny.sd_pipeline(), tiny.sd_pipeline()
    other.unet = one.unet
    loaded(one.unet, "unet")
    with pytest.raises(ConfigError, match="loaded already"):
        inject_modules(other.unet, "a", file_modules(one.unet, "unet"))
    eject(other.unet, "a")
    assert existing_stack(one.unet) is None


def test_two_models_that_share_layers_keep_their_names_apart():
    shared = tiny.model("cnn")
    one, other = nn.ModuleDict({"x": shared}), nn.ModuleDict({"y": shared})
    loaded(one, "cnn", "a", seed=1)
    alone = tiny.output(shared, "cnn")
    with pytest.raises(ConfigError, match=r"layer 'y\.0' has an adapter named 'a' already"):
        loaded(other, "cnn", "a", seed=2)
    assert existing_stack(other) is None
    loaded(other, "cnn", "b", seed=2)
    both = tiny.output(shared, "cnn")
    assert not torch.allclose(both, alone)
    eject(other, "b")
    assert torch.equal(tiny.output(shared, "cnn"), alone)


def test_freezing_for_two_adapters_is_undone_with_the_last():
    for first, last in itertools.permutations(["one", "two"]):
        model = tiny.model("cnn")
        model[1].bias.requires_grad_(False)
        picture = Picture.of(model)
        training(model, "cnn", adapter="one")
        loaded(model, "cnn", "file")
        training(model, "cnn", adapter="two")
        eject(model, first)
        assert not any(parameter.requires_grad for parameter in model.parameters())
        eject(model, last)
        assert Picture.of(model).flags == picture.flags
        eject(model, "file")
        picture.require_same(model)
