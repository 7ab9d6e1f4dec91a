"""The scripts that make the embedded base: styles that are rules, captions, both layouts, a run that goes on."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw
from torch import nn

SCRIPTS = Path(__file__).resolve().parent.parent / "train_scripts"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """Have the scripts importable, as they are for one another."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    torch.set_num_threads(1)


@pytest.fixture
def drawing():
    image = Image.new("RGBA", (256, 256))
    ImageDraw.Draw(image).ellipse((48, 48, 208, 208), fill=(230, 40, 40, 255))
    return image


def test_a_treatment_is_told_by_its_look(drawing):
    from base.treatments import TREATMENTS

    made = {name: np.asarray(treat(drawing)).astype(int) for name, treat in TREATMENTS.items()}
    assert all(picture.shape == (64, 64, 3) for picture in made.values())
    corners = {name: picture[0, 0].mean() for name, picture in made.items()}
    assert corners["plain"] == corners["pixel"] == 255
    assert corners["neon"] < 40
    assert 200 < corners["pencil"] < 250
    blocks = made["pixel"].reshape(16, 4, 16, 4, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()
    inside = made["neon"][32, 32].mean()
    assert made["neon"].max() > 200 > inside
    assert np.ptp(made["pencil"], axis=2).max() < 25


def pictures():
    from base.pictures import Pictures

    count = 6
    pixels = torch.randint(256, (count, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    subjects = ["owl", "owl", "fox", "fox", "crab", "crab"]
    return Pictures(pixels, subjects, ["flat", "neon"] * 3, torch.tensor([False] * 5 + [True]))


def test_captions_name_the_picture_in_part_or_whole():
    from base.pictures import draw_forms

    shown = pictures()
    torch.manual_seed(0)
    texts = shown.captions(torch.zeros(400, dtype=torch.long), draw_forms(400))
    assert texts.count("an owl, flat style") > 200
    assert texts.count("owl, flat style") > 20
    assert texts.count("") > 10
    assert "flat style" in texts
    made_up = {text for text in texts if text.startswith("an owl, ") and "flat" not in text}
    assert len(made_up) > 5
    assert not any("neon" in text or "fox" in text for text in texts)
    assert len(shown.trained().subjects) == 5


def test_the_second_caption_is_of_the_same_subject_in_any_style_that_it_is_trained_in(tmp_path):
    from base.denoiser import Examples

    shown = pictures().trained()
    chosen = torch.arange(5).repeat(40)
    beside = shown.beside(chosen).tolist()
    assert [shown.subjects[index] for index in beside] == [shown.subjects[index] for index in chosen.tolist()]
    assert {(int(one), other) for one, other in zip(chosen, beside, strict=True)} == {
        *((one, other) for one in (0, 1) for other in (0, 1)),
        *((one, other) for one in (2, 3) for other in (2, 3)),
        (4, 4),
    }
    words = tokenizer(tmp_path, 20)
    examples = Examples(torch.zeros(1, 5, 8, 16, 16), torch.zeros(1, 2), shown, words, 1.0, texts=2)
    _, (ids, others) = examples.draw(200)
    style = {words.convert_tokens_to_ids(f"{name}</w>") for name in ("flat", "neon")}
    differ = ids != others
    assert differ.any(1).sum() > 40
    assert set(ids[differ].tolist()) | set(others[differ].tolist()) == style


def test_subjects_that_look_alike_are_thinned_out():
    from make_base_data import held_out, thinned

    rows = np.full((4, 1, 64, 64, 3), 255, np.uint8)
    for number, place in enumerate((8, 9, 40, 24)):
        rows[number, 0, place : place + 12, 10:50] = 0
    assert thinned(["a", "almost a", "b", "c"], rows, 3, {"a"}) == ["a", "b", "c"]
    assert thinned(["a", "almost a", "b", "c"], rows, 9, {"a"}) == ["a", "almost a", "b", "c"]
    pairs = held_out(["a", "b", "c", "d"], ["x", "y"], 4)
    assert {subject for subject, _ in pairs} == {"a", "b", "c", "d"}
    assert sorted(style for _, style in pairs) == ["x", "x", "y", "y"]


def test_equally_frequent_pairs_are_merged_in_the_order_of_their_letters(tmp_path):
    from base.parts import WORD_END, train_tokenizer

    ends = "abcdefghijklmnopqrstuvw"
    train_tokenizer([f"x{end}" for end in reversed(ends)], tmp_path)
    lines = (tmp_path / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert lines == [f"x {end}{WORD_END}" for end in ends]


def tokenizer(folder, length):
    from base.parts import read_tokenizer, train_tokenizer

    train_tokenizer(pictures().texts(), folder, 600)
    return read_tokenizer(folder, length)


def test_one_empty_token_for_all_is_what_the_pipeline_computes(tmp_path):
    from base.parts import make_vae
    from base.sd3 import StableDiffusion3

    layout = StableDiffusion3()
    words = tokenizer(tmp_path, layout.length)
    torch.manual_seed(0)
    model = layout.model(words).eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    pipe = layout.pipeline(make_vae(), model, words)
    prompts, noisy, t = ["a fox, flat style", "an owl"], torch.randn(2, 4, 16, 16), torch.tensor([300.0, 700.0])
    ids = words(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        embeds, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
        theirs = pipe.transformer(noisy, embeds, pooled, t, return_dict=False)[0]
        ours = model(noisy, t, ids, ids, torch.zeros(2, 2))
    assert embeds.shape[1] == layout.length + 256
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert theirs.abs().max() > 0.1


def test_patches_of_a_moved_picture_are_told_their_places_in_it():
    from base.sd3 import MovedPatches

    patches = MovedPatches(height=16, width=16, patch_size=2, in_channels=4, embed_dim=32, pos_embed_max_size=8)
    torch.nn.init.zeros_(patches.proj.weight)
    torch.nn.init.zeros_(patches.proj.bias)
    latents = torch.randn(2, 4, 16, 16)
    moved = torch.tensor([[1.0, 0.0], [0.0, -2.0]])[..., None, None].expand(-1, -1, 16, 16)
    with torch.no_grad():
        own = patches(latents).view(2, 8, 8, 32)
        told = patches(torch.cat([latents, moved], 1)).view(2, 8, 8, 32)
    assert torch.allclose(told[0, :, :7], own[0, :, 1:], atol=1e-5)
    assert torch.allclose(told[1, 2:], own[1, :6], atol=1e-5)


def test_moved_pictures_are_encoded_as_they_would_be_seen():
    from base.parts import make_vae
    from base.vae import encode, encode_moved

    vae, picture = make_vae().eval(), torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    picture[..., 20:40, 16:44] = torch.randint(256, (1, 3, 20, 28)).to(torch.uint8)
    found = encode_moved(vae, picture, torch.tensor([[0, 0], [4, -2]]), Accelerator(cpu=True))
    wanted = [picture, picture.roll((2, -4), (-2, -1))]  # down by two, to the left by four
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, encode(vae, other), atol=1e-5)
    assert not torch.allclose(found[0], found[1], atol=1e-2)


def test_a_model_is_told_how_the_very_picture_was_moved(tmp_path):
    from base.denoiser import Examples

    shifts = torch.tensor([[2, 0], [0, -4], [4, 4]])
    moments = torch.full((3, 6, 8, 16, 16), -30.0)  # next to no variance
    moments[:, :, :2] = shifts[:, None, :, None, None].float()
    latents, told = Examples(moments, shifts, pictures(), tokenizer(tmp_path, 20), 1.0, texts=2).draw(40)
    assert len(told) == 3
    assert torch.allclose(latents[:, :2].mean(dim=(2, 3)), told[2].float(), atol=1e-3)
    assert len(told[2].unique(dim=0)) == 3


class Killed(Exception):
    """The machine went away."""


@pytest.mark.quick("sd")
@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_a_training_that_was_killed_goes_on_as_if_it_had_not_been(name, tmp_path, monkeypatch):
    import base.denoiser
    import base.progress
    from base.progress import Budget
    from train_base import LAYOUTS

    monkeypatch.setattr(base.progress, "SAVE_EVERY", {"cpu": 0.0})
    layout, shown = LAYOUTS[name], pictures()
    words = tokenizer(tmp_path, layout.length)
    moments = torch.randn(len(layout.shifts), 6, 8, 16, 16)
    examples = base.denoiser.Examples(moments, layout.shifts, shown, words, 1.0, layout.texts)

    def run(folder, until):
        def exported(model):
            if budget.step == until:
                raise Killed

        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        training = base.denoiser.Training(layout, layout.model(words), Accelerator(cpu=True), folder / "state.pt")
        budget = Budget(3, folder / "log.jsonl", "denoiser")
        training.resume(budget)
        base.denoiser.train_denoiser(training, examples, budget, 2, exported)
        return training.average.model.state_dict()

    once = run(tmp_path / "once", None)
    with pytest.raises(Killed):
        run(tmp_path / "twice", 2)
    twice = run(tmp_path / "twice", None)
    assert all(torch.equal(once[key], twice[key]) for key in once)


@pytest.mark.parametrize("part", ["vae", "decoder"])
def test_a_vae_whose_training_was_killed_goes_on_as_if_it_had_not_been(part, tmp_path, monkeypatch):
    import base.progress
    import base.vae
    from base.parts import make_vae

    monkeypatch.setattr(base.progress, "SAVE_EVERY", {"cpu": 0.0})
    save, shown = base.vae.save_state, pictures().pixels
    moments = torch.cat([torch.randn(6, 4, 16, 16), torch.full((6, 4, 16, 16), -9.0)], 1)

    def run(folder, until):
        def killed(state, parts, budget):
            save(state, parts, budget)
            if budget.step == until:
                raise Killed

        monkeypatch.setattr(base.vae, "save_state", killed)
        torch.manual_seed(0)
        vae, budget = make_vae(), base.progress.Budget(4, folder / "log.jsonl", part)
        given = (budget, Accelerator(cpu=True), 2, folder / "state.pt")
        if part == "vae":
            base.vae.train_vae(vae, shown, *given)
        else:
            base.vae.finish_decoder(vae, moments, shown, *given)
        return vae.state_dict()

    for name in ("once", "twice"):
        (tmp_path / name).mkdir()
    once = run(tmp_path / "once", None)
    with pytest.raises(Killed):
        run(tmp_path / "twice", 2)
    twice = run(tmp_path / "twice", None)
    assert all(torch.equal(once[key], twice[key]) for key in once)


def test_what_compiles_to_other_gradients_is_not_used(tmp_path, monkeypatch):
    from base.denoiser import Examples, Training
    from train_base import LAYOUTS

    layout = LAYOUTS["sd"]
    words = tokenizer(tmp_path, layout.length)
    examples = Examples(torch.randn(1, 6, 8, 16, 16), layout.shifts, pictures(), words, 1.0)
    training = Training(layout, layout.model(words), Accelerator(cpu=True), tmp_path / "state.pt")
    before = [parameter.clone() for parameter in training.model.parameters()]
    random = torch.get_rng_state()

    def compiled(how):
        monkeypatch.setattr(torch, "compile", lambda model, **how_to: how)
        return training.compile(examples, 2)

    def no_compiler(noisy, t, ids):
        raise RuntimeError("no C++ compiler")

    def lost(noisy, t, ids):
        raise IndexError("dimension out of range")

    blind = lambda noisy, t, ids: training.model(noisy, t, torch.zeros_like(ids))  # noqa: E731
    broken = lambda noisy, t, ids: training.model(noisy, t, ids) * float("nan")  # noqa: E731
    assert compiled(blind).endswith(" is another one")
    assert compiled(broken).endswith(" is another one")
    assert training.run is training.model
    assert compiled(no_compiler) == "cannot be compiled: no C++ compiler"
    assert compiled(lost) == "cannot be compiled: dimension out of range"
    assert compiled(right := partial(training.model)) == ""
    assert training.run is right
    assert all(torch.equal(old, new) for old, new in zip(before, training.model.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), random)


def test_dropout_is_in_the_training_alone(tmp_path):
    from base.parts import make_vae
    from base.sd import StableDiffusion1
    from diffusers import UNet2DConditionModel

    layout = StableDiffusion1()
    words = tokenizer(tmp_path, layout.length)
    model = layout.model(words).train()
    given = torch.randn(1, 4, 16, 16), torch.tensor([500])
    ids = words(["a fox"], padding="max_length", return_tensors="pt").input_ids
    assert not torch.equal(model(*given, ids), model(*given, ids))
    layout.pipeline(make_vae(), model, words).save_pretrained(tmp_path)
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet").train()
    text = torch.randn(1, 8, 128)
    assert torch.equal(unet(*given, text).sample, unet(*given, text).sample)


def test_dropout_ends_half_way(tmp_path):
    from base.denoiser import train_denoiser
    from base.progress import Budget

    model, seen = nn.Sequential(nn.Dropout(0.1)), []
    training = SimpleNamespace(model=model, average=SimpleNamespace(model=model), save=lambda budget: None)
    training.step = lambda *_: seen.append(model[0].p) or torch.zeros(())
    examples = SimpleNamespace(moments=torch.zeros(1))
    train_denoiser(training, examples, Budget(4, tmp_path / "log.jsonl", "denoiser"), 1, lambda model: None)
    assert seen == [0.1, 0.1, 0.0, 0.0]


def test_the_decoder_s_noise_is_fine_and_wide():
    from base.vae import noise_like

    noise = noise_like(torch.zeros(64, 4, 16, 16))
    assert noise.shape == (64, 4, 16, 16)
    assert 0.8 < noise.std() < 1.0
    wide = noise.mean(dim=(2, 3)).var()
    fine = (noise[..., 1:] - noise[..., :-1]).var() / 2
    assert 0.25 < wide < 0.5
    assert 0.25 < fine < 0.5


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_a_training_starts_from_a_base_as_it_was_written(name, tmp_path):
    from base.layout import start_from
    from base.parts import make_vae, write_base
    from train_base import LAYOUTS

    layout = LAYOUTS[name]
    words = tokenizer(tmp_path, layout.length)
    model, other = layout.model(words), layout.model(words)
    write_base(layout.pipeline(make_vae(), model, words), tmp_path, tmp_path / "base", layout.defaults)
    start_from(tmp_path / "base", layout.parts(other))
    found = other.state_dict()
    assert all(torch.equal(wanted.half(), found[key].half()) for key, wanted in model.state_dict().items())


@pytest.mark.parametrize(
    ("layout", "start", "told"), [("sd", "nowhere", "no folder of a base"), ("sd3", "base", "has no transformer")]
)
def test_what_a_training_cannot_start_from_is_told_before_it_begins(layout, start, told, tmp_path, monkeypatch, capsys):
    import train_base

    base = SCRIPTS.parent / "vislora" / "assets" / start
    words = ["train_base.py", "--out", str(tmp_path / "run"), "--layout", layout, "--start", str(base)]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit):
        train_base.main()
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_was_told_twice_is_drawn_once(tmp_path, monkeypatch):
    import base.progress

    drawn = []
    monkeypatch.setattr(base.progress, "draw_curves", lambda lines, across: drawn.append(lines))
    rows = [("vae", 1, 9.0), ("vae", 2, 8.0), ("vae", 3, 7.0), ("vae", 2, 6.0), ("decoder", 1, 5.0), ("vae", 4, 4.0)]
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"what": what, "step": step, "loss": loss}) + "\n" for what, step, loss in rows))
    base.progress.draw_curve(log, "vae", "loss", tmp_path / "curve.png")
    assert drawn == [{"vae: loss": [(1, 9.0), (2, 6.0), (4, 4.0)]}]


def test_a_run_that_told_nothing_has_no_curve(tmp_path):
    from base.progress import draw_curve

    draw_curve(tmp_path / "log.jsonl", "denoiser", "loss", tmp_path / "curve.png")
    assert not (tmp_path / "curve.png").exists()


@pytest.mark.parametrize(
    ("found", "precision"), [({"avx2": True}, "no"), ({"avx512_bf16": True}, "bf16"), ({"bf16": True}, "bf16")]
)
def test_a_processor_without_bfloat16_trains_without_it(found, precision, monkeypatch):
    from train_base import own_precision

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert own_precision() == precision


def test_the_upsampling_that_compiles_is_the_library_s():
    from base.sd import Upsample
    from diffusers.models.upsampling import Upsample2D

    theirs = Upsample2D(8, use_conv=True)
    x = torch.randn(2, 8, 4, 6)
    assert torch.equal(Upsample(theirs.conv)(x), theirs(x))
