from __future__ import annotations

import copy

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from safetensors.torch import save_file

import vislora
from tests import tiny
from vislora import formats
from vislora.algorithms.base import InitOptions, LayerSpec
from vislora.errors import AdapterFileError, AdapterMismatchError, ConfigError, ModelError
from vislora.formats import AdapterFile, AdapterModule
from vislora.formats.names import canonical
from vislora.inject.injection import eject as eject_from
from vislora.inject.targets import Target, select
from vislora.inject.trained import FreshOptions, inject_fresh
from vislora.jobs.pipelines import loaded_strengths
from vislora.models.base import components_of
from vislora.registry import ALGORITHMS

torch.set_num_threads(1)
PROMPT = {"prompt": "a red cat", "num_inference_steps": 2, "width": 16, "height": 16, "output_type": "np"}
PIPELINES = {name: tiny.PIPELINES[name]() for name in tiny.STAPLES}


@pytest.fixture(params=PIPELINES)
def pipeline(request):
    return fresh(request.param)


def fresh(name):
    """Return a pipeline of its own modules; copying is faster than building."""
    parts = {key: copy.deepcopy(part) for key, part in PIPELINES[name].components.items()}
    made = type(PIPELINES[name])(**parts, **({"requires_safety_checker": False} if name == "sd" else {}))
    made.set_progress_bar_config(disable=True)
    return made


def image(pipeline):
    return torch.from_numpy(pipeline(**PROMPT, generator=torch.Generator().manual_seed(0)).images)


def adapter(components, family, seed=0, preset="all") -> AdapterFile:
    """Return an adapter with a clear effect on every component."""
    draw = torch.Generator().manual_seed(seed)
    modules = []
    for component, model in components.items():
        layers = dict(model.named_modules())
        for path in select(model, [], preset if component == "denoiser" else "attention-ff", Target("", 2)):
            slots = ALGORITHMS["lora"].init(LayerSpec.of(layers[path]), InitOptions(2, generator=draw))
            tensors = {name: 0.3 * torch.randn(slot.shape, generator=draw) for name, slot in slots.items()}
            name = canonical(path) if component.startswith("te:clip") else path
            modules.append(AdapterModule(component=component, path=name, algo="lora", tensors=tensors, alpha=1.0))
    return AdapterFile(modules=modules, family=family)


def saved(pipeline, path, seed=0, format="kohya"):
    family, components = components_of(pipeline)
    found = adapter(components, family, seed)
    formats.save(found, path, format)
    return formats.load(path)


def state(pipeline):
    models = components_of(pipeline)[1].items()
    return {f"{name}.{key}": value.clone() for name, model in models for key, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def add_by_hand(components, adapter_file, strength):
    """Add the float64 deltas to the weights; a CLIP path may be with or without `text_model.`."""
    for module in adapter_file.modules:
        model = components[module.component]
        paths = dict(model.named_modules())
        path = module.path if module.path in paths else module.path.removeprefix("text_model.")
        weight = paths[path].weight
        delta = adapter_file.delta(module, weight)
        weight.data = (weight.double() + strength * delta.reshape(weight.shape)).to(weight.dtype)


@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft"])
def test_loading_is_adding_the_deltas(pipeline, format, tmp_path):
    path = tmp_path / ("a" if format == "peft" else "a.safetensors")
    found = saved(pipeline, path, format=format)
    before, plain = state(pipeline), image(pipeline)
    assert vislora.load(pipeline, path, 0.7) == []
    assert loaded_strengths(pipeline) == {"a": 0.7}
    loaded = image(pipeline)
    vislora.set_strengths(pipeline, {"a": 0.0})
    assert torch.equal(image(pipeline), plain)
    vislora.set_strengths(pipeline, {"a": 0.7})
    assert torch.equal(image(pipeline), loaded)
    vislora.eject(pipeline, "a")
    assert same(state(pipeline), before)
    assert torch.equal(image(pipeline), plain)
    add_by_hand(components_of(pipeline)[1], found, 0.7)
    expected = image(pipeline)
    assert (expected - plain).abs().max() > 1e-3
    assert (expected - loaded).abs().max() < 1e-4


def test_a_stack_does_not_depend_on_its_order(pipeline, tmp_path):
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        saved(pipeline, tmp_path / f"{name}.safetensors", seed)
    images = []
    for order in ("abc", "cab", "bca"):
        for number, name in enumerate(order):
            vislora.load(pipeline, tmp_path / f"{name}.safetensors", 0.3 + 0.2 * "abc".index(name))
            assert len(loaded_strengths(pipeline)) == number + 1
        images.append(image(pipeline))
        vislora.eject(pipeline)
        assert loaded_strengths(pipeline) == {}
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])


