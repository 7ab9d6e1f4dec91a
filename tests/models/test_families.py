from __future__ import annotations

import json
import shutil
import time
from functools import cache
from inspect import signature

import pytest
import torch
from diffusers import FluxPipeline
from diffusers.models.attention_processor import JointAttnProcessor2_0

from tests import tiny
from vislora.errors import ModelError
from vislora.models.base import Family, components_of, load_family
from vislora.models.joint import CountedJointAttention
from vislora.models.parts import pack
from vislora.registry import FAMILIES

torch.set_num_threads(1)
CPU = torch.device("cpu")
PROMPTS = ["a red cat", "", "ink outline of the house and a very long tail of words that is cut off"]


@cache
def family(name: str) -> Family:
    return load_family(tiny.saved(name), torch.float32, CPU)


def copied(name, tmp_path):
    return shutil.copytree(tiny.saved(name), tmp_path / name)


def fails(folder) -> str:
    """Return the message; it is one line, and quick: nothing goes to the network."""
    began = time.perf_counter()
    with pytest.raises(ModelError) as caught:
        load_family(folder, torch.float32, CPU)
    assert time.perf_counter() - began < 5
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_loaded_family_is_frozen_and_keeps_the_contract(name):
    loaded = family(name)
    assert next(iter(loaded.components)) == "denoiser"
    assert set(loaded.components) == set(loaded.card.attributes)
    for component, module in loaded.components.items():
        assert module is getattr(loaded.pipeline, loaded.card.attributes[component])
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())
    assert loaded.traits.resolution == tiny.side(name)
    assert components_of(loaded.pipeline) == (name, dict(loaded.components))


def sd_prompts(pipeline):
    ids = pipeline.tokenizer(PROMPTS, padding="max_length", max_length=tiny.TOKENS, truncation=True).input_ids
    return {"prompt_embeds": pipeline.text_encoder(torch.tensor(ids))[0]}


def sd3_prompts(pipeline):
    embeds, _, pooled, _ = pipeline.encode_prompt(PROMPTS, PROMPTS, PROMPTS)
    return {"prompt_embeds": embeds, "pooled": pooled}


def sdxl_prompts(pipeline):
    embeds, _, pooled, _ = pipeline.encode_prompt(PROMPTS, PROMPTS)
    return {"prompt_embeds": embeds, "pooled": pooled}


def flux_prompts(pipeline):
    embeds, pooled, _ = pipeline.encode_prompt(PROMPTS, PROMPTS)
    return {"prompt_embeds": embeds, "pooled": pooled}


def masked_prompts(pipeline):
    embeds, mask, _, _ = pipeline.encode_prompt(list(PROMPTS), negative_prompt=PROMPTS)
    return {"prompt_embeds": embeds, "mask": mask}


def auraflow_prompts(pipeline):
    return {"prompt_embeds": pipeline.encode_prompt(PROMPTS, PROMPTS)[0]}


def sana_prompts(pipeline):
    instruction = signature(pipeline.__call__).parameters["complex_human_instruction"].default
    assert len(instruction) > 5
    embeds, mask, _, _ = pipeline.encode_prompt(list(PROMPTS), complex_human_instruction=instruction)
    return {"prompt_embeds": embeds, "mask": mask}


def qwen_image_prompts(pipeline):
    embeds, mask = pipeline.encode_prompt(PROMPTS)
    return {"prompt_embeds": [row[kept.bool()] for row, kept in zip(embeds, mask, strict=True)]}


def z_image_prompts(pipeline):
    return {"prompt_embeds": pipeline.encode_prompt(list(PROMPTS))[0]}


def flux2_prompts(pipeline):
    return {"prompt_embeds": pipeline.encode_prompt(PROMPTS)[0]}


