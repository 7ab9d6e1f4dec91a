"""Our files in diffusers and PEFT: the same delta for every module, whatever ranks and alphas the modules have."""

from __future__ import annotations

import warnings

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, StableDiffusionPipeline, UNet2DConditionModel
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.formats.format_helpers import module
from tests.formats.test_sd3 import TINY
from vislora import formats
from vislora.algebra.compare import compare
from vislora.formats.adapter_file import AdapterFile

UNET = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
    "sample_size": 8,
}
CLIP = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 8,
}


FLUX = {
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "in_channels": 4,
    "guidance_embeds": True,
    "axes_dims_rope": (2, 2, 4),
}


def adapter_for(component: str, model: nn.Module, skip: tuple[str, ...] = ()) -> AdapterFile:
    """Give every linear and conv layer a module of its own rank and alpha."""
    modules = []
    for index, (path, layer) in enumerate(model.named_modules()):
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and not path.endswith(skip):
            name = f"text_model.{path}" if component == "te:clip_l" and not path.startswith("text_model") else path
            shape = tuple(layer.weight.shape)
            modules.append(module(name, component, rank=1 + index % 3, alpha=0.5 + index % 5, shape=shape))
    return AdapterFile(modules=modules, family="sd3" if isinstance(model, SD3Transformer2DModel) else "sd")