def test_saving_a_pipeline_saves_the_base(pipeline, tmp_path):
    saved(pipeline, tmp_path / "a.safetensors")
    pipeline.save_pretrained(tmp_path / "before")
    vislora.load(pipeline, tmp_path / "a.safetensors")
    pipeline.save_pretrained(tmp_path / "loaded")
    weights = [path.relative_to(tmp_path / "before") for path in (tmp_path / "before").rglob("*.safetensors")]
    assert weights
    for path in weights:
        assert (tmp_path / "before" / path).read_bytes() == (tmp_path / "loaded" / path).read_bytes()


def test_attention_slicing_goes_together(tmp_path):
    pipeline = fresh("sd")
    saved(pipeline, tmp_path / "a.safetensors")
    vislora.load(pipeline, tmp_path / "a.safetensors")
    plain = image(pipeline)
    pipeline.enable_attention_slicing(1)
    assert torch.allclose(image(pipeline), plain, atol=1e-5)
    vislora.eject(pipeline)
    pipeline.disable_attention_slicing()
    assert torch.equal(image(pipeline), image(fresh("sd")))


def test_fusing_projections_over_an_adapter_stops_the_pipeline(pipeline, tmp_path):
    saved(pipeline, tmp_path / "a.safetensors")
    plain = image(pipeline)
    vislora.load(pipeline, tmp_path / "a.safetensors")
    loaded = image(pipeline)
    fusing = pipeline if hasattr(pipeline, "fuse_qkv_projections") else pipeline.transformer
    fusing.fuse_qkv_projections()
    with pytest.raises(AdapterMismatchError, match=r"call unfuse_qkv_projections\(\)"):
        image(pipeline)
    fusing.unfuse_qkv_projections()
    assert torch.equal(image(pipeline), loaded)
    vislora.eject(pipeline)
    fusing.fuse_qkv_projections()
    assert torch.allclose(image(pipeline), plain, atol=1e-5)
    with pytest.raises(AdapterMismatchError, match=r"call unfuse_qkv_projections\(\)"):
        vislora.load(pipeline, tmp_path / "a.safetensors")
    assert loaded_strengths(pipeline) == {}


def test_two_pipelines_of_the_same_parts_share_their_adapters(tmp_path):
    pipeline = fresh("sd")
    other = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    assert components_of(other)[0] == "sd"
    saved(pipeline, tmp_path / "a.safetensors")
    before = state(pipeline)
    vislora.load(other, tmp_path / "a.safetensors", 0.5)
    assert loaded_strengths(pipeline) == {"a": 0.5}
    with pytest.raises(ConfigError, match="loaded already"):
        vislora.load(pipeline, tmp_path / "a.safetensors")
    vislora.eject(pipeline)
    assert loaded_strengths(other) == {}
    assert same(state(pipeline), before)


def test_two_pipelines_that_share_only_the_unet(tmp_path):
    pipeline, second = fresh("sd"), fresh("sd")
    second.unet = pipeline.unet
    saved(pipeline, tmp_path / "a.safetensors")
    vislora.load(pipeline, tmp_path / "a.safetensors", 0.5)
    with pytest.raises(ConfigError, match="loaded already"):
        vislora.load(second, tmp_path / "a.safetensors", 0.5)
    assert "_vislora_stack" not in second.text_encoder.__dict__
    vislora.eject(pipeline)
    assert torch.equal(image(pipeline), image(fresh("sd")))


