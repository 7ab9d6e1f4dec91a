from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import vislora.jobs.generate as job
from tests import tiny
from tests.jobs.test_pipelines import adapter
from vislora import formats
from vislora.config.generate import GenerateConfig
from vislora.errors import AdapterFileError, AdapterMismatchError, ConfigError, ModelError, VisloraError
from vislora.jobs.generate import generate
from vislora.jobs.recipes import read_recipe
from vislora.jobs.studio import free_numbers, save_numbered
from vislora.models.base import components_of, load_family
from vislora.models.schedulers import DIFFUSION, FLOW, scheduler_for
from vislora.records import Done, Note

torch.set_num_threads(1)
COMMON = {"steps": 2, "device": "cpu", "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Return a folder with three adapters for each tiny family: sd-a, sd-b, sd-c, ..."""
    folder = tmp_path_factory.mktemp("adapters")
    for family in tiny.STAPLES:
        _, components = components_of(tiny.PIPELINES[family]())
        for seed, letter in enumerate("abc"):
            found = adapter(components, family, seed)
            formats.save(found, folder / f"{family}-{letter}.safetensors", "kohya")
    return folder


def made(tmp_path, family="sd", prompt="a red cat", output="out", **settings):
    prompts = {"prompt": (prompt,)} if isinstance(prompt, str) else {"prompt": prompt}
    base = {"base": str(tiny.saved(family))}
    return generate(output=tmp_path / output, **{**prompts, **base, **COMMON, **settings})


def pixels(picture):
    return np.asarray(picture.image).astype(int)


def same(one, other):
    return len(one) == len(other) and all((pixels(a) == pixels(b)).all() for a, b in zip(one, other, strict=True))


@pytest.mark.quick("sd")
@pytest.mark.parametrize("family", tiny.STAPLES)
def test_a_batch_is_its_single_images(family, tmp_path, adapters):
    stack = {"adapter": (f"{adapters}/{family}-a.safetensors:0.5",)}
    single = made(tmp_path, family, count=4, **stack)
    batch = made(tmp_path, family, count=4, batch_size=4, **stack)
    assert [picture.recipe.shot.seed for picture in batch] == [0, 1, 2, 3]
    for one, other in zip(single, batch, strict=True):
        assert abs(pixels(one) - pixels(other)).max() <= 2
    assert not same(single[:1], single[1:2])


@pytest.mark.quick("sd3")
@pytest.mark.parametrize("family", tiny.STAPLES)
def test_strength_zero_is_the_base_and_the_order_is_no_matter(family, tmp_path, adapters):
    names = [f"{adapters}/{family}-{letter}.safetensors" for letter in "abc"]
    base = made(tmp_path, family)
    assert same(base, made(tmp_path, family, adapter=tuple(f"{name}:0" for name in names)))
    flags = [f"{name}:{strength}" for name, strength in zip(names, (0.3, -0.2, 0.7), strict=True)]
    stacked = made(tmp_path, family, adapter=tuple(flags))
    assert not same(base, stacked)
    for order in ((2, 0, 1), (1, 2, 0)):
        again = made(tmp_path, family, adapter=tuple(flags[number] for number in order))
        assert same(stacked, again)
        assert again[0].path.read_bytes() == stacked[0].path.read_bytes()


def test_files_of_one_name_may_come_in_any_order(tmp_path, adapters):
    paths = []
    for letter in "abc":
        (tmp_path / letter).mkdir()
        paths.append(shutil.copy(adapters / f"sd-{letter}.safetensors", tmp_path / letter / "ink.safetensors"))
    one = made(tmp_path, adapter=tuple(f"{path}:0.4" for path in paths))
    other = made(tmp_path, adapter=tuple(f"{path}:0.4" for path in paths[::-1]))
    assert same(one, other)
    assert [row["name"] for row in one[0].recipe.adapters] == ["a/ink", "b/ink", "c/ink"]


@pytest.mark.quick("sd")
@pytest.mark.parametrize("family", tiny.STAPLES)
def test_an_image_is_made_again_bit_for_bit(family, tmp_path, adapters):
    stack = {"adapter": (f"{adapters}/{family}-a.safetensors:0.5", f"{adapters}/{family}-b.safetensors:-0.3")}
    pictures = made(tmp_path, family, count=3, batch_size=3, scheduler="auto", negative_prompt="dog", **stack)
    pictures += made(tmp_path, family, seed=7, **stack)
    for picture in (pictures[1], pictures[3]):
        (again,) = generate(like=picture.path, output=tmp_path / "again", device="cpu")
        assert (pixels(again) == pixels(picture)).all()
        assert again.recipe == picture.recipe


def records_of(**settings):
    return list(job.run(GenerateConfig.of(settings)))


def test_another_number_of_threads_is_told(tmp_path):
    (picture,) = made(tmp_path)
    change_recipe(picture.path, lambda recipe: {**recipe, "threads": 64})
    records = records_of(like=picture.path, output=tmp_path / "again", device="cpu")
    warnings = [record.text for record in records if isinstance(record, Note) and record.level == "warning"]
    assert warnings == ["the last bits may differ: threads was 64, is 1"]
    assert isinstance(records[-1], Done)


def change_recipe(path, change):
    from PIL import PngImagePlugin

    with Image.open(path) as image:
        image.load()
        info = PngImagePlugin.PngInfo()
        info.add_itxt("vislora", json.dumps(change(json.loads(image.text["vislora"]))))
        image.save(path, pnginfo=info)


def test_a_changed_adapter_or_base_is_not_used_to_repeat(tmp_path, adapters):
    mine = shutil.copy(adapters / "sd-a.safetensors", tmp_path / "mine.safetensors")
    base = shutil.copytree(tiny.saved("sd"), tmp_path / "base")
    (picture,) = made(tmp_path, base=str(base), adapter=(f"{mine}:0.5",))
    tensors = load_file(mine)
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, mine)
    with pytest.raises(AdapterFileError, match="has changed since"):
        generate(like=picture.path, output=tmp_path / "again", device="cpu")
    mine.unlink()
    with pytest.raises(ConfigError, match="no adapter"):
        generate(like=picture.path, output=tmp_path / "again", device="cpu")
    weights = next((base / "vae").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ModelError, match="is not the one that"):
        generate(like=picture.path, output=tmp_path / "again", device="cpu")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "change", [lambda r: {}, lambda r: {**r, "new": 1}, lambda r: {**r, "index": 9}, lambda r: [1]]
)
def test_recipes_that_cannot_be_followed(change, tmp_path):
    (picture,) = made(tmp_path)
    change_recipe(picture.path, change)
    with pytest.raises(ConfigError, match=r"recipe in .* is damaged or of another version"):
        read_recipe(picture.path)


