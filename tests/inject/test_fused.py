"""Projections that diffusers fuses: an adapter on a layer that is then passed over is one error, never a silence."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import nn

from tests import tiny
from tests.inject.helpers import Picture, file_modules, loaded, training
from tests.layers import drawn
from vislora.errors import AdapterMismatchError
from vislora.inject.engines import merge
from vislora.inject.injection import FileModule, eject, inject_modules
from vislora.inject.stack import existing_stack
from vislora.inject.targets import adaptable
from vislora.registry import ALGORITHMS

FUSABLE = pytest.mark.parametrize("name", ["unet", "sd3", "flux"])
"""Two models with the old attention class of diffusers, which keeps its fused layers for good, and one with the new."""
PASSED_OVER = (
    r"layer '.*' has an adapter, and fuse_qkv_projections\(\) .*; call unfuse_qkv_projections\(\) on the model"
)


@FUSABLE
@pytest.mark.parametrize("change", [lambda m: None, merge], ids=["stacked", "merged"])
@torch.no_grad()
def test_fusing_over_adapters_stops_the_next_forward_until_it_is_undone(name, change):
    model = loaded(tiny.model(name), name)
    change(model)
    adapted = tiny.output(model, name)
    model.fuse_qkv_projections()
    for _ in range(2):
        with pytest.raises(AdapterMismatchError, match=PASSED_OVER):
            tiny.output(model, name)
    model.unfuse_qkv_projections()
    assert torch.equal(tiny.output(model, name), adapted)


@FUSABLE
@torch.no_grad()
def test_ejecting_ends_the_refusal_and_the_watch(name):
    model = tiny.model(name)
    before = tiny.output(model, name)
    loaded(model, name, "a")
    loaded(model, name, "b", seed=2)
    model.fuse_qkv_projections()
    eject(model, "a")
    with pytest.raises(AdapterMismatchError, match=PASSED_OVER):
        tiny.output(model, name)
    eject(model, "b")
    torch.testing.assert_close(tiny.output(model, name), before)
    model.unfuse_qkv_projections()
    assert torch.equal(tiny.output(model, name), before)
    assert existing_stack(model) is None
    assert not any(module._forward_pre_hooks for module in model.modules())


@FUSABLE
def test_adapters_for_a_fused_model_are_refused_and_nothing_changed(name):
    model = tiny.model(name)
    modules = file_modules(model, name)
    model.fuse_qkv_projections()
    picture = Picture.of(model)
    message = r"adapter 'a' is for \d+ layers that are not run, '.*to_q' for one: .*; call unfuse_qkv_projections\(\)"
    for allow_partial in (False, True):
        with pytest.raises(AdapterMismatchError, match=message):
            inject_modules(model, "a", modules, allow_partial=allow_partial)
    with pytest.raises(AdapterMismatchError, match="adapter 'fresh' is for"):
        training(model, name)
    picture.require_same(model)
    assert existing_stack(model) is None


@FUSABLE
@torch.no_grad()
def test_fused_and_unfused_again_is_as_never_fused(name):
    model = tiny.model(name)
    layers = list(adaptable(model))
    model.fuse_qkv_projections()
    assert any(path.endswith("to_qkv") for path in adaptable(model))
    model.unfuse_qkv_projections()
    assert list(adaptable(model)) == layers
    assert torch.equal(tiny.output(loaded(model, name), name), tiny.output(loaded(tiny.model(name), name), name))


def fused_modules(model: nn.Module) -> list[FileModule]:
    layers = {path: layer for path, layer in adaptable(model).items() if path.endswith("to_qkv")}
    slots = [drawn(layer, ALGORITHMS["lora"], rank=2, seed=seed) for seed, layer in enumerate(layers.values())]
    return [
        FileModule(path, "lora", {key: slot.float() for key, slot in each.items()}, 0.5)
        for path, each in zip(layers, slots, strict=True)
    ]


@FUSABLE
@torch.no_grad()
def test_adapters_on_fused_layers_work_until_these_are_out_of_use(name):
    model = tiny.model(name)
    model.fuse_qkv_projections()
    before = tiny.output(model, name)
    inject_modules(model, "a", fused_modules(model))
    assert not torch.allclose(tiny.output(model, name), before, atol=1e-3)
    message = r"layer '.*to_qkv' has an adapter, and unfuse_qkv_projections\(\) took the layer out of use; eject"
    model.unfuse_qkv_projections()
    with pytest.raises(AdapterMismatchError, match=message):
        tiny.output(model, name)
    model.fuse_qkv_projections()  # makes new layers, without the adapter
    with pytest.raises(AdapterMismatchError, match=message):
        tiny.output(model, name)
    eject(model, "a")
    assert torch.equal(tiny.output(model, name), before)


@FUSABLE
@torch.no_grad()
def test_adapters_on_other_layers_do_not_mind(name):
    model, fused = tiny.model(name), tiny.model(name)
    fused.fuse_qkv_projections()
    chosen = [item for item in file_modules(model, name) if not item.path.endswith(("_proj", "to_q", "to_k", "to_v"))]
    inject_modules(model, "a", chosen)
    expected = tiny.output(model, name)
    assert not model._forward_pre_hooks
    model.fuse_qkv_projections()
    torch.testing.assert_close(tiny.output(model, name), expected)
    inject_modules(fused, "a", chosen)
    torch.testing.assert_close(tiny.output(fused, name), expected)


@torch.no_grad()
def test_a_query_that_still_runs_beside_fused_keys_and_values_may_have_an_adapter():
    model = tiny.model("unet")
    queries = [item for item in file_modules(model, "unet") if item.path.endswith("attn2.to_q")]
    inject_modules(model, "a", queries)
    expected = tiny.output(model, "unet")
    model.fuse_qkv_projections()
    torch.testing.assert_close(tiny.output(model, "unet"), expected)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", ["unet", "flux"])
@torch.no_grad()
def test_copies_are_watched_on_their_own(how: Callable[[nn.Module], nn.Module], name):
    model = loaded(tiny.model(name), name)
    adapted = tiny.output(model, name)
    other = how(model)
    other.fuse_qkv_projections()
    with pytest.raises(AdapterMismatchError, match=PASSED_OVER):
        tiny.output(other, name)
    assert torch.equal(tiny.output(model, name), adapted)
    eject(other, "a")
    assert not other._forward_pre_hooks
    model.fuse_qkv_projections()
    with pytest.raises(AdapterMismatchError, match=PASSED_OVER):
        tiny.output(model, name)


class Block(nn.Module):
    """One attention of FLUX: a whole transformer takes dynamo ten seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = tiny.seeded(lambda: FluxAttention(query_dim=8, heads=2, dim_head=4), 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(x)


@torch.no_grad()
def test_a_compiled_model_is_watched_and_stays_one_graph():
    torch._dynamo.reset()
    model, x = Block(), torch.ones(1, 3, 8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    before = compiled(x)
    inject_modules(model, "a", file_modules(model, "flux"))
    torch.testing.assert_close(compiled(x), model(x))
    assert not torch.allclose(compiled(x), before, atol=1e-3)
    model.attn.fuse_projections()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="unfuse_qkv_projections"):  # as one graph it cannot raise
        compiled(x)
    with pytest.raises(AdapterMismatchError, match=PASSED_OVER):
        torch.compile(model, backend="eager")(x)
    model.attn.unfuse_projections()
    torch.testing.assert_close(compiled(x), model(x))
    eject(model, "a")
    assert torch.equal(compiled(x), before)
    torch._dynamo.reset()
