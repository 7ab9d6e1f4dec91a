"""Strengths that depend on the moment, on bare models: grids of tokens, rows, copies, compiled models."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

from tests import tiny
from tests.inject.helpers import file_modules, loaded
from vislora.errors import AdapterMismatchError, ConfigError
from vislora.inject.injection import FileModule, inject_modules
from vislora.inject.places import Places
from vislora.inject.stack import settle, stack_of
from vislora.inject.strength import Strength


def set_strength(model: nn.Module, strength: object, name: str = "a") -> nn.Module:
    stack_of(model).set_strength(name, strength)
    settle(model)
    return model


def tokens(count: int) -> torch.Tensor:
    return torch.zeros(2, count, 5)


def test_grids_of_a_unet_are_its_latents_halved():
    places = Places((12, 9), text=77)
    assert places.grid("down_blocks.0.attentions.0.proj_in", tokens(108), -1) == (12, 9, 0, 0)
    assert places.grid("mid_block.attentions.0.ff.net.2", tokens(9), -1) == (3, 3, 0, 0)
    assert places.grid("up_blocks.0.attn1.to_q", tokens(30), -1) == (6, 5, 0, 0)
    assert places.grid("up_blocks.0.attn1.to_q", tokens(77), -1) is None
    assert places.grid("up_blocks.0.attn2.to_k", tokens(108), -1) is None
    assert places.grid("time_embedding.linear_1", torch.zeros(2, 5), -1) is None
    assert places.grid("conv_in", torch.zeros(2, 5, 4, 3), 1) == (4, 3, 0, 0)


def test_grids_of_transformers_are_patches_and_joint_layers_have_the_text_first():
    assert Places((16, 8), patch=2).grid("blocks.0.attn.to_q", tokens(32), -1) == (8, 4, 0, 0)
    assert Places((16, 8), patch=2).grid("blocks.0.attn.to_q", tokens(128), -1) is None
    joint = Places((4, 4), text=7, joint="text first", images=16)
    assert joint.grid("single_transformer_blocks.0.proj_mlp", tokens(23), -1) == (4, 4, 7, 0)
    assert joint.grid("transformer_blocks.0.ff_context.net.2", tokens(16), -1) is None
    assert joint.grid("transformer_blocks.0.attn.to_q", tokens(4), -1) is None  # they are never halved
    editing = Places((4, 4), text=7, joint="text first", images=16 + 9)
    assert editing.grid("transformer_blocks.0.attn.to_q", tokens(25), -1) == (4, 4, 0, 9)
    assert editing.grid("single_transformer_blocks.0.attn.to_out", tokens(32), -1) == (4, 4, 7, 9)
    assert Places((4, 4), text=7).grid("single_transformer_blocks.0.proj_mlp", tokens(23), -1) is None


def test_z_image_has_the_text_last_and_fills_its_tokens_up():
    places = Places((5, 4), joint="text last", images=32)
    assert places.grid("noise_refiner.0.attention.to_q", tokens(32), -1) == (5, 4, 0, 12)
    assert places.grid("layers.0.attention.to_q", tokens(64), -1) == (5, 4, 0, 44)
    assert places.grid("context_refiner.0.attention.to_q", tokens(32), -1) is None
    assert places.grid("cap_embedder.1", tokens(32), -1) is None


@pytest.mark.parametrize("name", ["flux", "unet", "sd3", "dit"])
@torch.no_grad()
def test_masks_of_ones_and_zeros_on_every_kind_of_denoiser(name):
    model = loaded(tiny.model(name), name)
    whole = tiny.output(model, name)
    base = tiny.output(tiny.model(name), name)
    set_strength(model, Strength(region=np.ones((4, 4))))
    torch.testing.assert_close(tiny.output(model, name), whole, rtol=1e-4, atol=1e-5)
    set_strength(model, Strength(region=np.zeros((4, 4))))
    assert torch.equal(tiny.output(model, name), base)
    set_strength(model, Strength(region=(0, 0, 0.5, 1)))
    part = tiny.output(model, name)
    assert not torch.allclose(part, whole, atol=1e-4)
    assert not torch.allclose(part, base, atol=1e-4)


@torch.no_grad()
def test_what_has_no_places_refuses_regions():
    model = loaded(tiny.model("vit"), "vit", strength=Strength(region=(0, 0, 0.5, 1)))
    assert tiny.output(model, "vit").isfinite().all()  # pixels are places; its tokens are none
    bare = nn.Sequential(nn.Linear(6, 5))
    inject_modules(bare, "a", file_modules(bare, "cnn"), Strength(region=(0, 0, 0.5, 1)))
    with pytest.raises(AdapterMismatchError, match="nothing tells the places of the image"):
        bare(torch.ones(2, 6))


@torch.no_grad()
def test_a_layer_that_runs_once_for_all_images_is_named():
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.place, self.proj = nn.Linear(3, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.proj(x + self.place(torch.ones(1, 5, 3)))

    model = Positions()
    slots = {"down": torch.ones(2, 3), "up": torch.ones(4, 2)}
    inject_modules(model, "a", [FileModule("place", "lora", slots, 1.0)], [1.0, 0.0])
    settle(model)
    with pytest.raises(AdapterMismatchError, match=r"layer 'place' runs once for all 2 images.*layers=\{'place': 0\}"):
        model(torch.ones(2, 5, 4))
    set_strength(model, [Strength(1.0, layers={"place": 0}), 0.0])
    assert model(torch.ones(2, 5, 4)).isfinite().all()


@torch.no_grad()
def test_rows_that_a_model_makes_of_one_image_are_all_of_that_image():
    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch, frames, tokens, width)
            return self.proj(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    model = Frames()
    x = torch.randn(2, 3, 5, 4)
    base = model(x)
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        inject_modules(model, name, file_modules(model, "cnn", seed))
    for shared in (1.0, 0.0):  # joined, and each image with matrices of its own
        set_strength(model, shared, "c")
        for name in "ab":
            set_strength(model, 1.0 if name == "a" else 0.0, name)
        alone = model(x)
        set_strength(model, [1.0, 0.0], "a")
        found = model(x)
        torch.testing.assert_close(found[0], alone[0])
        if not shared:
            assert torch.equal(found[1], base[1])
        set_strength(model, [0.0, 1.0], "b")
        torch.testing.assert_close(model(x)[0], alone[0])


def test_copies_keep_strengths_and_their_moment():
    model = set_strength(loaded(tiny.model("vit"), "vit"), [1.0, 0.25])
    out = tiny.output(model, "vit")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(tiny.output(other, "vit"), out)
        set_strength(other, [0.25, 1.0])
        assert not torch.allclose(tiny.output(other, "vit"), out, atol=1e-4)
        assert torch.equal(tiny.output(model, "vit"), out)


@pytest.mark.quick("False")
@pytest.mark.parametrize("loads_first", [True, False])
@torch.no_grad()
def test_compiled_models_without_room_follow_the_moment_too(loads_first):
    torch._dynamo.reset()
    model, plain = tiny.model("vit"), loaded(tiny.model("vit"), "vit")
    compiled = model if loads_first else torch.compile(model, backend="eager")
    loaded(compiled, "vit")
    set_strength(compiled, [1.0, 0.25])
    compiled = torch.compile(model, backend="eager") if loads_first else compiled
    for strengths in ([1.0, 0.25], [0.0, 2.0], 0.5, [0.25, 0.0]):
        set_strength(plain, strengths)
        set_strength(compiled, strengths)
        torch.testing.assert_close(tiny.output(compiled, "vit"), tiny.output(plain, "vit"), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_strengths_for_several_numbers_of_images_are_refused_while_the_model_runs():
    model = set_strength(loaded(tiny.model("vit"), "vit"), [1.0, 0.0, 0.5])
    with pytest.raises(ConfigError, match="given for 3 images, and denoiser runs 2 rows"):
        tiny.output(model, "vit")


@pytest.mark.parametrize("strengths", [(0.5, 0.7), ([1.0, None], [None, 0.5]), ([1.0, 0.5], 0.3)])
def test_under_autocast_and_with_gradients(strengths):
    model, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(2, 3, 6, requires_grad=True)
    for name, seed, strength in zip("ab", (1, 2), strengths, strict=True):
        inject_modules(model, name, file_modules(model, "cnn", seed), strength)
    out = model(x)
    out.sum().backward()
    assert x.grad.any()
    with torch.no_grad():
        torch.testing.assert_close(model(x), out)
        with torch.autocast("cpu", torch.bfloat16):
            found = model(x)
    torch.testing.assert_close(found.float(), out, rtol=0.1, atol=0.1)
