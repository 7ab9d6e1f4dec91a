from __future__ import annotations

import copy
import json
import shutil
import tomllib

import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import vislora.jobs.train as job
from tests import tiny
from tests.jobs.train_helpers import config, image_folder, notes, trained
from vislora import formats
from vislora.errors import ConfigError, DataError, VisloraError
from vislora.inject.targets import Target, select
from vislora.inject.trained import FreshOptions, inject_fresh
from vislora.models.base import components_of, load_family
from vislora.registry import FAMILIES
from vislora.training.loss import DenoisingLoss, LossOptions

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_thread_surprises():
    torch.set_num_threads(1)


def tensors(path):
    return load_file(path)


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("family", tiny.STAPLES)
def test_training_gives_an_adapter_with_every_layer(family, tmp_path):
    value, records = trained(tmp_path, family)
    assert (value.path, value.step, value.finished) == (tmp_path / "run" / "run.safetensors", 4, True)
    adapter = formats.load(value.path)
    assert adapter.family == family
    denoiser = components_of(tiny.PIPELINES[family]())[1]["denoiser"]
    chosen = select(denoiser, [], "all", Target("", 2))
    assert {module.path for module in adapter.modules} == set(chosen)
    assert {module.component for module in adapter.modules} == {"denoiser"}
    assert all(adapter.delta(module).isfinite().all() for module in adapter.modules)
    assert any(adapter.delta(module).abs().max() > 0 for module in adapter.modules)
    assert f"denoiser: {len(chosen)} layers" in notes(records)
    assert sorted(item.name for item in (tmp_path / "run").iterdir()) == [
        "cache",
        "checkpoints",
        "config.toml",
        "log.jsonl",
        "loss.png",
        "run.safetensors",
    ]
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]


@pytest.mark.parametrize("family", tiny.STAPLES)
def test_metadata_says_what_was_trained_on_what(family, tmp_path):
    value, _ = trained(tmp_path, family, data__trigger="sks", adapter__alpha=1.0)
    with safe_open(value.path, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["vislora.base"])["family"] == family
    assert len(json.loads(metadata["vislora.base"])["hash"]) == 64
    data = json.loads(metadata["vislora.data"])
    assert len(data["hash"]) == 64
    assert (data["images"], data["captions"]) == (4, 4)
    assert json.loads(metadata["vislora.config"])["adapter"]["rank"] == 2
    assert metadata["vislora.steps"] == metadata["ss_steps"] == "4"
    assert "torch" in json.loads(metadata["vislora.versions"])
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("2", "1.0")
    assert metadata["ss_network_module"] == {"sd": "networks.lora"}.get(family, f"networks.lora_{family}")
    assert metadata["ss_num_train_images"] == "4"
    assert json.loads(metadata["ss_tag_frequency"])["images"]["sks"] == 4
    assert json.loads(metadata["ss_bucket_info"])["buckets"]["0"]["count"] == 4
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert metadata["modelspec.architecture"].endswith("/lora")
    assert metadata["modelspec.prediction_type"] == ("epsilon" if family == "sd" else "flow")
    assert metadata["modelspec.trigger_phrase"] == "sks"


def test_the_same_command_gives_the_same_tensors(tmp_path):
    settings = {"adapter__dropout": 0.1, "adapter__rank_dropout": 0.1, "adapter__module_dropout": 0.1}
    settings |= {"data__flip": True, "data__crop": "random", "data__caption_dropout": 0.5, "loop__noise_offset": 0.1}
    first, _ = trained(tmp_path, **settings)
    torch.rand(17)  # what the process drew before is no part of a run
    second, _ = trained(tmp_path, output=tmp_path / "again", **settings)
    assert same(tensors(first.path), tensors(second.path))
    other, _ = trained(tmp_path, output=tmp_path / "other", seed=1, **settings)
    assert not same(tensors(first.path), tensors(other.path))


@pytest.fixture
def small_batch():
    draw = torch.Generator().manual_seed(5)
    latents = torch.randn(3, 4, 8, 8, generator=draw)
    return {"latents": latents, "text": None, "captions": ["a red cat", "", "the house"]}


