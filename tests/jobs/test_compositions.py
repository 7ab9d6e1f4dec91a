"""Compositions: whose turn it is, means of predictions, K-LoRA's choice; nothing stays behind; files and recipes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import HeunDiscreteScheduler

import vislora
from tests import tiny
from tests.jobs.test_generate import adapters, made, same  # noqa: F401
from tests.jobs.test_pipelines import adapter, fresh, state
from tests.jobs.test_strengths import images, near, put
from vislora import Strength, formats
from vislora.errors import ConfigError
from vislora.inject.stack import existing_stack
from vislora.jobs.importance import without
from vislora.models.base import components_of


@pytest.fixture(params=["sd", "sd3"])
def pipeline(request):
    return put(put(fresh(request.param), "a", 0), "b", 1)


def denoiser(pipeline):
    return components_of(pipeline)[1]["denoiser"]


def windows(pipeline, turns, steps):
    """Make the image of a switch by strengths over the steps: no composition is involved."""
    last = steps - 1
    own = {
        name: Strength(steps=lambda progress, name=name: float(turns[round(progress * last)] == name)) for name in "ab"
    }
    vislora.set_strengths(pipeline, own)
    return images(pipeline, steps=steps)


@pytest.mark.parametrize(
    ("settings", "turns"),
    [
        ({}, "ababa"),
        ({"every": 2}, "aabba"),
        ({"shares": {"b": 2}}, "babba"),
        ({"shares": {"a": 0.75, "b": 0.25}}, "aabaa"),
    ],
)
def test_a_switch_lets_one_act_at_a_time(pipeline, settings, turns):
    wanted = windows(pipeline, turns, 5)
    vislora.set_strengths(pipeline, {"a": 1.0, "b": 1.0})
    vislora.set_composition(pipeline, "switch", **settings)
    # text encoders run before the steps: all of their changes act, in both
    near(images(pipeline, steps=5), wanted)


def test_a_switch_counts_the_steps_of_a_second_order_sampler_once():
    pipeline = put(put(fresh("sd"), "a", 0), "b", 1)
    pipeline.scheduler = HeunDiscreteScheduler.from_config(pipeline.scheduler.config)
    wanted = windows(pipeline, "aba", 3)
    vislora.set_strengths(pipeline, {"a": 1.0, "b": 1.0})
    vislora.set_composition(pipeline, "switch")
    near(images(pipeline, steps=3), wanted)


def predictions(pipeline, call):
    """Return what the denoiser predicts in `call`, a list with one tensor per step."""
    found = []
    hook = denoiser(pipeline).register_forward_hook(lambda module, args, out: found.append(out[0].clone()))
    call()
    hook.remove()
    return found


def test_a_composite_is_the_mean_of_what_each_predicts(pipeline):
    def first(strengths):
        """Text encoders keep both adapters: the composition is of the denoiser."""
        parts = {name: Strength(1.0, components={"denoiser": strengths[name]}) for name in "ab"}
        vislora.set_strengths(pipeline, parts)
        return predictions(pipeline, lambda: images(pipeline, steps=1))[0]

    one, other = first({"a": 1.0, "b": 0.0}), first({"a": 0.0, "b": 1.0})
    vislora.set_strengths(pipeline, {"a": 1.0, "b": 1.0})
    vislora.set_composition(pipeline, "composite")
    near(predictions(pipeline, lambda: images(pipeline, steps=1))[0], (one + other) / 2)
    vislora.set_composition(pipeline, "composite", shares={"b": 3.0})
    near(predictions(pipeline, lambda: images(pipeline, steps=1))[0], 0.25 * one + 0.75 * other)


def deltas(pipeline, name):
    stack = existing_stack(denoiser(pipeline))
    return {path: adapter.delta(stack.at(path).weight).numpy() for path, adapter in stack.adapters(name).items()}


def test_klora_chooses_by_the_largest_magnitudes():
    pipeline = put(put(fresh("sd"), "a", 0), "b", 1)
    content, style = deltas(pipeline, "a"), deltas(pipeline, "b")
    gamma = np.mean([abs(content[path]).sum() / abs(style[path]).sum() for path in content])

    def chosen(progress):
        found = set()
        for path in content:
            count = min(2 * 2, content[path].size)  # both of rank 2, as `adapter` makes them
            one, other = (np.sort(abs(change[path]).ravel())[::-1][:count].sum() for change in (content, style))
            if one / gamma < other * (1.5 * progress + 0.5):
                found.add(path)
        return found

    stack = existing_stack(denoiser(pipeline))
    vislora.set_composition(pipeline, "klora", content="a", style="b")
    moment = stack.moment
    for step in range(4):
        (run,) = moment.composition.runs(["a", "b"], step, 3, stack.adapters)
        assert run.acting["b"] == chosen(step / 3)
        assert run.acting["a"] == content.keys() - chosen(step / 3)
    assert chosen(0.0) < chosen(1.0)
    assert torch.isfinite(images(pipeline, steps=3)).all()


def test_the_sum_is_untouched_and_nothing_stays_behind(pipeline):
    before, bytes_before = images(pipeline), state(pipeline)
    hooks = [len(denoiser(pipeline)._forward_hooks), len(denoiser(pipeline)._forward_pre_hooks)]
    for method, settings in (("switch", {}), ("composite", {}), ("klora", {"content": "a", "style": "b"})):
        vislora.set_composition(pipeline, method, **settings)
        assert not torch.equal(images(pipeline), before)
        vislora.set_composition(pipeline, "sum")
        assert torch.equal(images(pipeline), before)
        assert [len(denoiser(pipeline)._forward_hooks), len(denoiser(pipeline)._forward_pre_hooks)] == hooks
    vislora.set_composition(pipeline, "composite")
    vislora.eject(pipeline)
    assert state(pipeline).keys() == bytes_before.keys()
    assert not denoiser(pipeline)._forward_hooks
    assert not denoiser(pipeline)._forward_pre_hooks


def test_one_adapter_is_itself_under_any_composition(pipeline):
    vislora.eject(pipeline, "b")
    alone = images(pipeline)
    for method in ("switch", "composite"):
        vislora.set_composition(pipeline, method)
        near(images(pipeline), alone)


@pytest.mark.parametrize(
    ("method", "settings"), [("switch", {}), ("composite", {}), ("klora", {"content": "a", "style": "b"})]
)
def test_a_composition_of_nothing_is_the_base(method, settings, pipeline):
    vislora.set_composition(pipeline, method, **settings)
    vislora.set_strengths(pipeline, {"a": 0.0, "b": 0.0})
    nothing = images(pipeline)
    vislora.eject(pipeline)
    assert torch.equal(images(pipeline), nothing)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("swich", {}, "did you mean 'switch'"),
        ("switch", {"evry": 2}, "did you mean 'every'"),
        ("switch", {"every": 0}, "at least 1"),
        ("switch", {"shares": {"a": 0}}, "above 0"),
        ("switch", {"shares": {"c": 2}}, "no adapter named 'c'"),
        ("composite", {"shares": {"a": -1.0}}, "above 0"),
        ("klora", {"content": "a", "style": "x"}, "no adapter named 'x'"),
    ],
)
def test_compositions_that_cannot_be_set(method, settings, message, pipeline):
    vislora.set_composition(pipeline, "switch")
    with pytest.raises(ConfigError, match=message):
        vislora.set_composition(pipeline, method, **settings)
    assert type(existing_stack(denoiser(pipeline)).moment.composition).__name__ == "Switch"


def test_what_a_composition_cannot_do_is_told():
    pipeline = fresh("sd")
    with pytest.raises(ConfigError, match="load some"):
        vislora.set_composition(pipeline, "switch")
    put(put(put(pipeline, "a", 0), "b", 1), "c", 2)
    vislora.set_composition(pipeline, "klora", content="a", style="b")
    with pytest.raises(ConfigError, match="active are: a, b, c"):
        images(pipeline)
    vislora.set_strengths(pipeline, {"c": 0.0})
    images(pipeline)
    vislora.set_composition(pipeline, "switch")
    vislora.set_strengths(pipeline, {"a": [1.0, 0.5]})
    with pytest.raises(ConfigError, match="stacks of their own"):
        images(pipeline, prompts=["a cat", "a dog"])
    vislora.set_composition(pipeline, "sum")
    vislora.set_strengths(pipeline, {"a": 1.0})
    vislora.reserve(pipeline, max_rank=32)
    with pytest.raises(ConfigError, match="reserved"):
        vislora.set_composition(pipeline, "switch")


def test_settings_of_klora_are_required(pipeline):
    with pytest.raises(ConfigError, match="needs: content, style"):
        vislora.set_composition(pipeline, "klora")


@pytest.mark.quick("switch")
@pytest.mark.parametrize("method", ["switch", "composite", "klora"])
def test_an_image_of_a_composition_is_made_again(method, tmp_path, adapters):  # noqa: F811
    compose = {"method": method, **({"content": "sd-a", "style": "sd-b"} if method == "klora" else {})}
    settings = {"adapter": ("sd-a:0.8", "sd-b:0.5"), "adapters": (adapters,), "steps": 4}
    prompts = ("a cat", "a dog", "a dog <lora:sd-a:0.1>")
    pictures = made(tmp_path, prompt=prompts, compose=compose, batch_size=3, **settings)
    assert [len(picture.recipe.batch) for picture in pictures] == [2, 2, 1]
    assert pictures[0].recipe.compose == compose
    (again,) = vislora.generate(like=pictures[1].path, output=tmp_path / "again", device="cpu")
    assert same([again], pictures[1:2])
    assert again.recipe == pictures[1].recipe
    assert not same(made(tmp_path, prompt=prompts[:1], **settings), pictures[:1])


def test_shares_are_what_the_words_mean_in_the_prompt(pipeline):
    prompt = "a cat, ink drawing, the blue outline"
    shares = vislora.prompt_shares(pipeline, prompt, {"a": "ink drawing", "b": "Outline"})

    def mean(encoder, tokenizer, text):
        return (
            encoder(tokenizer(text, return_tensors="pt").input_ids, output_hidden_states=True).hidden_states[-1].mean(1)
        )

    moved = {"a": 0.0, "b": 0.0}
    for number in ("", "_2", "_3"):
        encoder, tokenizer = (getattr(pipeline, name + number, None) for name in ("text_encoder", "tokenizer"))
        if encoder is not None:
            whole = mean(encoder, tokenizer, prompt)
            for name, text in (("a", "a cat, the blue outline"), ("b", "a cat, ink drawing, the blue")):
                moved[name] += ((mean(encoder, tokenizer, text) - whole).norm() / whole.norm()).item()
    assert shares == pytest.approx({name: by / sum(moved.values()) for name, by in moved.items()}, rel=1e-5)
    assert shares["a"] != pytest.approx(0.5, abs=1e-3)
    vislora.set_composition(pipeline, "switch", shares=shares)


@pytest.mark.parametrize("family", sorted(tiny.PIPELINES))
def test_every_family_tells_what_words_mean(family):
    shares = vislora.prompt_shares(tiny.PIPELINES[family](), "ink, a red cat", {"a": "ink", "b": "red cat"})
    assert sum(shares.values()) == pytest.approx(1.0)
    assert all(0.02 < share < 0.98 for share in shares.values())


@pytest.mark.parametrize(
    ("prompt", "words", "rest"),
    [
        ("a fox, ink style", "ink style", "a fox"),
        ("ink style, a fox", "Ink Style", "a fox"),
        ("a fox in ink style, at night", "ink style", "a fox in, at night"),
        ("blob, sks man, happy", "blob, sks man", "happy"),
        ("an inky fox", "ink", "an inky fox"),
    ],
)
def test_words_are_left_out(prompt, words, rest):
    assert without(prompt, words) == rest


@pytest.mark.parametrize(
    ("prompt", "words", "message"),
    [
        ("a fox", {"a": "ink style", "b": "fox"}, r"'a fox' does not have 'ink style' \(a\)"),
        ("a fox, ", {"a": "ink style", "b": "fox"}, r"'a fox, ' does not have 'ink style' \(a\)"),
        ("a fox " + "far away " * 80 + "ink", {"a": "fox", "b": "ink"}, r"'ink' \(b\) changes nothing"),
    ],
)
def test_words_that_cannot_be_weighed_are_told(prompt, words, message):
    with pytest.raises(ConfigError, match=message):
        vislora.prompt_shares(fresh("sd"), prompt, words)
    with pytest.raises(ConfigError, match="no text encoder"):
        vislora.prompt_shares(fresh("sd").unet, prompt, words)


@pytest.mark.quick("switch")
@pytest.mark.parametrize("method", ["switch", "composite"])
def test_images_weigh_their_adapters_by_their_own_prompts(method, tmp_path, adapters):  # noqa: F811
    settings = {"adapter": ("sd-a:0.8", "sd-b:0.5"), "adapters": (adapters,), "steps": 5}
    words = {"sd-a": "ink", "sd-b": "blob"}
    compose = {"method": method, "by_prompt": True, "words": words}
    prompts = ("a cat, ink, blob", "blob, a red dog, ink")
    pictures = made(tmp_path, prompt=prompts, compose=compose, batch_size=2, **settings)
    assert [len(picture.recipe.batch) for picture in pictures] == [1, 1]
    shares = [picture.recipe.compose["shares"] for picture in pictures]
    assert shares[0].keys() == shares[1].keys() == words.keys()
    assert shares[0] != shares[1]
    (again,) = vislora.generate(like=pictures[1].path, output=tmp_path / "again", device="cpu")
    assert same([again], pictures[1:2])
    given = {"method": method, "shares": shares[0]}
    assert same(made(tmp_path, prompt=prompts[:1], compose=given, **settings), pictures[:1])
    with pytest.raises(ConfigError, match="'sd-b' names no trigger phrase"):
        made(tmp_path, prompt=prompts[:1], compose={**compose, "words": {"sd-a": "cat"}}, **settings)
    only = {**compose, "words": {"sd-a": "ink"}}
    (alone,) = made(tmp_path, prompt=prompts[:1], compose=only, **{**settings, "adapter": ("sd-a:0.8",)})
    assert "shares" not in alone.recipe.compose


def test_words_are_the_trigger_phrase_of_the_file_unless_given(tmp_path):
    _, components = components_of(tiny.PIPELINES["sd"]())
    for seed, word in enumerate(("ink", "blob")):
        found = replace(adapter(components, "sd", seed), metadata={"modelspec.trigger_phrase": word})
        formats.save(found, tmp_path / f"{word}.safetensors", "kohya")
    settings = {"prompt": ("a cat, ink, red blob",), "adapter": ("ink", "blob"), "adapters": (tmp_path,)}
    own, given = (
        made(tmp_path, compose={"method": "switch", "by_prompt": True, "words": words}, **settings)[0].recipe.compose
        for words in ({}, {"blob": "red blob"})
    )
    assert own["shares"].keys() == {"ink", "blob"}
    assert given["shares"]["blob"] > own["shares"]["blob"]
    with pytest.raises(ConfigError, match=r"no adapter named 'blop' \(did you mean 'blob'"):
        made(tmp_path, compose={"method": "switch", "by_prompt": True, "words": {"blop": "blob"}}, **settings)


def test_a_stack_without_a_prompt_is_not_weighed_by_one(adapters):  # noqa: F811
    tables = [{"adapter": str(adapters / "sd-a.safetensors")}]
    with pytest.raises(ConfigError, match=r"vislora\.prompt_shares"):
        vislora.Stack.of(tables, compose={"method": "switch", "by_prompt": True})


def test_a_sheet_compares_weights_by_the_prompt(tmp_path, adapters):  # noqa: F811
    settings = {"adapter": ("sd-a:0.8", "sd-b:0.5"), "adapters": (adapters,), "sheet": True, "compositions": True}
    compose = {"method": "switch", "by_prompt": True, "words": {"sd-a": "cat", "sd-b": "blob"}}
    made(tmp_path, prompt=("a cat, blob",), compose=compose, **settings)
    folders = {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()}
    assert folders == {"base", "sd-a", "sd-b", "sum", "switch", "composite", "composite-by-prompt"}


def test_a_sheet_shows_every_composition(tmp_path, adapters):  # noqa: F811
    settings = {"adapter": ("sd-a:0.8", "sd-b:0.5"), "adapters": (adapters,), "sheet": True, "compositions": True}
    made(tmp_path, compose={"content": "sd-a", "style": "sd-b"}, **settings)
    folders = {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()}
    assert folders == {"base", "sd-a", "sd-b", "switch", "composite", "klora"}
    assert (tmp_path / "out" / "sheet.png").is_file()


def test_a_declared_stack_has_a_composition(tmp_path, adapters):  # noqa: F811
    path = tmp_path / "stack.toml"
    tables = "".join(f'[[stack]]\nadapter = "{adapters.as_posix()}/sd-{letter}.safetensors"\n' for letter in "ab")
    path.write_text(tables + '[compose]\nmethod = "switch"\nevery = 2\n')
    stack, pipeline = vislora.Stack.read(path), tiny.PIPELINES["sd"]()
    stack.apply(pipeline)
    assert existing_stack(pipeline.unet).moment.composition.every == 2
    vislora.Stack.of([{"adapter": str(adapters / "sd-a.safetensors")}]).apply(pipeline)
    assert existing_stack(pipeline.unet).moment.composition is None
