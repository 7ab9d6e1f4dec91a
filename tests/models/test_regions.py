"""Regions on whole denoisers: which token of which layer is which place, found by changing the latents there."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import tiny
from vislora.inject.injection import FileModule, inject_modules
from vislora.inject.stack import settle, stack_of
from vislora.inject.strength import Strength
from vislora.models.base import load_family

torch.set_num_threads(1)
CPU = torch.device("cpu")
# a layer of the image's tokens, and one of both
LAYERS = {
    "flux": ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_mlp"),
    "flux2": ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_qkv_mlp_proj"),
    "qwen-image": ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.img_mlp.net.0.proj"),
    "z-image": ("noise_refiner.0.attention.to_q", "layers.0.attention.to_q"),
    "flux-kontext": ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_mlp"),
    "qwen-image-edit": ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.img_mlp.net.0.proj"),
}
CASES = [(name, path) for name, paths in LAYERS.items() for path in paths]
ROWS, COLUMNS = 6, 4


def prepared(name):
    """Return a family, and what its `predict` takes: two latents of 6 x 4 tokens, with a source where it edits."""
    family = load_family(tiny.saved(name), torch.float32, CPU)
    side = tiny.side(name)
    unit = side // family.encode_image(torch.zeros(1, 3, side, side)).shape[-1]
    patch = 1 if name == "flux2" else 2
    pixels = torch.zeros(2, 3, ROWS * patch * unit, COLUMNS * patch * unit)
    latents = torch.randn(family.encode_image(pixels).shape, generator=torch.Generator().manual_seed(0))
    plain = name.removesuffix("-edit")  # that one's processor of images needs torchvision
    text = load_family(tiny.saved(plain), torch.float32, CPU).encode_prompt(["a red cat", "dog"])
    source = {"source": torch.ones_like(latents)} if family.traits.source else {}
    return family, latents, {**text, **source}, patch


def seen(family, path, latents, conditioning):
    """Return what the layer at `path` is given and what it gives."""
    found = []
    layer = family.components["denoiser"].get_submodule(path)
    hook = layer.register_forward_hook(lambda layer, args, out: found.append((args[0], out)))
    with torch.no_grad():
        family.predict(latents, torch.tensor([500.0, 500.0]), conditioning)
    hook.remove()
    return found[0]


@pytest.mark.quick("flux-transformer_blocks.*", "flux-single_*", "z-image-layers.*", "qwen-image-edit-*.to_q")
@pytest.mark.parametrize(("name", "path"), CASES)
def test_an_effect_is_where_the_region_is(name, path):
    family, latents, conditioning, patch = prepared(name)
    model = family.components["denoiser"]
    given, base = seen(family, path, latents, conditioning)
    inside = tokens_of_places(family, path, latents, conditioning, patch, given)
    layer = model.get_submodule(path)
    slots = {"down": torch.randn(2, layer.in_features), "up": torch.randn(layer.out_features, 2)}
    inject_modules(model, "a", [FileModule(path, "lora", slots, 1.0)])
    whole = seen(family, path, latents, conditioning)[1] - base
    mask = np.zeros((ROWS, COLUMNS), np.float32)
    mask[1:3, 0:2] = 1.0
    mask[4, 3] = 0.5
    stack_of(model).set_strength("a", Strength(region=mask))
    settle(model)
    part = seen(family, path, latents, conditioning)[1] - base
    factors = torch.ones(given.shape[1])  # what is no place has the largest
    for place, token in inside.items():
        factors[token] = float(mask[place])
    assert torch.allclose(part, factors[:, None] * whole, atol=1e-4 * float(whole.abs().max()))


def tokens_of_places(family, path, latents, conditioning, patch, given):
    """Return place -> token: the one that a change of the latents there changes most."""
    found = {}
    for row in range(ROWS):
        for column in range(COLUMNS):
            other = latents.clone()
            other[..., row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] += 3.0
            change = (seen(family, path, other, conditioning)[0] - given).norm(dim=-1).mean(0)
            found[row, column] = int(change.argmax())
    assert len(set(found.values())) == ROWS * COLUMNS
    return found


@pytest.mark.parametrize("name", LAYERS)
def test_a_region_of_everything_is_none_and_one_of_nothing_is_the_base(name):
    family, latents, conditioning, _ = prepared(name)
    model = family.components["denoiser"]

    def prediction(strength):
        stack_of(model).set_strength("a", strength)
        settle(model)
        with torch.no_grad():
            return family.predict(latents, torch.tensor([500.0, 500.0]), conditioning)

    modules = []
    for path in LAYERS[name]:
        layer = model.get_submodule(path)
        slots = {"down": torch.randn(2, layer.in_features), "up": torch.randn(layer.out_features, 2)}
        modules.append(FileModule(path, "lora", slots, 0.1))
    with torch.no_grad():
        base = family.predict(latents, torch.tensor([500.0, 500.0]), conditioning)
    inject_modules(model, "a", modules)
    whole = prediction(1.0)
    assert torch.equal(prediction(Strength(region=np.zeros((ROWS, COLUMNS)))), base)
    assert torch.allclose(prediction(Strength(region=np.ones((ROWS, COLUMNS)))), whole, rtol=1e-4, atol=1e-5)
    half = prediction(Strength(region=(0, 0, 0.5, 1)))
    assert not torch.allclose(half, whole, atol=1e-4)
    assert not torch.allclose(half, base, atol=1e-4)