def reference_sd(family, batch, generator, v_prediction):
    """What a training script of diffusers does, with min-SNR weights of gamma 5."""
    pipeline = family.pipeline
    kind = "v_prediction" if v_prediction else "epsilon"
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, prediction_type=kind)
    noise = torch.randn(batch["latents"].shape, generator=generator)
    t = torch.randint(1000, (3,), generator=generator)
    ids = pipeline.tokenizer(batch["captions"], padding="max_length", truncation=True, return_tensors="pt").input_ids
    out = pipeline.unet(scheduler.add_noise(batch["latents"], noise, t), t, pipeline.text_encoder(ids)[0]).sample
    snr = scheduler.alphas_cumprod[t] / (1 - scheduler.alphas_cumprod[t])
    weights = torch.stack([snr, torch.full_like(snr, 5.0)]).min(0).values / (snr + 1 if v_prediction else snr)
    target = scheduler.get_velocity(batch["latents"], noise, t) if v_prediction else noise
    return ((out - target) ** 2).mean((1, 2, 3)).mul(weights).mean()


def reference_sd3(family, batch, generator, _):
    """What the SD3 training script of diffusers does; timesteps are logit-normal, shifted by 3."""
    noise = torch.randn(batch["latents"].shape, generator=generator)
    u = torch.sigmoid(torch.randn(3, generator=generator))
    sigmas = (3 * u / (1 + 2 * u)).view(3, 1, 1, 1)
    embeds, _, pooled, _ = family.pipeline.encode_prompt(
        batch["captions"], None, None, do_classifier_free_guidance=False
    )
    noisy = (1 - sigmas) * batch["latents"] + sigmas * noise
    out = family.pipeline.transformer(noisy, embeds, pooled, timestep=sigmas.view(3) * 1000).sample
    return ((out - (noise - batch["latents"])) ** 2).mean()


@pytest.mark.parametrize("case", ["sd", "sd-v", "sd3"])
def test_a_step_is_that_of_an_independent_reference(case, small_batch, tmp_path):
    name = case.removesuffix("-v")
    family = load_family(tiny.saved(name), torch.float32, CPU)
    if case == "sd-v":
        family.objective = type(family.objective)(family.objective.alphas_cumprod, "v")
    model = family.components["denoiser"]
    adapters = {"denoiser": inject_fresh(model, "x", select(model, [], "all", Target("", 2)), FreshOptions())}
    for parameter in adapters["denoiser"].parameters():
        parameter.data.add_(0.01)
    module = DenoisingLoss(family, adapters, LossOptions(min_snr_gamma=5.0))
    reference = {"sd": reference_sd, "sd3": reference_sd3}[name]
    mine = module(small_batch, torch.Generator().manual_seed(9))
    theirs = reference(family, small_batch, torch.Generator().manual_seed(9), case == "sd-v")
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-5)
    parameters = list(module.parameters())
    for a, b in zip(torch.autograd.grad(mine, parameters), torch.autograd.grad(theirs, parameters), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-7)


def test_noise_offset_is_the_same_over_a_channel(small_batch):
    family = load_family(tiny.saved("sd"), torch.float32, CPU)
    draw = {
        name: DenoisingLoss(family, {}, LossOptions(noise_offset=value)) for name, value in {"a": 0.0, "b": 0.5}.items()
    }
    latents = small_batch["latents"]
    plain, offset = (draw[name]._noise(latents, torch.Generator().manual_seed(2)) for name in "ab")
    difference = offset - plain
    assert torch.allclose(difference, difference[:, :, :1, :1].expand_as(difference), atol=1e-6)
    assert difference.abs().max() > 0


@pytest.mark.quick("sd3")
@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_timesteps_are_drawn_as_the_settings_and_the_base_say(family, tmp_path, monkeypatch):
    drawn = []
    objective = type(load_family(tiny.saved(family), torch.float32, CPU).objective)
    draw = objective.sample_t
    monkeypatch.setattr(objective, "sample_t", lambda *given: drawn.append(draw(*given)) or drawn[-1])
    own = shutil.copytree(tiny.saved(family), tmp_path / "low-base")
    (own / "vislora.json").write_text('{"timestep_shift": 0.01}')
    how = {"family": family, "loop__steps": 6, "loop__timesteps": "logit-normal"}
    trained(tmp_path / "usual", family, loop__steps=6)
    trained(tmp_path / "low", loop__timestep_shift=0.01, **how)
    trained(tmp_path / "own", base=str(own), **how)
    trained(tmp_path / "set", base=str(own), loop__timestep_shift=1.0, **how)
    usual, low, by_base, by_setting = torch.cat(drawn).float().chunk(4)
    assert max(low.max(), by_base.max()) < 300 < min(usual.max(), by_setting.max())
    written = tomllib.loads((tmp_path / "own" / "run" / "config.toml").read_text())
    assert written["loop"]["timestep_shift"] == 0.01