def test_pictures_without_a_recipe(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    (tmp_path / "no.png").write_bytes(b"no")
    for name, message in (("plain.png", "no recipe"), ("no.png", "cannot be read"), ("gone.png", "cannot be read")):
        with pytest.raises(ConfigError, match=message):
            generate(like=tmp_path / name, output=tmp_path / "again")


def test_every_png_says_how_it_was_made(tmp_path, adapters):
    (picture,) = made(tmp_path, prompt="ein Bär <lora:sd-a:0.25>", adapters=(adapters,), negative_prompt="dog", seed=5)
    with Image.open(picture.path) as image:
        recipe, parameters = json.loads(image.text["vislora"]), image.text["parameters"]
    assert recipe["batch"] == [{"prompt": "ein Bär", "negative_prompt": "dog", "seed": 5}]
    assert recipe["adapters"][0]["strength"] == 0.25
    assert recipe["engine"] == "merged"
    assert parameters.splitlines()[:2] == ["ein Bär <lora:sd-a:0.25>", "Negative prompt: dog"]
    for part in ("Steps: 2", "CFG scale: 2", "Seed: 5", "Size: 16x16"):
        assert part in parameters
    assert read_recipe(picture.path) == picture.recipe


def test_adapters_by_flag_and_by_tag(tmp_path, adapters):
    flag = made(tmp_path, adapter=(f"{adapters}/sd-a.safetensors:0.5",))
    tag = made(tmp_path, prompt="a red cat <lora:sd-a:0.5>", adapters=(adapters,))
    both = made(
        tmp_path,
        prompt="a red cat <lora:sd-a:0.5>",
        adapter=(f"{adapters}/sd-a.safetensors:0.9",),
        adapters=(adapters,),
    )
    assert same(flag, tag)
    assert same(flag, both)
    mixed = made(tmp_path, prompt=("a red cat <lora:sd-a:0.5>", "a red cat"), adapters=(adapters,), batch_size=2)
    assert same(mixed[:1], flag)
    assert abs(pixels(mixed[1]) - pixels(made(tmp_path, seed=0)[0])).max() == 0


def test_an_adapter_given_twice_is_refused(tmp_path, adapters):
    twice = (f"{adapters}/sd-a.safetensors:0.5", "sd-a:0.7")
    with pytest.raises(ConfigError, match="sd-a is given more than once"):
        made(tmp_path, adapter=twice, adapters=(adapters,))


def test_an_unknown_adapter_names_the_nearest(tmp_path, adapters):
    with pytest.raises(ConfigError, match="did you mean 'sd-a'"):
        made(tmp_path, prompt="a cat <lora:sd_a:1>", adapters=(adapters,))
    assert not (tmp_path / "out").exists()


def test_half_precision_files_and_a_half_precision_base(tmp_path, adapters):
    half = tmp_path / "half.safetensors"
    found = formats.load(adapters / "sd-a.safetensors")
    for module in found.modules:
        module.tensors = {name: tensor.half() for name, tensor in module.tensors.items()}
    formats.save(found, half, "kohya")
    whole = made(tmp_path, adapter=(f"{adapters}/sd-a.safetensors",))
    assert abs(pixels(whole[0]) - pixels(made(tmp_path, adapter=(str(half),))[0])).max() <= 3
    (picture,) = made(tmp_path, adapter=(str(half),), precision="bf16")
    assert picture.recipe.engine == "stacked"


def test_an_adapter_for_another_family_is_refused(tmp_path, adapters):
    with pytest.raises(AdapterMismatchError, match="looks like an adapter for 'sd3', this is 'sd'"):
        made(tmp_path, adapter=(f"{adapters}/sd3-a.safetensors",))


def test_no_image_is_ever_overwritten(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("00003-9.png", "99999-1.png", "123456-1.png", "99x-1.png", "00009.png", "1234567x-2.png"):
        (out / name).write_bytes(b"mine")
    pictures = made(tmp_path, count=2)
    assert [picture.path.name for picture in pictures] == ["123457-0.png", "123458-1.png"]
    assert [picture.path.name for picture in made(tmp_path)] == ["123459-0.png"]
    assert sum(path.read_bytes() == b"mine" for path in out.iterdir()) == 6
    assert next(free_numbers(tmp_path / "nowhere")) == 0


def write_many(folder, recipe, count):
    numbers = free_numbers(folder)
    for _ in range(count):
        save_numbered(Image.new("RGB", (2, 2)), folder, numbers, recipe)


def test_processes_that_write_into_one_folder_share_the_numbers(tmp_path):
    (picture,) = made(tmp_path)
    out, children = tmp_path / "out", []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            try:
                write_many(out, picture.recipe, 25)
                os._exit(0)
            finally:
                os._exit(1)  # or the child would go on with the tests
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert sorted(path.name for path in out.iterdir()) == [f"{number:05d}-0.png" for number in range(101)]


def test_a_number_that_another_process_is_about_to_write_is_left_to_it(tmp_path):
    numbers = free_numbers(tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".00000.taken").touch()
    (tmp_path / "out" / "00001-7.png").touch()
    (picture,) = made(tmp_path, output="other")
    saved = save_numbered(picture.image, tmp_path / "out", numbers, picture.recipe)
    assert saved.path.name == "00002-0.png"
    assert {path.name for path in saved.path.parent.iterdir()} == {".00000.taken", "00001-7.png", "00002-0.png"}


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(VisloraError, match=r"cannot write .*out: File exists"):
        made(tmp_path)


def test_sheets(tmp_path, adapters):
    stack = tuple(f"{adapters}/sd-{letter}.safetensors:0.5" for letter in "ab")
    for _ in range(2):
        made(tmp_path, count=2, adapter=stack, sheet=True, batch_size=2)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [
        "00000-0.png",
        "00001-1.png",
        "00002-0.png",
        "00003-1.png",
        "base",
        "sd-a",
        "sd-b",
        "sheet-2.png",
        "sheet.png",
    ]
    assert (tmp_path / "out" / "sheet.png").read_bytes() == (tmp_path / "out" / "sheet-2.png").read_bytes()
    base = made(tmp_path, output="plain", count=2, batch_size=2)
    with Image.open(tmp_path / "out" / "base" / "00000-0.png") as image:
        assert (np.asarray(image) == np.asarray(base[0].image)).all()


def test_a_sheet_of_an_adapter_called_base(tmp_path, adapters):
    shutil.copy(adapters / "sd-a.safetensors", tmp_path / "base.safetensors")
    shutil.copy(adapters / "sd-b.safetensors", tmp_path / "stack.safetensors")
    made(tmp_path, adapter=(str(tmp_path / "base.safetensors"), str(tmp_path / "stack.safetensors")), sheet=True)
    with Image.open(tmp_path / "out" / "sheet.png") as image:
        assert image.width > 4 * 160


ALL = [("sd", name) for name in DIFFUSION] + [("sd3", name) for name in FLOW]


@pytest.mark.parametrize(("family", "name"), ALL)
def test_every_scheduler_runs(family, name, tmp_path):
    (picture,) = made(tmp_path, family, scheduler=name, steps=3)
    assert pixels(picture).std() > 1


@pytest.mark.quick("ddpm", "lcm")
@pytest.mark.parametrize("name", ["dpm++-sde", "ddpm", "euler-a", "lcm", "tcd"])
def test_noise_between_steps_is_of_each_image_s_own_seed(name, tmp_path):
    single = made(tmp_path, count=3, scheduler=name, steps=4)
    batch = made(tmp_path, count=3, scheduler=name, steps=4, batch_size=3)
    assert all(abs(pixels(one) - pixels(other)).max() <= 1 for one, other in zip(single, batch, strict=True))
    assert same(batch[:1], generate(like=batch[0].path, output=tmp_path / "again"))


def test_ddim_and_tcd_are_told_how_much_noise_lies_between_steps(tmp_path):
    def drawn(scheduler, **eta):
        (picture,) = made(tmp_path, scheduler=scheduler, steps=4, **eta)
        return pixels(picture), picture.recipe.sampling.eta

    for scheduler, own in (("ddim", 0.0), ("tcd", 0.3)):
        (default, said), (alike, _), (other, told) = (
            drawn(scheduler, **eta) for eta in ({}, {"eta": own}, {"eta": 1.0})
        )
        assert (said, told) == (own, 1.0)
        assert (default == alike).all()
        assert (default != other).any()
    with pytest.raises(ConfigError, match=r"eta: the sampler 'euler' takes none; of diffusion models, ddim and tcd do"):
        made(tmp_path, scheduler="euler", eta=0.5)


@pytest.mark.parametrize("name", ["euler-trailing", "ddim-trailing"])
def test_trailing_samplers_begin_at_the_strongest_noise(name):
    scheduler = scheduler_for(tiny.PIPELINES["sd"](), name)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]


@pytest.mark.parametrize("name", ["dpm++", "ddim"])
def test_every_scheduler_runs_with_v_prediction(name, tmp_path, v_base):
    (picture,) = made(tmp_path, scheduler=name, steps=3, base=str(v_base))
    assert pixels(picture).std() > 1


@pytest.fixture(scope="module")
def v_base(tmp_path_factory):
    folder = shutil.copytree(tiny.saved("sd"), tmp_path_factory.mktemp("v") / "base")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "v_prediction"}))
    return folder