ENCODED = {
    "sd": sd_prompts,
    "sdxl": sdxl_prompts,
    "sdxl-refiner": sdxl_prompts,
    "sd3": sd3_prompts,
    "flux": flux_prompts,
    "pixart": masked_prompts,
    "lumina2": masked_prompts,
    "auraflow": auraflow_prompts,
    "sana": sana_prompts,
    "qwen-image": qwen_image_prompts,
    "z-image": z_image_prompts,
    "flux2": flux2_prompts,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_are_encoded_as_the_pipeline_does(name):
    loaded = family(name)
    with torch.no_grad():
        mine, expected = loaded.encode_prompt(PROMPTS), ENCODED[name](loaded.pipeline)
    assert mine.keys() == expected.keys()
    for key, rows in mine.items():
        assert all(torch.equal(row, other) for row, other in zip(rows, expected[key], strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_caption_is_encoded_alone_as_in_a_batch(name):
    loaded = family(name)
    with torch.no_grad():
        together, alone = loaded.encode_prompt(PROMPTS), loaded.encode_prompt(PROMPTS[:1])
    for key, tensor in alone.items():
        assert torch.allclose(tensor[0], together[key][0], atol=1e-6)


def as_latents(name, given):
    """Return what a denoiser takes or gives as latents; the pipeline knows how it packed them."""
    if name in ("flux", "qwen-image"):
        return FluxPipeline._unpack_latents(given, 16, 16, 2)
    if name.startswith("flux2"):
        return given.view(2, 4, 4, -1).permute(0, 3, 1, 2)
    return torch.stack(list(given)).squeeze(2) if name.startswith("z-image") else given


def as_pipeline_reads(name, out):
    """Return the part and the sign of the denoiser's output that the pipeline hands to its scheduler."""
    found = as_latents(name, out)
    if name == "lumina2" or name.startswith("z-image"):
        return -found
    return found.chunk(2, dim=1)[0] if name.startswith("pixart") else found


def always(loaded):
    """Return what the card says of every call, as far as this pipeline has it."""
    known = signature(type(loaded.pipeline).__call__).parameters
    return {key: value for key, value in loaded.card.always.items() if key in known}


def started(name, loaded):
    """Return what a run of three steps begins with: a size, or for one that refines images, an image."""
    if loaded.card.from_text:
        return {"num_inference_steps": 3, "width": tiny.side(name), "height": tiny.side(name)}
    return {"num_inference_steps": 3, "strength": 1.0, "image": torch.rand(2, 3, 16, 16)}


@pytest.mark.parametrize("name", [*FAMILIES, "pixart-alpha", "z-image-base", "flux2-distilled"])
def test_predict_is_what_the_pipeline_computes(name):
    loaded = family(name)
    seen = []
    denoiser = loaded.components["denoiser"]
    hook = denoiser.register_forward_hook(
        lambda _, args, kwargs, out: seen.append((args, kwargs, out)), with_kwargs=True
    )
    try:
        with torch.no_grad():
            loaded.pipeline(
                prompt=["a red cat", "the house"],
                **{loaded.card.guidance: loaded.card.guidance_off},
                output_type="latent",
                **started(name, loaded),
                generator=torch.Generator().manual_seed(0),
                **always(loaded),
            )
    finally:
        hook.remove()
    assert len(seen) == 3
    with torch.no_grad():
        conditioning = loaded.encode_prompt(["a red cat", "the house"])
    for (args, kwargs, out), t in zip(seen, loaded.pipeline.scheduler.timesteps, strict=True):
        noisy = as_latents(name, args[0] if args else kwargs["hidden_states"])  # a list for Z-Image
        with torch.no_grad():
            predicted = loaded.predict(noisy, t.expand(2), conditioning)
        assert (predicted - as_pipeline_reads(name, out[0])).abs().max() <= 1e-6


def per_channel(config, frames):
    """Return the only frame, each channel with its own shift and scale."""
    last = frames[:, :, 0].movedim(1, -1)
    return ((last - torch.tensor(config.latents_mean)) / torch.tensor(config.latents_std)).movedim(-1, 1)


# whose latents are no scaled mode of an AutoencoderKL
OWN_LATENTS = {
    "sana": lambda vae, pixels: vae.encode(pixels).latent * vae.config.scaling_factor,
    "qwen-image": lambda vae, pixels: per_channel(vae.config, vae.encode(pixels.unsqueeze(2)).latent_dist.mode()),
}


def scaled_mode(vae, pixels):
    return (vae.encode(pixels).latent_dist.mode() - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "flux2"])
def test_images_are_encoded_as_the_vae_says(name):
    loaded = family(name)
    factor = loaded.pipeline.vae_scale_factor
    height, width = tiny.side(name), tiny.side(name) * 3 // 2
    pixels = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = loaded.encode_image(pixels)
    with torch.no_grad():
        expected = OWN_LATENTS.get(name, scaled_mode)(loaded.pipeline.vae, pixels)
    assert torch.allclose(latents, expected, rtol=0, atol=0 if name not in OWN_LATENTS else 1e-6)
    assert latents.shape == (2, 4, height // factor, width // factor)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "sdxl-refiner"])
def test_latents_are_those_that_the_pipeline_decodes(name):
    """Our latents of a picture, handed to the pipeline for no steps at all, come out as the VAE's own round trip."""
    loaded = family(name)
    seen = []
    vae, side = loaded.pipeline.vae, tiny.side(name)
    pixels = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        encoded = vae.encode(pixels.unsqueeze(2) if name == "qwen-image" else pixels)
        plain = encoded.latent if name == "sana" else encoded.latent_dist.mode()
    loaded_decode = vae.decode
    vae.decode = lambda given, *args, **kwargs: (seen.append(given), loaded_decode(given, *args, **kwargs))[1]
    denoise = loaded.pipeline.scheduler.step
    latents = loaded.encode_image(pixels)
    packed = {"flux": pack, "qwen-image": pack, "flux2": lambda given: given.flatten(2).mT}
    given = packed.get(name, lambda same: same)(latents)
    loaded.pipeline.scheduler.step = lambda *_, **__: (given,)
    try:
        with torch.no_grad():
            how = {**started(name, loaded), "num_inference_steps": 2}
            loaded.pipeline(prompt=["a", "b"], **how, **always(loaded))
    finally:
        del vae.decode
        loaded.pipeline.scheduler.step = denoise
    assert (torch.cat(seen) - plain).abs().max() < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_bases_give_float32_latents_and_predictions_run(name):
    loaded = load_family(tiny.saved(name), torch.bfloat16, CPU)
    latents = loaded.encode_image(torch.zeros(1, 3, tiny.side(name), tiny.side(name)))
    assert latents.dtype == torch.float32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        t = loaded.objective.sample_t(latents.shape, torch.Generator().manual_seed(0))
        assert loaded.predict(latents, t, loaded.encode_prompt(["a cat"])).isfinite().all()


def test_v_prediction_is_read_from_the_base(tmp_path):
    folder = copied("sd", tmp_path)
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "prediction_type": "v_prediction"}))
    loaded = load_family(folder, torch.float32, CPU)
    assert loaded.objective.prediction == "v"
    assert loaded.traits.tags["modelspec.prediction_type"] == "v"
    path.write_text(json.dumps({**config, "prediction_type": "sample"}))
    assert "prediction_type 'sample'" in fails(folder)