def test_a_bare_unet(tmp_path):
    unet = tiny.unet()
    found = adapter({"denoiser": unet}, "sd")
    formats.save(found, tmp_path / "a.safetensors", "kohya")
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    vislora.load(unet, tmp_path / "a.safetensors", 0.5)
    loaded = tiny.output(unet, "unet")
    vislora.eject(unet)
    assert same(unet.state_dict(), before)
    add_by_hand({"denoiser": unet}, found, 0.5)
    assert torch.allclose(loaded, tiny.output(unet, "unet"), atol=1e-4)


BARE = [("vit", "diffusers"), ("vit", "peft"), ("clip", "kohya"), ("clip", "diffusers"), ("clip", "peft")]


@pytest.mark.parametrize(("name", "format"), BARE)
def test_a_bare_model_of_transformers(name, format, tmp_path):
    model = tiny.model(name)
    before, plain = {key: value.clone() for key, value in model.state_dict().items()}, tiny.output(model, name)
    trained = inject_fresh(model, "x", select(model, [], "attention-ff", Target("", 2)), FreshOptions())
    optimizer = torch.optim.SGD(trained.parameters(), 0.5)
    for _ in range(3):
        tiny.output(model, name)[..., 0].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    trained.eval()
    expected = tiny.output(model, name).detach()
    assert (expected - plain).abs().max() > 1e-4
    component = "te:clip_l" if name == "clip" else "denoiser"
    modules = [
        AdapterModule(component=component, path=canonical(path), algo=meta.algorithm, tensors=slots, alpha=meta.alpha)
        for path, meta, slots, _ in trained.modules_with_slots()
    ]
    eject_from(model, "x")
    assert same(model.state_dict(), before)
    path = tmp_path / ("a" if format == "peft" else "a.safetensors")
    formats.save(AdapterFile(modules=modules, family="sd" if name == "clip" else None), path, format)
    vislora.load(model, path)
    assert torch.allclose(tiny.output(model, name), expected, atol=1e-5)
    vislora.eject(model)
    assert same(model.state_dict(), before)


@pytest.mark.parametrize(("mine", "other"), [("sd", "sd3"), ("sd3", "sd")])
def test_an_adapter_for_another_family(mine, other, tmp_path):
    saved(fresh(other), tmp_path / "a.safetensors")
    pipeline = fresh(mine)
    before = state(pipeline)
    with pytest.raises(AdapterMismatchError) as caught:
        vislora.load(pipeline, tmp_path / "a.safetensors")
    message = str(caught.value)
    assert f"it looks like an adapter for '{other}', this is '{mine}'" in message
    assert same(state(pipeline), before)
    assert loaded_strengths(pipeline) == {}
    assert not any("vislora" in key for model in components_of(pipeline)[1].values() for key in model.__dict__)


def test_shapes_that_do_not_fit_are_shown(tmp_path):
    pipeline = fresh("sd")
    found = saved(pipeline, tmp_path / "a.safetensors")
    for module in found.modules[:7]:
        module.tensors = {
            name: torch.cat([slot, slot], -1 if slot.dim() < 3 else 1) if slot.shape[0] == 2 else slot
            for name, slot in module.tensors.items()
        }
    formats.save(found, tmp_path / "b.safetensors", "kohya")
    with pytest.raises(AdapterMismatchError) as caught:
        vislora.load(pipeline, tmp_path / "b.safetensors")
    message = str(caught.value)
    assert message.count("the adapter's delta is") == 5
    assert "... and " in message
    assert loaded_strengths(pipeline) == {}
    misfits = vislora.load(pipeline, tmp_path / "b.safetensors", allow_partial=True)
    assert len(misfits) == 7


def test_an_adapter_of_which_nothing_fits_is_an_error_even_when_parts_may_be_left_out(tmp_path):
    text = {"te:clip_l": tiny.clip_text()}
    formats.save(adapter(text, "sd"), tmp_path / "a.safetensors", "kohya")
    pipeline = StableDiffusionPipeline(
        **{**fresh("sd").components, "text_encoder": None, "tokenizer": None}, requires_safety_checker=False
    )
    for allow_partial in (False, True):
        with pytest.raises(AdapterMismatchError, match="te:clip_l"):
            vislora.load(pipeline, tmp_path / "a.safetensors", allow_partial=allow_partial)


