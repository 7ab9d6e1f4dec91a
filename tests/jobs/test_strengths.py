"""Strengths on pipelines: per component, layer, step, image of the batch and region; refused ones change nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler, StableDiffusionImg2ImgPipeline

import vislora
from tests import tiny
from tests.jobs.test_pipelines import adapter, fresh, state
from vislora import Strength
from vislora.errors import AdapterMismatchError, ConfigError
from vislora.jobs.pipelines import attach, loaded_strengths
from vislora.models.base import components_of

torch.set_num_threads(1)
PROMPTS = ["a red cat", "the blue house", "an ink tree"]


@pytest.fixture(params=["sd", "sd3"])
def pipeline(request):
    return fresh(request.param)


def put(pipeline, name, seed=0, strength=1.0, preset="all"):
    family, components = components_of(pipeline)
    assert attach(pipeline, adapter(components, family, seed, preset), name, strength) == []
    return pipeline


def images(pipeline, prompts=PROMPTS[:1], seeds=None, steps=3, **more):
    seeds = range(len(prompts)) if seeds is None else seeds
    made = pipeline(
        prompt=prompts,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        num_inference_steps=steps,
        width=16,
        height=16,
        output_type="np",
        **more,
    )
    return torch.from_numpy(made.images)


def near(one, other, tolerance=2e-5):
    assert (one - other).abs().max() <= tolerance


def far(one, other):
    assert (one - other).abs().max() > 1e-3


def test_components_and_layers_scale_what_they_name(pipeline):
    put(pipeline, "a")
    components = components_of(pipeline)[1]
    whole, half = images(pipeline), {"te": 0.5}
    vislora.set_strengths(pipeline, {"a": Strength(0.6, components={"denoiser": 0.0, **half}, layers={"*": 1.0})})
    found = images(pipeline)
    vislora.eject(pipeline)
    family = components_of(pipeline)[0]
    text = {name: model for name, model in components.items() if name != "denoiser"}
    only = adapter(components, family)
    only.modules = [module for module in only.modules if module.component in text]
    attach(pipeline, only, "text", 0.3)
    near(images(pipeline), found)
    far(found, whole)


def test_every_layer_can_be_named():
    pipeline = fresh("sd")
    _, components = components_of(pipeline)
    put(pipeline, "a", preset="every-layer")
    base = images(fresh("sd"))
    names = [name for name, _ in components["denoiser"].named_children()]
    every = {**dict.fromkeys(names, 0.0), "*encoder*": 0.0}
    found = {name: 0.0 for name in every if any(name in path for path in dict(components["denoiser"].named_modules()))}
    assert {"mid_block", "conv_in", "conv_out", "down_blocks", "up_blocks", "time_embedding"} <= found.keys()
    adapted = {path.split(".")[0] for path in pipeline.unet.__dict__["_vislora_stack"].paths["a"]}
    layers = {name: 0.0 for name in names if name in adapted}
    vislora.set_strengths(pipeline, {"a": Strength(components={"te": 0.0}, layers=layers)})
    assert torch.equal(images(pipeline), base)


@pytest.mark.parametrize("scheduler", [None, EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_windows_follow_the_steps_of_the_loop(scheduler):
    pipeline = put(fresh("sd"), "a", strength=0.0)
    if scheduler is not None:
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    vislora.set_strengths(pipeline, {"a": Strength(components={"te": 0.0}, steps=(0.0, 0.5))})
    seen = []

    def look(model, args, kwargs):
        seen.append(pipeline.unet.__dict__["_vislora_stack"].moment.progress)

    pipeline.unet.register_forward_pre_hook(look, with_kwargs=True)
    found = images(pipeline, steps=5)
    order = pipeline.scheduler.order
    assert seen[0] == 0.0
    assert seen[-1] == 1.0
    assert len(seen) == (5 if order == 1 else 9)
    expected = put(fresh("sd"), "a", strength=Strength(components={"te": 0.0}))
    expected.scheduler = pipeline.scheduler

    def switch(pipe, step, timestep, values):
        if step + 1 >= 2:
            vislora.set_strengths(pipe, {"a": 0.0})
        return values

    if order == 1:
        near(images(expected, steps=5, callback_on_step_end=switch), found)


def test_steps_in_a_pipeline_of_flow_matching():
    pipeline = put(fresh("sd3"), "a", strength=Strength(2.0, components={"te": 0.0}, steps=[(0, 1), (1, 0)]))
    found = images(pipeline, steps=3)
    expected = put(fresh("sd3"), "a", strength=Strength(2.0, components={"te": 0.0}))

    def switch(pipe, step, timestep, values):
        vislora.set_strengths(pipe, {"a": Strength((1.0, 0.0, 0.0)[step], components={"te": 0.0})})
        return values

    near(images(expected, steps=3, callback_on_step_end=switch), found)


def test_image_to_image_begins_in_the_middle():
    pipeline = fresh("sd")
    second = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    second.set_progress_bar_config(disable=True)
    seen = []
    put(second, "a", strength=Strength(steps=lambda progress: seen.append(round(progress, 3)) or 1.0))
    picture = torch.zeros(1, 3, 16, 16)
    second(prompt="a cat", image=picture, strength=0.5, num_inference_steps=9, output_type="np")
    assert sorted(set(seen)) == [0.625, 0.75, 0.875, 1.0]


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_every_image_of_a_batch_has_its_own_stack(pipeline, guidance):
    for number, name in enumerate("abc"):
        put(pipeline, name, number + 1, 0.0)
    stacks = [{"a": 1.0}, {"b": 0.7, "c": -0.5}, {}]
    mixed = {name: [stack.get(name) for stack in stacks] for name in "abc"}
    vislora.set_strengths(pipeline, mixed)
    together = images(pipeline, PROMPTS, guidance_scale=guidance)
    for index, stack in enumerate(stacks):
        vislora.set_strengths(pipeline, {name: stack.get(name, 0.0) for name in "abc"})
        alone = images(pipeline, PROMPTS[index : index + 1], [index], guidance_scale=guidance)
        near(together[index], alone[0])
    far(together[0], together[1])


def test_images_with_parts_of_their_own_and_a_common_adapter():
    pipeline = put(put(put(fresh("sd"), "a", 1), "b", 2), "c", 3, 0.4)
    own = [Strength(0.8, steps=(0.0, 0.5)), Strength(0.5, layers={"mid_block": 0.0}), Strength(region=(0, 0, 0.5, 1))]
    vislora.set_strengths(pipeline, {"a": own, "b": [None, 1.0, None]})
    together = images(pipeline, PROMPTS)
    for index, one in enumerate(own):
        vislora.set_strengths(pipeline, {"a": one, "b": float(index == 1)})
        near(together[index], images(pipeline, PROMPTS[index : index + 1], [index])[0])


def test_several_images_of_one_prompt():
    pipeline = put(put(fresh("sd"), "a", 1), "b", 2)
    on_unet = {"te": 0.0}
    vislora.set_strengths(
        pipeline, {"a": [Strength(1, on_unet), Strength(0, on_unet)], "b": [Strength(0, on_unet), Strength(1, on_unet)]}
    )
    together = images(pipeline, PROMPTS[:1], [0, 1], num_images_per_prompt=2)
    for index, name in enumerate("ab"):
        vislora.set_strengths(pipeline, {"a": 0.0, "b": 0.0, name: Strength(1, on_unet)})
        near(together[index], images(pipeline, PROMPTS[:1], [index])[0])
    vislora.set_strengths(pipeline, {"a": [1.0, 0.0], "b": [0.0, 1.0]})
    with pytest.raises(ConfigError, match="give the prompt once per image"):
        images(pipeline, PROMPTS[:1], [0, 1], num_images_per_prompt=2)


def test_batches_of_another_size_than_the_strengths_are_refused(pipeline):
    put(pipeline, "a")
    vislora.set_strengths(pipeline, {"a": [1.0, 0.0]})
    with pytest.raises((ConfigError, AdapterMismatchError), match="strengths were given for 2 images"):
        images(pipeline, PROMPTS)
    vislora.set_strengths(pipeline, {"a": 0.0})
    assert torch.equal(images(pipeline, PROMPTS), images(fresh(components_of(pipeline)[0]), PROMPTS))


def test_a_region_of_everything_is_no_region_and_one_of_nothing_is_the_base(pipeline):
    name = components_of(pipeline)[0]
    put(pipeline, "a", strength=0.7)
    whole = images(pipeline)
    vislora.set_strengths(pipeline, {"a": Strength(0.7, region=np.ones((16, 16)))})
    near(images(pipeline), whole)
    vislora.set_strengths(pipeline, {"a": Strength(0.7, region=np.zeros((16, 16)))})
    assert torch.equal(images(pipeline), images(fresh(name)))


def test_two_halves_with_one_adapter_each_are_the_whole():
    pipeline = put(fresh("sd"), "a")
    whole = images(pipeline)
    put(pipeline, "b")
    left, right = Strength(region=(0, 0, 0.5, 1), components={"te": 0.5}), None
    right = Strength(region=(0.5, 0, 1, 1), components={"te": 0.5}, layers={"*.attn2.to_[kv]": 0, "*time_emb*": 0})
    vislora.set_strengths(pipeline, {"a": left, "b": right})
    near(images(pipeline), whole, 1e-4)
    vislora.set_strengths(pipeline, {"b": 0.0})
    far(images(pipeline), whole)


def test_a_mask_of_another_shape_stops_the_call_before_it_begins(pipeline):
    put(pipeline, "a", strength=Strength(region=np.ones((8, 16))))
    with pytest.raises(ConfigError, match="mask is 16 x 8"):
        images(pipeline)


def test_refused_strengths_change_nothing():
    pipeline = put(put(fresh("sd"), "a", strength=0.5), "b", 1, 0.25)
    before, kept, out = state(pipeline), loaded_strengths(pipeline), images(pipeline)
    for bad, message in {
        "no adapter named": {"c": 1.0},
        "strength of 'b'": {"a": 1.0, "b": float("nan")},
        "no component 'te:t5'": {"a": 1.0, "b": Strength(components={"te:t5": 1.0})},
        "matches no layer and no block": {"b": Strength(layers={"middle": 1.0})},
        "several numbers of images": {"a": [1.0, 0.0], "b": [1.0, 0.0, 1.0]},
        "is an empty list": {"a": []},
    }.items():
        with pytest.raises(ConfigError, match=bad):
            vislora.set_strengths(pipeline, message)
        assert loaded_strengths(pipeline) == kept
    with pytest.raises(ConfigError, match="near misses"):
        put(pipeline, "c", strength=Strength(layers={"middle": 1.0}))
    assert loaded_strengths(pipeline) == kept
    assert torch.equal(images(pipeline), out)
    assert all(torch.equal(value, before[key]) for key, value in state(pipeline).items())


def test_steps_without_a_scheduler_are_refused():
    unet = tiny.unet()
    attach(unet, adapter({"denoiser": unet}, "sd"), "a", Strength(steps=(0, 0.5)))
    with pytest.raises(ConfigError, match="no scheduler tells them"):
        tiny.output(unet, "unet")
    vislora.set_strengths(unet, {"a": 1.0})
    assert tiny.output(unet, "unet").isfinite().all()
    assert not unet.__dict__["_vislora_stack"].clocks


def test_the_engine_is_picked_by_rule_and_explained():
    pipeline = put(put(fresh("sd"), "a", 1), "b", 2, 0.0)
    count = len(pipeline.unet.__dict__["_vislora_stack"].paths["a"])
    lines = vislora.explain(pipeline)
    assert f"denoiser: a: {count} layers merged: one strength for all images, steps and places" in lines
    assert f"denoiser: b: {count} layers not computed: strength 0" in lines
    merged = images(pipeline)
    vislora.set_strengths(pipeline, {}, engine="stacked")
    assert f"denoiser: a: {count} layers stacked: asked for" in vislora.explain(pipeline)
    near(images(pipeline), merged)
    vislora.set_strengths(pipeline, {"a": [1.0, 0.0, 0.0], "b": [0.0, 1.0, 0.0]}, engine="auto")
    found = vislora.explain(pipeline)
    assert any(line.endswith("per image: every image has a few of the adapters") for line in found)
    assert any(" stacked: the strength of a, b differs by image, step or place" in line for line in found)  # convs
    vislora.set_strengths(pipeline, {"a": Strength(steps=(0, 0.5), components={"te": 0.0}), "b": 0.0})
    found = vislora.explain(pipeline)
    assert f"denoiser: a: {count} layers stacked: the strength of a differs by image, step or place" in found
    assert any(line.startswith("te:clip_l: a:") and "not computed" in line for line in found)
    with pytest.raises(ConfigError, match=r"unknown engine 'merge' \(did you mean 'merged'\?\)"):
        vislora.set_strengths(pipeline, {}, engine="merge")
    vislora.eject(pipeline)
    assert vislora.explain(pipeline) == []


def test_half_precision_computes_beside_the_base_unless_asked():
    pipeline = put(fresh("sd").to(torch.bfloat16), "a")
    assert any("stacked: bfloat16 would round small changes away" in line for line in vislora.explain(pipeline))
    vislora.set_strengths(pipeline, {}, engine="merged")
    assert all("merged:" in line for line in vislora.explain(pipeline))


def test_a_reserved_pipeline_gives_the_same_images_and_can_be_given_back():
    pipeline, plain = fresh("sd"), fresh("sd")
    before = state(pipeline)
    vislora.reserve(pipeline, 6)
    near(images(pipeline), images(plain))
    for one in (pipeline, plain):
        put(put(one, "a", 1, Strength(0.8, {"te": 0.5}, steps=(0, 0.5))), "b", 2, [0.5, 1.0, None])
    near(images(pipeline, PROMPTS), images(plain, PROMPTS))
    assert any("stacked: reserved for a compiled model" in line for line in explained_without_steps(pipeline))
    vislora.set_strengths(plain, {"a": 0.3, "b": 0.2})
    near(images(pipeline), images(plain))
    with pytest.raises(ConfigError, match=r"rank 8 together .*max_rank=6"):
        put(put(pipeline, "c", 3), "d", 4)
    assert loaded_strengths(pipeline) == {"a": 0.3, "b": 0.2, "c": 1.0}
    vislora.eject(pipeline)
    vislora.unreserve(pipeline)
    assert all(torch.equal(value, before[key]) for key, value in state(pipeline).items())
    assert not any("vislora" in key for model in components_of(pipeline)[1].values() for key in model.__dict__)
    for bad in (0, -1, 2.5, True, None):
        with pytest.raises(ConfigError, match="max_rank is"):
            vislora.reserve(pipeline, bad)


def explained_without_steps(pipeline):
    vislora.set_strengths(pipeline, {"a": 0.3, "b": 0.2})
    return vislora.explain(pipeline)