@pytest.mark.parametrize("family", tiny.STAPLES)
def test_text_encoders_are_trained_and_saved(family, tmp_path):
    value, records = trained(tmp_path, family, adapter__text_encoders=True, loop__steps=2)
    adapter = formats.load(value.path)
    text = {"sd": {"te:clip_l"}, "sd3": {"te:clip_l", "te:clip_g", "te:t5"}, "flux": {"te:clip_l", "te:t5"}}
    assert {module.component for module in adapter.modules} == {"denoiser", *text[family]}
    for module in adapter.modules:
        if module.component.startswith("te:"):
            assert adapter.delta(module).abs().max() > 0, module.name
    assert "caching captions" not in str(records)


def test_gradient_accumulation_sees_all_images(tmp_path):
    value, _ = trained(tmp_path, loop__gradient_accumulation=2, loop__steps=2)
    assert value.finished
    with safe_open(value.path, "pt") as file:
        assert file.metadata()["ss_num_epochs"] == "2"


def test_accumulation_is_the_mean_of_its_parts(tmp_path, monkeypatch):
    """With SGD and no clipping, a step of two forward passes is the mean of the two gradients."""
    from vislora.training import loop

    grads = []
    original = DenoisingLoss.forward

    def forward(self, batch, generator):
        loss = original(self, batch, generator)
        grads.append(torch.autograd.grad(loss, list(self.parameters()), retain_graph=True))
        return loss

    monkeypatch.setattr(DenoisingLoss, "forward", forward)
    stepped = []
    original_step = torch.optim.SGD.step

    def step(self, *args, **kwargs):
        stepped.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
        return original_step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    trained(tmp_path, optimizer__name="sgd", optimizer__max_grad_norm=1e9, loop__gradient_accumulation=2, loop__steps=1)
    assert loop.fit is job.fit
    assert len(grads) == 2
    assert len(stepped) == 1
    for got, a, b in zip(stepped[0], *grads, strict=True):
        assert torch.allclose(got, (a + b) / 2, atol=1e-7)


def test_gradient_checkpointing_computes_the_same(tmp_path, monkeypatch):
    calls = []
    original = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: (calls.append(1), original(*a, **k))[1])
    first, _ = trained(tmp_path)
    second, _ = trained(tmp_path, output=tmp_path / "again", loop__gradient_checkpointing=True)
    assert calls
    one, two = tensors(first.path), tensors(second.path)
    for key in one:
        assert torch.allclose(one[key], two[key], atol=1e-6)


@pytest.mark.quick("sd")
@pytest.mark.parametrize("family", tiny.STAPLES)
def test_bf16_on_a_cpu_keeps_the_adapter_in_float32(family, tmp_path):
    value, _ = trained(
        tmp_path,
        family,
        loop__mixed_precision="bf16",
        adapter__text_encoders=True,
        sample__every=4,
        sample__prompts=("a cat",),
        loop__steps=2,
    )
    assert {tensor.dtype for tensor in tensors(value.path).values()} == {torch.float32}
    assert (tmp_path / "run" / "samples" / "000000.png").exists()


def test_fp16_on_a_cpu_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        trained(tmp_path, loop__mixed_precision="fp16")
    trained(tmp_path)


def test_rank_stabilised_tucker_and_patterns(tmp_path):
    targets = [
        {"pattern": "*.attn1.to_q", "rank": 3, "alpha": 6.0},
        {"pattern": "*.attn1.*", "rank": 0},
        {"pattern": "*.conv1", "rank": 1},
    ]
    value, _ = trained(
        tmp_path,
        "sd",
        adapter__targets=targets,
        adapter__rank_stabilized=True,
        adapter__tucker=True,
        adapter__alpha=2.0,
    )
    adapter = formats.load(value.path)
    by_path = {module.path: module for module in adapter.modules}
    query = next(module for path, module in by_path.items() if path.endswith("attn1.to_q"))
    assert (query.rank, query.scale) == (3, pytest.approx(6 / 3**0.5))
    assert not any(path.endswith("attn1.to_k") for path in by_path)
    conv = next(module for path, module in by_path.items() if path.endswith("resnets.0.conv1"))
    assert conv.rank == 1
    assert len(conv.tensors) == 3
    assert conv.scale == pytest.approx(2.0)


def test_a_pattern_that_matches_nothing_leaves_no_run_behind(tmp_path):
    with pytest.raises(ConfigError, match="matches no layer"):
        trained(tmp_path, adapter__targets=[{"pattern": "*.attn9.*"}])
    trained(tmp_path)


