"""Prior preservation: captions without the trigger, the loss by its formula, runs that keep what the base predicts."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import vislora
from tests import tiny
from tests.jobs.train_helpers import config, image_folder, notes, trained
from vislora.config.train import PriorConfig
from vislora.data.captions import without_trigger
from vislora.errors import ConfigError, VisloraError
from vislora.inject.injection import eject
from vislora.inject.targets import Target, select
from vislora.inject.trained import FreshOptions, inject_fresh
from vislora.jobs.priors import prior_captions
from vislora.models.base import load_family
from vislora.models.sampling import make_images
from vislora.training.loss import Asked, DenoisingLoss, LossOptions, joined

torch.set_num_threads(1)
CPU = torch.device("cpu")


def test_captions_without_the_trigger():
    replace = {", ink style": ("", ", flat style"), "sks ": ("",)}
    assert without_trigger("a cat, ink style", replace) == ["a cat", "a cat, flat style"]
    assert without_trigger("a sks dog", replace) == ["a dog"]
    assert without_trigger("a house", replace) == [""]


@pytest.fixture
def trainee():
    family = load_family(tiny.saved("sd"), torch.float32, CPU)
    denoiser = family.components["denoiser"]
    adapters = inject_fresh(denoiser, "t", select(denoiser, [], "all", Target("", 4)), FreshOptions(seed=1))
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    return family, adapters


def test_the_loss_is_that_of_the_formula(trainee):
    family, adapters = trainee
    with torch.no_grad():
        text, prior = family.encode_prompt(["a red cat", "ink"]), family.encode_prompt(["a cat", ""])
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    batch = {"latents": latents, "text": text, "captions": ["", ""]}
    options = LossOptions(prior_weight=0.7, prior_share=0.5)
    module = DenoisingLoss(family, {"denoiser": adapters}, options)
    plain = module(batch, torch.Generator().manual_seed(5))
    both = module({**batch, "prior_text": prior, "prior_captions": ["a cat", ""]}, torch.Generator().manual_seed(5))
    draw = torch.Generator().manual_seed(5)
    noise = torch.randn(latents.shape, generator=draw)
    t = family.objective.sample_t(latents.shape, draw)[:1]
    noisy = family.objective.add_noise(latents[:1], noise[:1], t)
    one = {name: value[:1] for name, value in prior.items()}
    mine = family.predict(noisy, t, one)
    eject(family.components["denoiser"], "t")
    base = family.predict(noisy, t, one)
    assert (both - plain).item() == pytest.approx(0.7 * (mine - base).square().mean().item(), rel=1e-4)
    assert both > plain


def test_a_resting_adapter_is_the_base_and_wakes_up(trainee):
    family, adapters = trainee
    with torch.no_grad():
        text = family.encode_prompt(["a red cat"])
        x, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([7])
        awake = family.predict(x, t, text)
        with adapters.resting():
            resting = family.predict(x, t, text)
        assert torch.equal(family.predict(x, t, text), awake)
        eject(family.components["denoiser"], "t")
        assert torch.equal(family.predict(x, t, text), resting)
        assert not torch.equal(resting, awake)


def drift(path, caption):
    """Return how far an adapter moves the prediction for a caption, through its own text encoder, on the tiny base."""
    family = load_family(tiny.saved("sd"), torch.float32, CPU)
    x, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    with torch.no_grad():
        before = family.predict(x, t, family.encode_prompt([caption]))
        vislora.load(family.pipeline, path)
        return float((family.predict(x, t, family.encode_prompt([caption])) - before).norm())


@pytest.mark.quick("False")
@pytest.mark.parametrize("text_encoders", [False, True])
def test_a_run_keeps_more_of_the_base_where_the_trigger_is_missing(text_encoders, tmp_path):
    rate = {"optimizer__learning_rate": 2e-2, "loop__steps": 30, "adapter__text_encoders": text_encoders}
    for name in ("plain", "kept"):
        (tmp_path / name).mkdir()
    plain, _ = trained(tmp_path / "plain", "sd", **rate)
    kept, _ = trained(tmp_path / "kept", "sd", prior={"replace": {"a ": ["the "]}, "weight": 5.0, "share": 1.0}, **rate)
    assert drift(kept.path, "the red cat") < 0.8 * drift(plain.path, "the red cat")


def test_a_part_that_no_caption_has_is_told(tmp_path):
    with pytest.raises(ConfigError, match="no caption has 'sks' in it; the first caption is 'a red cat'"):
        trained(tmp_path, "sd", prior={"replace": {"sks": ["x"]}})


def test_captions_of_ones_own_are_kept_beside_those_without_the_trigger(tmp_path):
    given = {"replace": {"a ": ["the "]}, "captions": ["a dog, noto style"]}
    both = PriorConfig.model_validate(given)
    assert prior_captions(["a cat"], both) == {"a cat": ["the cat", "a dog, noto style"]}
    alone = PriorConfig.model_validate({"captions": given["captions"]})
    assert prior_captions(["a cat"], alone) == {"a cat": ["a dog, noto style"]}
    assert prior_captions(["a cat"], PriorConfig()) is None
    value, _ = trained(tmp_path, "sd", prior={**given, "images": 5})
    assert len(list((value.path.parent / "priors").glob("*.png"))) == 5


def test_a_run_is_the_same_again(tmp_path):
    weights = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        value, _ = trained(tmp_path / name, "sd", prior={"replace": {"a ": ["the ", ""]}})
        weights.append(load_file(value.path))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_the_flag_takes_a_table(tmp_path):
    from vislora.config.flags import parse
    from vislora.config.train import TrainConfig

    given = parse(TrainConfig, ["--folder", "x", "--replace", '{"a " = ["the "]}'], "vislora train")
    assert given.prior.replace == {"a ": ("the ",)}
    assert config(tmp_path).prior.replace == {}


def test_the_base_draws_what_is_compared(tmp_path):
    prior = {"replace": {"a ": ["the ", ""]}, "images": 3, "share": 1.0}
    runs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        value, records = trained(tmp_path / name, "sd", prior=prior)
        runs.append((load_file(value.path), sorted((value.path.parent / "priors").glob("*.png")), records))
    assert len(runs[0][1]) == 3
    assert [path.read_bytes() for path in runs[0][1]] == [path.read_bytes() for path in runs[1][1]]
    assert all(torch.equal(runs[0][0][key], runs[1][0][key]) for key in runs[0][0])
    told = [str(record) for record in runs[0][2] if "drawing priors" in str(record)]
    assert len(told) >= 2


def test_pictures_are_drawn_once(tmp_path, monkeypatch):
    drawn = []

    def counted(family, shots, *how):
        drawn.append(len(shots))
        return make_images(family, shots, *how)

    monkeypatch.setattr("vislora.jobs.drawing.make_images", counted)

    def pictures(name, *captions, **settings):
        (tmp_path / name).mkdir()
        prior = {"captions": captions, "images": 3}
        value, _ = trained(tmp_path / name, "sd", prior=prior, data__cache=tmp_path / "cache", **settings)
        return [path.read_bytes() for path in sorted((value.path.parent / "priors").glob("*.png"))]

    first = pictures("one", "a dog", "a cat")
    assert pictures("again", "a dog", "a cat") == first
    assert drawn == [3]
    assert pictures("other", "a dog", "a fox") != first
    pictures("half", "a dog", "a cat", loop__mixed_precision="bf16")
    assert drawn == [3, 3, 3]


def test_priors_with_pictures_of_their_own_are_compared_on_these(trainee):
    family, adapters = trainee
    with torch.no_grad():
        text, prior = family.encode_prompt(["a red cat"]), family.encode_prompt(["a cat"])
    draw = torch.Generator().manual_seed(3)
    latents, own = torch.randn(1, 4, 8, 8, generator=draw), torch.randn(1, 4, 8, 8, generator=draw)
    batch = {"latents": latents, "text": text, "captions": [""]}
    module = DenoisingLoss(family, {"denoiser": adapters}, LossOptions(prior_weight=1.0, prior_share=1.0))
    plain = module(batch, torch.Generator().manual_seed(5))
    kept = {"prior_text": prior, "prior_captions": ["a cat"], "prior_latents": own}
    both = module({**batch, **kept}, torch.Generator().manual_seed(5))
    draw = torch.Generator().manual_seed(5)
    family.objective.add_noise(latents, torch.randn(latents.shape, generator=draw), torch.zeros(1).long())
    family.objective.sample_t(latents.shape, draw)
    noise = torch.randn(own.shape, generator=draw)
    t = family.objective.sample_t(own.shape, draw)
    noisy = family.objective.add_noise(own, noise, t)
    mine = family.predict(noisy, t, prior)
    eject(family.components["denoiser"], "t")
    assert (both - plain).item() == pytest.approx(
        (mine - family.predict(noisy, t, prior)).square().mean().item(), rel=1e-4
    )


def test_the_base_is_asked_beforehand_and_not_in_the_steps(trainee, monkeypatch):
    family, adapters = trainee
    with torch.no_grad():
        text, prior = family.encode_prompt(["a red cat"]), family.encode_prompt(["a cat"])
    latents, own = torch.zeros(1, 4, 8, 8), torch.ones(1, 4, 8, 8)
    module = DenoisingLoss(family, {"denoiser": adapters}, LossOptions(prior_weight=0.5, prior_share=1.0))
    pictures = {"latents": own, "captions": ["a cat"], "text": prior, "number": torch.tensor([7])}
    module.ask_base(pictures, torch.Generator().manual_seed(11))
    draw = torch.Generator().manual_seed(11)
    noise, t = torch.randn(own.shape, generator=draw), family.objective.sample_t(own.shape, draw)
    noisy = family.objective.add_noise(own, noise, t)

    monkeypatch.setattr(adapters, "resting", lambda: pytest.fail("the base was asked again"))
    batch = {"latents": latents, "text": text, "captions": [""]}
    kept = {"prior_text": prior, "prior_captions": ["a cat"], "prior_latents": own, "prior_number": torch.tensor([7])}
    plain, both = (module(what, torch.Generator().manual_seed(5)) for what in (batch, {**batch, **kept}))
    mine = family.predict(noisy, t, prior)
    eject(family.components["denoiser"], "t")
    base = family.predict(noisy, t, prior)
    assert (both - plain).item() == pytest.approx(0.5 * (mine - base).square().mean().item(), rel=1e-4)


def test_pictures_need_to_know_what_they_leave_out(tmp_path):
    with pytest.raises(ConfigError, match=r"say in prior\.replace"):
        trained(tmp_path, "sd", prior={"images": 2})


def test_pictures_have_no_source_to_start_from(tmp_path):
    settings = {"base": str(tiny.saved("flux-kontext")), "data__sources": image_folder(tmp_path / "sources")}
    with pytest.raises(ConfigError, match=r"prior\.images: .* leave it out where data\.sources is given"):
        trained(tmp_path, prior={"images": 2, "replace": {"a ": ["the "]}}, **settings)


def regularization(folder):
    """Make two images of different shapes, the second one without a caption."""
    image_folder(folder, 2, size=(48, 24))
    Image.new("RGBA", (20, 50), (9, 9, 9, 90)).save(folder / "1.png")
    (folder / "1.txt").unlink()
    return folder


def test_images_of_ones_own_are_compared_on(tmp_path, monkeypatch):
    seen = []
    ask = DenoisingLoss.ask_base
    monkeypatch.setattr(
        DenoisingLoss, "ask_base", lambda self, batch, draw: (seen.append(batch), ask(self, batch, draw))
    )
    prior = {"regularization": regularization(tmp_path / "reg"), "captions": ["a dog"], "share": 1.0}
    value, records = trained(tmp_path, "sd", prior=prior)
    assert {caption for batch in seen for caption in batch["captions"]} == {"a red cat", "a dog"}
    assert "2 images of" in notes(records)
    assert not (value.path.parent / "priors").exists()
    plain, _ = trained(tmp_path, "sd", output=tmp_path / "plain")
    one, two = load_file(value.path), load_file(plain.path)
    assert any(not torch.equal(one[key], two[key]) for key in one)


def test_a_run_goes_on_with_the_same_images_of_ones_own_only(tmp_path):
    prior = {"regularization": regularization(tmp_path / "reg"), "captions": ["a dog"]}
    trained(tmp_path, "sd", prior={**prior}, loop__steps=2)
    (tmp_path / "reg").rename(tmp_path / "moved")
    prior["regularization"] = tmp_path / "moved"
    trained(tmp_path, "sd", prior={**prior}, resume=True, loop__steps=3)
    (tmp_path / "moved" / "0.txt").write_text("another")
    with pytest.raises(ConfigError, match=r"prior 0\.png was changed"):
        trained(tmp_path, "sd", prior={**prior}, resume=True)


@pytest.mark.parametrize(
    ("prior", "told"),
    [
        ({"images": 2}, "images: the images of regularization have their own captions"),
        ({"replace": {"a ": ["the "]}}, "replace: the images of regularization have their own captions"),
        ({}, "1.png: no caption"),
    ],
)
def test_what_goes_with_no_images_of_ones_own_is_told(prior, told, tmp_path):
    with pytest.raises(VisloraError) as caught:
        trained(tmp_path, "sd", prior={"regularization": regularization(tmp_path / "reg"), **prior})
    assert told in str(caught.value)


def test_batches_of_one_shape_are_one_and_others_are_not():
    def asked(rows, tokens, side=8):
        text = {"prompt_embeds": torch.full((rows, tokens, 3), float(rows)), "lengths": [torch.zeros(tokens)] * rows}
        return Asked(torch.zeros(rows, 4, side, side), torch.zeros(rows), text, torch.ones(rows, 4, side, side))

    both = joined([asked(2, 5), asked(1, 5)])
    assert both is not None
    assert both.noisy.shape[0] == both.t.shape[0] == both.target.shape[0] == len(both.conditioning["lengths"]) == 3
    assert both.conditioning["prompt_embeds"][:, 0, 0].tolist() == [2, 2, 1]
    assert joined([asked(2, 5), asked(1, 6)]) is None
    assert joined([asked(2, 5), asked(1, 5, side=16)]) is None