def test_one_component_that_does_not_fit_may_be_left_out(tmp_path):
    pipeline = fresh("sd")
    _, components = components_of(pipeline)
    found = adapter({"denoiser": components["denoiser"]}, "sd")
    text = adapter({"te:clip_l": tiny.clip_text()}, "sd")
    for module in text.modules:
        module.path = module.path.replace("layers.0.", "layers.8.").replace("layers.1.", "layers.9.")
    found.modules += text.modules
    formats.save(found, tmp_path / "a.safetensors", "kohya")
    with pytest.raises(AdapterMismatchError):
        vislora.load(pipeline, tmp_path / "a.safetensors")
    misfits = vislora.load(pipeline, tmp_path / "a.safetensors", allow_partial=True)
    assert len(misfits) == len(text.modules)
    assert loaded_strengths(pipeline) == {"a": 1.0}


def test_unknown_pipelines_have_their_unet_or_transformer():
    class Mine:
        def __init__(self, **parts):
            self.__dict__.update(parts)

    unet, transformer = tiny.unet(), tiny.dit()
    assert components_of(Mine(unet=unet)) == (None, {"denoiser": unet})
    assert components_of(Mine(transformer=transformer)) == (None, {"denoiser": transformer})
    with pytest.raises(ModelError, match="Mine is neither"):
        components_of(Mine(unet=None))


def test_pipelines_with_two_text_encoders_are_sdxl_not_sd():
    class Xl:
        def __init__(self):
            self.unet, self.text_encoder, self.text_encoder_2 = tiny.unet(), tiny.clip_text(), tiny.clip_text()
            self.components = dict(self.__dict__)

    assert components_of(Xl())[0] == "sdxl"


def test_a_compiled_unet_is_still_sd(tmp_path):
    pipeline = fresh("sd")
    found = saved(pipeline, tmp_path / "a.safetensors")
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    assert components_of(pipeline)[0] == "sd"
    assert vislora.load(pipeline, tmp_path / "a.safetensors") == []
    assert loaded_strengths(pipeline) == {"a": 1.0}
    assert {module.component for module in found.modules} == {"denoiser", "te:clip_l"}


def test_names_and_strengths_that_are_wrong_change_nothing(tmp_path):
    pipeline = fresh("sd")
    saved(pipeline, tmp_path / "ink.safetensors")
    for bad in (float("nan"), float("inf"), "x", None, 1000):
        with pytest.raises(ConfigError, match="ink"):
            vislora.load(pipeline, tmp_path / "ink.safetensors", bad)
        assert loaded_strengths(pipeline) == {}
    vislora.load(pipeline, tmp_path / "ink.safetensors", 0.5)
    with pytest.raises(ConfigError, match="did you mean 'ink'"):
        vislora.set_strengths(pipeline, {"ink": 0.9, "inc": 1.0})
    with pytest.raises(ConfigError, match="ink"):
        vislora.set_strengths(pipeline, {"ink": float("nan")})
    assert loaded_strengths(pipeline) == {"ink": 0.5}
    with pytest.raises(ConfigError, match="loaded: ink"):
        vislora.eject(pipeline, "other")
    vislora.eject(pipeline)
    vislora.eject(pipeline)


def test_files_that_are_no_adapters(tmp_path):
    pipeline = fresh("sd")
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    for path in (tmp_path / "a.safetensors", tmp_path / "missing.safetensors"):
        with pytest.raises(AdapterFileError, match=path.name):
            vislora.load(pipeline, path)
    assert loaded_strengths(pipeline) == {}


def test_a_whole_fused_layer_is_named_with_the_way_out(tmp_path):
    slots = {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(18, 8)}
    name = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    save_file({f"{name}.{slot}": tensor for slot, tensor in slots.items()}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match=r"the model has in parts: .* convert it to plain LoRA \(--as lora\)"):
        vislora.load(fresh("sd3"), tmp_path / "a.safetensors")