def test_the_shift_of_a_flow_base_is_read_from_it():
    assert family("sd3").objective.shift == 3.0


@pytest.fixture
def without_t5(tmp_path):
    pipeline = tiny.sd3_pipeline()
    pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipeline.save_pretrained(tmp_path / "base")
    return load_family(tmp_path / "base", torch.float32, CPU)


def test_sd3_without_t5_loads_and_runs(without_t5):
    assert "te:t5" not in without_t5.components
    assert components_of(without_t5.pipeline)[0] == "sd3"
    assert without_t5.encode_prompt(["a cat"])["prompt_embeds"].isfinite().all()


def test_sd3_without_t5_computes_one_token_for_all_that_stand_for_it(without_t5):
    pipeline = without_t5.pipeline
    whole, _, pooled, _ = pipeline.encode_prompt(["a cat", "a dog"], None, None, do_classifier_free_guidance=False)
    short = without_t5.encode_prompt(["a cat", "a dog"])
    noisy, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([300.0, 700.0])
    pipeline.transformer.set_attn_processor(JointAttnProcessor2_0())
    expected = pipeline.transformer(noisy, whole, pooled, t).sample
    pipeline.transformer.set_attn_processor(CountedJointAttention())
    assert whole.shape[1] == short["prompt_embeds"].shape[1] + 255
    for given in (short, {**short, "prompt_embeds": whole}):  # as a cache of an earlier version may hold it
        torch.testing.assert_close(without_t5.predict(noisy, t, given), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pipeline.transformer(noisy, whole, pooled, t).sample, expected, rtol=0, atol=0)