def peer_deltas(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    return {path: layer.get_delta_weight(adapter_name) for path, layer in layers.items()}


def assert_same(adapter: AdapterFile, component: str, found: dict[str, torch.Tensor]) -> None:
    expected = {item.path: adapter.delta(item) for item in adapter.modules if item.component == component}
    found = {path.removeprefix("base_model.model."): delta for path, delta in found.items()}
    if component == "te:clip_l":
        expected = {path.removeprefix("text_model."): delta for path, delta in expected.items()}
        found = {path.removeprefix("text_model."): delta for path, delta in found.items()}
    assert found.keys() == expected.keys()
    for path, delta in found.items():
        torch.testing.assert_close(delta.double(), expected[path], rtol=1e-5, atol=1e-6, msg=path)


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return UNet2DConditionModel(**UNET), CLIPTextModel(CLIPTextConfig(**CLIP))


@pytest.fixture
def pipeline(models):
    unet, clip = models
    parts = {"unet": unet, "text_encoder": clip}
    others = ("vae", "tokenizer", "scheduler", "safety_checker", "feature_extractor")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = StableDiffusionPipeline(**parts, **dict.fromkeys(others), requires_safety_checker=False)
    yield made
    made.unload_lora_weights()


def both(models) -> AdapterFile:
    unet, clip = models
    text = adapter_for("te:clip_l", clip)
    return AdapterFile(modules=adapter_for("denoiser", unet).modules + text.modules, family="sd")


def test_diffusers_loads_our_diffusers_files(pipeline, models, tmp_path):
    adapter = both(models)
    formats.save(adapter, tmp_path / "a.safetensors", "diffusers")
    pipeline.load_lora_weights(tmp_path / "a.safetensors", adapter_name="a")
    assert_same(adapter, "denoiser", peer_deltas(pipeline.unet, "a"))
    assert_same(adapter, "te:clip_l", peer_deltas(pipeline.text_encoder, "a"))


def test_diffusers_loads_our_kohya_files(pipeline, models, tmp_path):
    """diffusers itself gives some modules another module's alpha when alphas differ, so here they are all one."""
    unet, clip = models
    skip = ("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2")
    modules = adapter_for("denoiser", unet, skip).modules + adapter_for("te:clip_l", clip).modules
    for item in modules:
        item.alpha = 3.0
    adapter = AdapterFile(modules=modules, family="sd")
    formats.save(adapter, tmp_path / "a.safetensors", "kohya")
    pipeline.load_lora_weights(tmp_path / "a.safetensors", adapter_name="a")
    assert_same(adapter, "denoiser", peer_deltas(pipeline.unet, "a"))
    assert_same(adapter, "te:clip_l", peer_deltas(pipeline.text_encoder, "a"))


def test_diffusers_loads_our_dora_for_every_component(pipeline, models, tmp_path):
    """Its reader of text encoders (transformers') wants another spelling of the magnitude than that of the UNet."""
    adapter = both(models)
    for item in adapter.modules:
        item.magnitude, item.magnitude_axis = torch.rand(item.shape[0]) + 0.5, "out"
    formats.save(adapter, tmp_path / "a.safetensors", "diffusers")
    pipeline.load_lora_weights(tmp_path / "a.safetensors", adapter_name="a")
    expected = {(item.component, item.path.removeprefix("text_model.")): item.magnitude for item in adapter.modules}
    found = {}
    for component, model in (("denoiser", pipeline.unet), ("te:clip_l", pipeline.text_encoder)):
        for path, layer in model.named_modules():
            if isinstance(layer, BaseTunerLayer):
                weight = layer.lora_magnitude_vector["a"].weight.detach()
                found[component, path.removeprefix("text_model.")] = weight.flatten()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_files_that_diffusers_saves_are_read(pipeline, models, tmp_path):
    adapter = both(models)
    formats.save(adapter, tmp_path / "a.safetensors", "diffusers")
    pipeline.load_lora_weights(tmp_path / "a.safetensors", adapter_name="a")
    from peft import get_peft_model_state_dict

    layers = {
        "unet_lora_layers": get_peft_model_state_dict(pipeline.unet, adapter_name="a"),
        "text_encoder_lora_layers": get_peft_model_state_dict(pipeline.text_encoder, adapter_name="a"),
    }
    metadata = {
        "unet_lora_adapter_metadata": _config(pipeline.unet),
        "text_encoder_lora_adapter_metadata": _config(pipeline.text_encoder),
    }
    StableDiffusionPipeline.save_lora_weights(tmp_path / "saved", **layers, **metadata)
    comparison = compare(adapter, formats.load(tmp_path / "saved"))
    assert comparison.exact, comparison.problems(0.0)[:3]


def _config(model: nn.Module) -> dict:
    config = model.peft_config["a"].to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


def test_peft_loads_our_folders(models, tmp_path):
    adapter = both(models)
    formats.save(adapter, tmp_path / "a", "peft")
    torch.manual_seed(0)
    unet, clip = UNet2DConditionModel(**UNET), CLIPTextModel(CLIPTextConfig(**CLIP))
    for component, model, folder in (("denoiser", unet, "unet"), ("te:clip_l", clip, "text_encoder")):
        wrapped = PeftModel.from_pretrained(model, tmp_path / "a" / folder)
        assert_same(adapter, component, peer_deltas(wrapped, "default"))
        wrapped.save_pretrained(tmp_path / "again" / folder)
    comparison = compare(adapter, formats.load(tmp_path / "again"))
    assert comparison.exact, comparison.problems(0.0)[:3]


def test_peft_loads_our_folder_of_a_clip_with_projection(tmp_path):
    model = CLIPTextModelWithProjection(CLIPTextConfig(**CLIP))
    adapter = adapter_for("te:clip_g", model)
    adapter.family = "sd3"
    formats.save(adapter, tmp_path / "a", "peft")
    assert_same(adapter, "te:clip_g", peer_deltas(PeftModel.from_pretrained(model, tmp_path / "a"), "default"))


def test_peft_applies_our_dora_as_we_do(models, tmp_path):
    adapter = adapter_for("denoiser", models[0])
    for item in adapter.modules:
        item.magnitude, item.magnitude_axis = torch.rand(item.shape[0]) + 0.5, "out"
    formats.save(adapter, tmp_path / "a", "peft")
    torch.manual_seed(1)
    model = UNet2DConditionModel(**UNET)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    merged = PeftModel.from_pretrained(model, tmp_path / "a").merge_and_unload().state_dict()
    for item in adapter.modules:
        base = before[f"{item.path}.weight"]
        expected = base.double() + adapter.delta(item, base)
        torch.testing.assert_close(merged[f"{item.path}.weight"].double(), expected, rtol=1e-4, atol=1e-6)


DENOISERS = {
    "sd3": (SD3Transformer2DModel, TINY, "transformer"),
    "flux": (FluxTransformer2DModel, FLUX, "transformer"),
    "sdxl": (UNet2DConditionModel, {**UNET, "transformer_layers_per_block": 2}, "unet"),
}


@pytest.mark.parametrize("family", DENOISERS)
def test_diffusers_loads_our_files_of_other_families(family, tmp_path):
    kind, config, prefix = DENOISERS[family]
    model = kind(**config)
    adapter = adapter_for("denoiser", model)
    adapter.family = family
    formats.save(adapter, tmp_path / "a.safetensors", "diffusers")
    # without use_safetensors diffusers does not look at the metadata here
    options = {"prefix": prefix, "adapter_name": "a", "use_safetensors": True}
    model.load_lora_adapter(tmp_path / "a.safetensors", **options)
    assert_same(adapter, "denoiser", peer_deltas(model, "a"))


def test_per_module_alphas_of_kohya_files_survive(pipeline, models, tmp_path):
    """diffusers' own reader mis-scales attention in such a file (modal alpha); as our diffusers file it is right."""
    unet, _ = models
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for index, (path, layer) in enumerate(unet.named_modules()):
        if isinstance(layer, nn.Linear) and "attn" in path:
            name = f"lora_unet_{path.replace('.', '_')}"
            tensors[f"{name}.lora_down.weight"] = torch.randn(4, layer.in_features, generator=generator)
            tensors[f"{name}.lora_up.weight"] = torch.randn(layer.out_features, 4, generator=generator)
            tensors[f"{name}.alpha"] = torch.tensor(float(1 + index % 4))
    save_file(tensors, tmp_path / "kohya.safetensors")
    adapter = formats.load(tmp_path / "kohya.safetensors")
    formats.save(adapter, tmp_path / "b.safetensors", "diffusers")
    pipeline.load_lora_weights(tmp_path / "b.safetensors", adapter_name="b")
    assert_same(adapter, "denoiser", peer_deltas(pipeline.unet, "b"))
    for name in {key.partition(".")[0] for key in tensors}:
        scale = float(tensors[f"{name}.alpha"]) / 4
        up, down = (tensors[f"{name}.lora_{half}.weight"].double() for half in ("up", "down"))
        assert torch.equal(adapter.delta(name), scale * (up @ down))