@pytest.mark.parametrize(
    ("family", "format"), [("sd", "kohya"), ("sd3", "diffusers"), ("sd", "peft"), ("sd3", "kohya")]
)
def test_every_format_and_precision(family, format, tmp_path):
    value, _ = trained(
        tmp_path, family, format=format, save_precision="fp16", loop__steps=2, adapter__text_encoders=True
    )
    adapter = formats.load(value.path)
    assert adapter.family == family
    assert {tensor.dtype for module in adapter.modules for tensor in module.tensors.values()} == {torch.float16}


@pytest.mark.parametrize("name", ["adam"])
def test_every_optimizer(name, tmp_path):
    value, _ = trained(tmp_path, optimizer__name=name, loop__steps=2)
    assert any(tensor.abs().max() > 0 for key, tensor in tensors(value.path).items() if "up" in key)


def test_an_unknown_optimizer_names_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match="adamw"):
        trained(tmp_path, optimizer__name="adamW")


def test_bad_images_are_all_named(tmp_path):
    folder = image_folder(tmp_path / "images")
    for name in ("x.png", "y.jpg"):
        (folder / name).write_bytes(b"no image")
        (folder / name).with_suffix(".txt").write_text("a cat")
    with pytest.raises(DataError) as caught:
        trained(tmp_path)
    assert "x.png" in str(caught.value)
    assert "y.jpg" in str(caught.value)
    for name in ("x.png", "y.jpg"):
        (folder / name).unlink()
        (folder / name).with_suffix(".txt").unlink()
    value, _ = trained(tmp_path)
    assert value.finished


def test_a_loss_that_is_not_finite_is_an_error(tmp_path):
    with pytest.raises(VisloraError, match=r"the loss is nan at step 2.*learning_rate.*--overwrite"):
        trained(
            tmp_path,
            optimizer__name="sgd",
            optimizer__learning_rate=10,
            optimizer__max_grad_norm=1e30,
            optimizer__weight_decay=1e20,
        )
    value, _ = trained(tmp_path, overwrite=True)
    assert value.finished


def test_samples_are_made_on_schedule_and_change_nothing(tmp_path):
    plain, _ = trained(tmp_path, adapter__dropout=0.2)
    sampled, records = trained(
        tmp_path,
        output=tmp_path / "sampled",
        adapter__dropout=0.2,
        sample__every=2,
        sample__prompts=("a cat", "a dog"),
    )
    names = sorted(path.name for path in (tmp_path / "sampled" / "samples").iterdir())
    assert names == ["000000.png", "000002.png", "000004.png"]
    assert "samples: " in notes(records)
    with Image.open(tmp_path / "sampled" / "samples" / "000004.png") as image:
        assert image.width > 2 * 160
    assert same(tensors(plain.path), tensors(sampled.path))


def test_samples_at_a_resolution_that_the_pipeline_cannot_make(tmp_path):
    trained(tmp_path, "sd3", sample__every=4, data__resolution=24, sample__prompts=("a cat",))


def test_tensorboard_events_are_written(tmp_path):
    pytest.importorskip("tensorboard")
    trained(tmp_path, loop__tensorboard=True, loop__steps=1)
    assert list((tmp_path / "run" / "tensorboard").rglob("events.*"))


def counted(monkeypatch):
    calls = {"images": 0, "texts": 0}
    for name in FAMILIES:
        cls = FAMILIES[name]
        for method, kind in (("encode_image", "images"), ("encode_prompt", "texts")):
            original = getattr(cls, method)

            def wrapper(self, given, original=original, kind=kind):
                calls[kind] += len(given)
                return original(self, given)

            monkeypatch.setattr(cls, method, wrapper)
    return calls


def test_encoded_images_and_captions_are_used_again(tmp_path, monkeypatch):
    calls = counted(monkeypatch)
    common = {"data__cache": tmp_path / "cache", "loop__steps": 1}

    def run(output, **settings):
        calls.update(images=0, texts=0)
        trained(tmp_path, "sd", output=tmp_path / output, **{**common, **settings})
        return calls["images"], calls["texts"]

    common["data__resolution"] = 16
    assert run("a") == (4, 5)
    assert run("b") == (0, 0)
    (tmp_path / "images" / "0.txt").write_text("a new caption")
    assert run("c") == (0, 1)
    Image.new("RGB", (24, 24), (1, 2, 3)).save(tmp_path / "images" / "1.png")
    assert run("d") == (1, 0)
    assert run("e", data__max_aspect=1.0) == (0, 0)
    assert run("h", data__resolution=24) == (4, 0)
    assert run("f", base=str(changed_base(tmp_path, "vae"))) == (4, 0)
    assert run("g", base=str(changed_base(tmp_path, "text_encoder"))) == (0, 5)


