"""Declared stacks: `[[stack]]`, tags with parts, what a PNG keeps of them, batches of several stacks, `Stack.apply`."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vislora
from tests import tiny
from tests.jobs.test_generate import adapters, made, pixels, records_of, same  # noqa: F401
from vislora import Strength
from vislora.config.stack import StackedConfig
from vislora.errors import AdapterMismatchError, ConfigError, VisloraError
from vislora.jobs.pipelines import loaded_strengths
from vislora.jobs.prompts import parse_prompt
from vislora.jobs.recipes import read_recipe
from vislora.jobs.strengths import as_json, declared, from_json, tag
from vislora.records import Note

SAMPLES = Path(__file__).parents[2] / "samples"


def one_tag(text):
    (strength,) = parse_prompt(f"a cat <lora:ink{text}>").strengths.values()
    return strength


TAGS = {
    ":0.8:te=0.5:steps=0.2-0.8": Strength(0.8, components={"te": 0.5}, steps=(0.2, 0.8)),
    ":te=0": Strength(components={"te": 0}),
    "::steps=0@1,0.7@0": Strength(steps=((0, 1), (0.7, 0))),
    ":-1:te.clip_g=0.5:denoiser=2": Strength(-1, components={"te:clip_g": 0.5, "denoiser": 2}),
    ":1:mid_block=0:*.attn2.*=0.5": Strength(layers={"mid_block": 0, "*.attn2.*": 0.5}),
    ":1:region=0,0,0.5,1": Strength(region=(0, 0, 0.5, 1)),
}


@pytest.mark.parametrize("text", TAGS)
def test_tags_with_parts(text):
    assert one_tag(text) == TAGS[text]
    assert parse_prompt(f"a cat <lora:ink{text}>").text == "a cat"
    assert parse_prompt(tag("ink", TAGS[text])).strengths == {"ink": TAGS[text]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (":0.8:0.5", "'0.5' is no part of a tag"),
        (":te=x", "te is 'x', which is no number"),
        (":steps=0.8-0.2", "a window is"),
        (":steps=0.8", "write a window such as"),
        (":steps=0@1,x@0", "steps is 'x'"),
        (":region=0,0,1", "region is"),
        (":region=0,0,2,1", "a box is"),
        (":1:=3", "'=3' is no part of a tag"),
        (":te=200", "between -100 and 100"),
    ],
)
def test_tags_that_cannot_be_read(text, message):
    with pytest.raises(ConfigError, match="ink") as error:
        one_tag(text)
    assert message in str(error.value)


def test_a_name_twice_with_parts_is_refused():
    with pytest.raises(ConfigError, match="names 'ink' twice"):
        parse_prompt("<lora:ink:1> <lora:ink:1:te=0>")


def mask_file(path, size=16):
    levels = np.zeros((size, size), np.uint8)
    levels[:, : size // 2] = 255
    levels[0] = 77
    Image.fromarray(levels).save(path)
    return path


def test_recipes_keep_every_part(tmp_path):
    table = {"adapter": "ink", "strength": 0.5, "components": {"te": 0.1}, "layers": {"mid_block": 0}}
    for more in ({"steps": [0.1, 0.3]}, {"steps": [[0, 1], [1, 0.5]]}, {"region": [0, 0, 1, 0.5]}, {}):
        strength = declared(StackedConfig.of({**table, **more}))
        assert from_json(as_json(strength)) == strength
    masked = declared(StackedConfig.of({**table, "region": mask_file(tmp_path / "mask.png")}))
    assert masked.region.mask is not None
    assert from_json(as_json(masked)) == masked
    assert as_json(Strength(0.5)) == 0.5


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"adapter": "a", "strenght": 1}, "did you mean 'strength'"),
        ({"strength": 1}, "adapter: required"),
        ({"adapter": "a", "strength": float("nan")}, "finite"),
        ({"adapter": "a", "steps": [0.5]}, "steps"),
        ({"adapter": "a", "region": [0, 0, 1]}, "region"),
        ({"adapter": "a", "region": "no-such-mask.png"}, "no-such-mask.png cannot be read"),
        ({"adapter": "a", "components": {"te": "much"}}, "te"),
    ],
)
def test_tables_that_cannot_be_used(table, message):
    with pytest.raises(ConfigError) as error:
        vislora.Stack.of([table])
    assert message in str(error.value)


def test_a_pickle_is_no_mask(tmp_path):
    (tmp_path / "mask.png").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(ConfigError, match="cannot be read as an image"):
        vislora.Stack.of([{"adapter": "a", "region": str(tmp_path / "mask.png")}])


@pytest.mark.quick("sd3")
@pytest.mark.parametrize("family", tiny.STAPLES)
def test_an_image_of_a_declared_stack_is_made_again(family, tmp_path, adapters):  # noqa: F811
    mask = mask_file(tmp_path / "mask.png")
    tables = [
        {"adapter": f"{family}-a", "strength": 0.9, "steps": [0.0, 0.6], "components": {"te": 0.5}},
        {"adapter": f"{family}-b", "layers": {"*": 0.7}, "region": str(mask)},
    ]
    settings = {"stack": tables, "adapters": (adapters,), "width": 16, "height": 16}
    prompts = ("a red cat", f"a red cat <lora:{family}-a:0.5:te=0>", f"a red cat <lora:{family}-c:-0.5>")
    pictures = made(tmp_path, family, prompt=prompts, batch_size=3, **settings)
    mask.unlink()
    for picture in pictures:
        (again,) = vislora.generate(like=picture.path, output=tmp_path / "again", device="cpu", adapters=(adapters,))
        assert same([again], [picture])
        assert read_recipe(again.path) == read_recipe(picture.path) == picture.recipe
    shown = Image.open(pictures[2].path).text["parameters"]
    assert f"<lora:{family}-a:0.9:te=0.5:steps=0-0.6>" in shown
    assert f"<lora:{family}-c:-0.5>" in shown


@pytest.mark.quick("sd")
@pytest.mark.parametrize("family", tiny.STAPLES)
def test_images_with_stacks_of_their_own_share_a_batch(family, tmp_path, adapters):  # noqa: F811
    tags = [f"<lora:{family}-a:1>", f"<lora:{family}-b:0.5>", f"<lora:{family}-c:-1>"]
    prompts = tuple(f"a red cat {one}" for one in tags)
    prompts += ("a red cat", f"a cat <lora:{family}-a:1:steps=0.5-1>")
    single = made(tmp_path, family, prompt=prompts, adapters=(adapters,))
    batch = made(tmp_path, family, prompt=prompts, adapters=(adapters,), batch_size=5)
    assert [len(picture.recipe.batch) for picture in batch] == [5] * 5
    for one, other in zip(single, batch, strict=True):
        assert abs(pixels(one) - pixels(other)).max() <= 2
    assert not any(same([one], [other]) for one, other in itertools.combinations(single, 2))


def image(pipe):
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 2, "width": 16, "height": 16, "output_type": "np"}
    return pipe("a red cat", generator=generator, **options).images[0]


def test_python_and_the_command_share_one_stack(tmp_path, adapters):  # noqa: F811
    path = tmp_path / "stack.toml"
    path.write_text(
        f'adapters = ["{adapters.as_posix()}"]\n'
        '[[stack]]\nadapter = "sd-a"\nstrength = 0.8\nsteps = [0, 0.5]\n'
        '[[stack]]\nadapter = "sd-b"\ncomponents = {te = 0}\n'
    )
    stack, pipe = vislora.Stack.read(path), tiny.PIPELINES["sd"]()
    assert stack.strengths == {"sd-a": Strength(0.8, steps=(0, 0.5)), "sd-b": Strength(components={"te": 0})}
    base = image(pipe)
    stack.apply(pipe)
    stacked = image(pipe)
    vislora.Stack.of([{"adapter": "sd-b"}], [adapters]).apply(pipe)
    assert loaded_strengths(pipe) == {"sd-a": 0.0, "sd-b": 1.0}
    stack.apply(pipe)
    assert (image(pipe) == stacked).all()
    assert abs(stacked - base).max() > 1e-3
    vislora.eject(pipe)
    assert (image(pipe) == base).all()


def test_a_stack_that_does_not_fit_changes_nothing(adapters):  # noqa: F811
    pipe = tiny.PIPELINES["sd"]()
    vislora.load(pipe, adapters / "sd-a.safetensors", 0.5)
    before = image(pipe)
    bad = [
        (["sd-b", "sd3-a"], {}, AdapterMismatchError),
        (["sd-b", "sd-c"], {"layers": {"no_such_block": 0}}, ConfigError),
        (["sd-b", "sd-c"], {"components": {"te:clip_g": 0}}, ConfigError),
    ]
    for names, parts, kind in bad:
        stack = vislora.Stack.of([{"adapter": name, **parts} for name in names], [adapters])
        with pytest.raises(kind):
            stack.apply(pipe)
        assert loaded_strengths(pipe) == {"sd-a": 0.5}
        assert (image(pipe) == before).all()


def test_an_adapter_twice_in_a_stack(adapters, tmp_path):  # noqa: F811
    tables = [{"adapter": "sd-a"}, {"adapter": str(adapters / "sd-a.safetensors")}]
    with pytest.raises(ConfigError, match="sd-a is given more than once"):
        vislora.Stack.of(tables, [adapters])
    with pytest.raises(ConfigError, match="sd-a is given more than once"):
        made(tmp_path, stack=tables[:1], adapter=("sd-a:1",), adapters=(adapters,))


def test_a_mask_of_another_shape(adapters, tmp_path):  # noqa: F811
    Image.new("L", (32, 16), 255).save(tmp_path / "wide.png")
    stack = [{"adapter": "sd-a", "region": str(tmp_path / "wide.png")}]
    with pytest.raises(VisloraError, match="mask is 32 x 16"):
        made(tmp_path, stack=stack, adapters=(adapters,), width=16, height=16)


def test_explain_says_how_stacks_are_computed(adapters, tmp_path):  # noqa: F811
    prompts = ("a cat <lora:sd-a:1>", "a cat <lora:sd-a:1:steps=0-0.5>", "a dog <lora:sd-a:1>")
    settings = {"prompt": prompts, "adapters": (adapters,), "base": str(tiny.saved("sd")), "steps": 1, "device": "cpu"}
    records = records_of(output=tmp_path, explain=True, **settings)
    lines = [record.text for record in records if isinstance(record, Note)]
    assert sum("merged: one strength for all" in line and line.startswith("denoiser") for line in lines) == 1
    assert sum("differs by image, step or place" in line and line.startswith("denoiser") for line in lines) == 1


def test_the_sample_stack_is_one(monkeypatch):
    monkeypatch.chdir(SAMPLES.parent)
    stack = vislora.Stack.read("samples/stack.toml")
    assert set(stack.strengths) == {"ink", "outline"}
    assert all(path.exists() for path in stack.paths.values())