@pytest.mark.parametrize(
    ("family", "name", "message"),
    [("sd", "eulr", "did you mean 'euler'"), ("sd", "flow-euler", "another kind"), ("sd3", "ddim", "another kind")],
)
def test_schedulers_that_cannot_be_used(family, name, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        made(tmp_path, family, scheduler=name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("settings", [{"width": 20}, {"height": 30}, {"width": 0}, {"count": 0}, {"steps": 0}])
def test_sizes_and_numbers_out_of_range(settings, tmp_path):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        made(tmp_path, **settings)


def test_a_size_that_this_base_cannot_make(tmp_path, monkeypatch):
    family = load_family(tiny.saved("sd3"), torch.float32, torch.device("cpu"))
    family.pipeline.vae_scale_factor = 8
    with pytest.raises(ConfigError, match="width: 24 is no multiple of 16"):
        job.sampling(family, GenerateConfig.of({"width": 24, "height": 32}))


def test_other_sizes(tmp_path):
    (picture,) = made(tmp_path, width=24, height=32)
    assert picture.image.size == (24, 32)


def test_guidance(tmp_path):
    plain = made(tmp_path, guidance_scale=1.0)
    assert same(plain, made(tmp_path, guidance_scale=1.0, negative_prompt="dog"))
    guided = made(tmp_path, guidance_scale=5.0)
    assert not same(plain, guided)
    assert not same(guided, made(tmp_path, guidance_scale=5.0, negative_prompt="dog house tree"))


def test_a_huge_count_begins_at_once(tmp_path):
    settings = {"prompt": ("a cat",), "count": 10_000, "output": tmp_path / "out", "base": str(tiny.saved("sd"))}
    records = job.run(GenerateConfig.of({**settings, **COMMON}))
    first = next(records)
    assert (first.done, first.total) == (1, 10_000)
    records.close()
    assert len(list((tmp_path / "out").iterdir())) <= 2


def test_prompts_of_a_file(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffa cat\n# no\n\na dog\n".encode())
    pictures = made(tmp_path, prompt=("a tree",), prompts=tmp_path / "p.txt", count=2)
    assert [picture.recipe.shot.prompt for picture in pictures] == ["a tree"] * 2 + ["a cat"] * 2 + ["a dog"] * 2
    assert [picture.recipe.shot.seed for picture in pictures] == [0, 1] * 3


def test_a_prompt_that_is_too_long_is_told_once(tmp_path, capfd):
    settings = {"prompt": ("cat " * 20 + "dog",), "output": tmp_path / "out", "base": str(tiny.saved("sd")), "count": 2}
    notes = [item.text for item in job.run(GenerateConfig.of({**settings, **COMMON})) if isinstance(item, Note)]
    assert notes == ["a prompt is too long for this base; not read: 'cat cat cat cat cat cat dog'"]
    assert capfd.readouterr().err == ""


def test_no_prompt(tmp_path):
    with pytest.raises(ConfigError, match="no prompt"):
        made(tmp_path, prompt=())


def test_a_pickle_makes_the_same_image_when_it_is_allowed(tmp_path, adapters):
    torch.save(load_file(adapters / "sd-a.safetensors"), tmp_path / "a.pt")
    with pytest.raises(AdapterFileError, match="--allow-pickle"):
        made(tmp_path, adapter=(f"{tmp_path}/a.pt:0.5",))
    pickled = made(tmp_path, adapter=(f"{tmp_path}/a.pt:0.5",), allow_pickle=True)
    assert same(pickled, made(tmp_path, adapter=(f"{adapters}/sd-a.safetensors:0.5",)))
    assert same(pickled, generate(like=pickled[0].path, output=tmp_path / "again", allow_pickle=True))


def test_what_an_adapter_file_holds_beside_its_modules_is_told(tmp_path, adapters):
    more = {"bundle_emb.cat.clip_l": torch.ones(1, 16), "_aux.x": torch.ones(1)}
    save_file({**load_file(adapters / "sd-a.safetensors"), **more}, tmp_path / "a.safetensors")
    settings = {"base": str(tiny.saved("sd")), "prompt": ("a cat",), "output": tmp_path / "out", **COMMON}
    records = job.run(GenerateConfig.of({**settings, "adapter": (f"{tmp_path}/a.safetensors",)}))
    notes = [record.text for record in records if isinstance(record, Note)]
    assert any("1 textual inversion embeddings" in note for note in notes)
    assert any("are not used (first: _aux.x)" in note for note in notes)