@pytest.mark.parametrize("where", ["nowhere", "nobody/nothing", "./nobody/nothing"])
def test_a_missing_base_is_told_at_once(where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "does not exist" in fails(where)


def test_a_folder_that_is_no_pipeline(tmp_path):
    assert "has no model_index.json" in fails(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '"x"', "\xff"])
def test_a_damaged_index(text, tmp_path):
    (tmp_path / "model_index.json").write_bytes(text.encode("latin-1"))
    assert "model_index.json is damaged" in fails(tmp_path)


def test_an_unknown_pipeline(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "WuerstchenPipeline"}')
    message = fails(tmp_path)
    assert "WuerstchenPipeline" in message
    assert "StableDiffusion3Pipeline" in message


WEIGHTS = {"sd": ("unet", "vae", "text_encoder"), "sd3": ("transformer", "text_encoder_3")}
PARTS = [(name, part) for name, parts in WEIGHTS.items() for part in parts]


def weights_of(folder, part):
    return next((folder / part).glob("*.safetensors"))


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_missing_weights(name, part, tmp_path):
    folder = copied(name, tmp_path)
    weights_of(folder, part).unlink()
    assert str(folder) in fails(folder)


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_cut_off_weights(name, part, tmp_path):
    folder = copied(name, tmp_path)
    path = weights_of(folder, part)
    path.write_bytes(path.read_bytes()[:-100])
    assert str(folder) in fails(folder)


def test_a_tokenizer_without_words(tmp_path):
    folder = copied("sd", tmp_path)
    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    assert "tokenizer" in fails(folder)


@pytest.mark.parametrize("part", ["unet", "scheduler", "tokenizer"])
def test_a_missing_part(part, tmp_path):
    folder = copied("sd", tmp_path)
    shutil.rmtree(folder / part)
    assert str(folder) in fails(folder)


def test_weights_of_another_size(tmp_path):
    folder = copied("sd", tmp_path)
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "cross_attention_dim": 24}))
    assert str(folder) in fails(folder)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"stepz": 3}', "stepz: unknown setting (did you mean 'steps'"),
        ('{"steps": "many", "guidance_scale": -1}', "guidance_scale: "),
        ('{"size_step": 5}', "size_step: unknown setting"),
        ('{"steps": 3', "is damaged"),
        ("[3]", "should be a JSON object"),
        ("[" * 100_000, "is damaged"),
    ],
)
def test_settings_in_a_base_that_cannot_be_used(text, said, tmp_path):
    folder = copied("sd", tmp_path)
    (folder / "vislora.json").write_text(text)
    message = fails(folder)
    assert str(folder / "vislora.json") in message
    assert said in message


def test_settings_in_a_base(tmp_path):
    folder = copied("sd", tmp_path)
    usual = load_family(folder, torch.float32, CPU).traits
    (folder / "vislora.json").write_text('{"steps": 3, "guidance_scale": 2.5, "batch_size": null}')
    traits = load_family(folder, torch.float32, CPU).traits
    assert (traits.steps, traits.guidance_scale, traits.batch_size) == (3, 2.5, usual.batch_size)


def test_libraries_get_their_verbosity_back():
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    assert diffusers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    before = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    load_family(tiny.saved("sd"), torch.float32, CPU)
    assert (diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()) == before
    assert diffusers_logging.is_progress_bar_enabled()
    assert not transformers_logging.is_progress_bar_enabled()