def changed_base(tmp_path, part):
    pipeline = copy.copy(tiny.sd_pipeline())
    with torch.no_grad():
        next(getattr(pipeline, part).parameters()).mul_(1.01)
    pipeline.save_pretrained(tmp_path / f"base-{part}")
    return tmp_path / f"base-{part}"


def test_captions_that_are_too_long_are_told_once(tmp_path, capfd):
    folder = image_folder(tmp_path / "images")
    (folder / "0.txt").write_text("cat " * 20 + "dog")
    _, records = trained(tmp_path, "sd", adapter__text_encoders=True)
    assert "1 captions are too long for this base; the end of the first, not read: 'cat cat cat" in notes(records)
    assert capfd.readouterr().err == ""


def test_settings_are_saved_as_they_were_filled_in(tmp_path):
    from vislora.config.flags import parse

    trained(tmp_path, loop__steps=1)
    again = parse(type(config(tmp_path)), ["--config", str(tmp_path / "run" / "config.toml")], prog="x")
    assert again.loop.steps == 1
    assert again.data.resolution == 16
    assert again.optimizer.text_encoder_learning_rate == pytest.approx(5e-3)


@pytest.mark.parametrize("seed", [2**63, 2**70])
def test_seeds_that_torch_cannot_take(seed, tmp_path):
    with pytest.raises(ConfigError, match="seed"):
        config(tmp_path, seed=seed)
    assert config(tmp_path, seed=2**63 - 1)


@pytest.fixture
def seen(monkeypatch):
    """Return the batches that the loss is given."""
    batches = []
    forward = DenoisingLoss.forward

    def watched(module, batch, generator):
        batches.append(batch)
        return forward(module, batch, generator)

    monkeypatch.setattr(DenoisingLoss, "forward", watched)
    return batches


def captions_in(batches, of=""):
    return [caption for batch in batches for caption in batch[f"{of}captions"]]


@pytest.mark.quick("True")
@pytest.mark.parametrize("text_encoders", [False, True])
def test_an_image_is_seen_with_each_of_its_captions(text_encoders, tmp_path, seen):
    image_folder(tmp_path / "images", 2)
    (tmp_path / "images" / "0.txt").write_text("a red cat, ink\ncat, ink\nred, cat, ink")
    (tmp_path / "images" / "1.txt").write_text("a dog, ink")
    how = {"adapter__text_encoders": text_encoders, "loop__steps": 24, "loop__batch_size": 1}
    prior = {"replace": {", ink": [""]}}
    trained(tmp_path, "sd", data__caption_lines="each", data__tag_orders=6, data__keep_tags=0, prior=prior, **how)
    cats = [caption for caption in captions_in(seen) if "cat" in caption]
    written = [{"a red cat", "ink"}, {"cat", "ink"}, {"red", "cat", "ink"}]
    assert all(any(set(each.split(", ")) == tags for each in cats) for tags in written)
    assert len(set(cats)) > 4  # in other orders too
    assert set(captions_in(seen, "prior_")) == {"a red cat", "cat", "red, cat", "a dog"}


@pytest.mark.quick("True")
@pytest.mark.parametrize("text_encoders", [False, True])
def test_tags_take_other_places_at_other_visits(text_encoders, tmp_path, seen):
    image_folder(tmp_path / "images", 1)
    (tmp_path / "images" / "0.txt").write_text("red, round, bright")
    how = {"adapter__text_encoders": text_encoders, "loop__steps": 12, "loop__batch_size": 1}
    trained(tmp_path, "sd", data__trigger="sks", data__tag_orders=20, **how)
    learned = [caption for caption in captions_in(seen) if caption.startswith("sks")]
    assert {tuple(sorted(caption.split(", "))) for caption in learned} == {("bright", "red", "round", "sks")}
    assert 3 <= len(set(learned)) <= 6
    seen.clear()
    trained(tmp_path, "sd", output=tmp_path / "less", data__tag_orders=20, data__tag_dropout=0.5, **how)
    assert len({len(caption.split(", ")) for caption in captions_in(seen)}) > 1
    with pytest.raises(ConfigError, match=r"data\.tag_dropout: tags are left out of other orders"):
        trained(tmp_path, "sd", output=tmp_path / "none", data__tag_dropout=0.5, **how)
