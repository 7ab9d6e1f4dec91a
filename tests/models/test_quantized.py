"""Bases in 8 and 4 bits: what they predict, what of them is quantised, what it costs, and adapters on them."""

from __future__ import annotations

import builtins
import sys

import pytest
import torch
from torch import nn

from tests import tiny
from vislora.errors import ConfigError, ModelError
from vislora.inject.injection import eject
from vislora.inject.targets import Target, select
from vislora.inject.trained import FreshOptions, inject_fresh
from vislora.jobs.memory import Step, estimate, weight_bytes
from vislora.models import quantized
from vislora.models.base import load_family
from vislora.models.quantized import block_layers, is_misread, is_quantized, quantize, quantize_base, statistics
from vislora.models.weightless import weightless_module
from vislora.registry import FAMILIES
from vislora.training.loss import LossOptions
from vislora.training.memory import module_bytes

bitsandbytes = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.usefixtures("narrow_nf4")
torch.set_num_threads(1)
CPU = torch.device("cpu")
KINDS = ("int8", "nf4")
# the largest relative error of a prediction that random weights of width 16 to 32 gave, and half as much again
ERROR = {"int8": 0.02, "nf4": 0.15}
CASES = [*((name, "nf4") for name in sorted(set(FAMILIES) - {"sdxl-refiner"})), ("sd", "int8"), ("flux", "int8")]


def prediction(family, name, dtype=torch.float32):
    """Return what the family predicts for fixed latents and prompts."""
    side = tiny.side(name)
    with torch.no_grad():
        like = family.encode_image(torch.zeros(2, 3, side, side))
        noisy = torch.randn(like.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        return family.predict(noisy, torch.tensor([500.0, 300.0]), family.encode_prompt(["a red cat", "dog"]))


def test_a_pass_leaves_the_bits_as_they_are(monkeypatch):
    # on such a CPU the library would pack them anew
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(64, 24)])}).requires_grad_(False).eval()
    quantize(model, "nf4", CPU)
    layer = model["blocks"][0]
    before = layer.weight.data.clone()
    assert layer(torch.randn(2, 64)).shape == (2, 24)
    assert torch.equal(layer.weight.data, before)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_family_predicts_nearly_the_same(name, kind):
    plain = prediction(load_family(tiny.saved(name), torch.float32, CPU), name)
    family = load_family(tiny.saved(name), torch.float32, CPU, quantize=kind)
    found = prediction(family, name)
    assert 0 < (found - plain).norm() / plain.norm() < ERROR[kind]
    denoiser = family.components["denoiser"]
    layers = [layer for layer in denoiser.modules() if is_quantized(layer)]
    assert layers
    assert not any(parameter.requires_grad for parameter in denoiser.parameters())
    assert denoiser.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_too(kind):
    plain = prediction(load_family(tiny.saved("flux"), torch.bfloat16, CPU), "flux", torch.bfloat16)
    found = prediction(load_family(tiny.saved("flux"), torch.bfloat16, CPU, quantize=kind), "flux", torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert 0 < (found - plain).float().norm() / plain.float().norm() < ERROR[kind]


def test_what_is_outside_of_blocks_stays():
    family = load_family(tiny.saved("flux"), torch.float32, CPU, quantize="nf4")
    model = family.components["denoiser"]
    paths = {path for path, layer in model.named_modules() if is_quantized(layer)}
    assert paths
    assert all(path.split(".")[0] in {"transformer_blocks", "single_transformer_blocks"} for path in paths)
    assert type(model.proj_out) is nn.Linear
    assert type(model.x_embedder) is nn.Linear


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_text_encoder_says_nearly_the_same(name, kind):
    if kind == "nf4" and is_misread(32):
        pytest.skip("on AVX-512 this bitsandbytes reads narrow layers of nf4 by wrong scales")
    family = load_family(tiny.saved(name), torch.float32, CPU)
    before = family.encode_prompt(["a red cat", "dog"])
    encoders = [part for key, part in family.pipeline.components.items() if key.startswith("text_encoder") and part]
    for encoder in encoders:
        quantize(encoder, kind, CPU)
    assert all(any(map(is_quantized, encoder.modules())) for encoder in encoders)
    after = family.encode_prompt(["a red cat", "dog"])
    for key, value in before.items():
        for one, other in zip(value, after[key], strict=True):
            if one.is_floating_point():
                assert (one - other).norm() <= 1.5 * ERROR[kind] * one.norm(), key


def test_only_large_text_encoders_are_quantized(monkeypatch):
    pipeline = load_family(tiny.saved("flux"), torch.float32, CPU).pipeline
    monkeypatch.setattr(quantized, "LARGE", sum(item.numel() for item in pipeline.text_encoder_2.parameters()))
    assert sum(item.numel() for item in pipeline.text_encoder.parameters()) < quantized.LARGE
    before = pipeline.encode_prompt(["a red cat"])[0]
    quantize_base(pipeline, "transformer", "int8", CPU)
    assert any(map(is_quantized, pipeline.text_encoder_2.modules()))
    assert not any(map(is_quantized, pipeline.text_encoder.modules()))
    assert not any(map(is_quantized, pipeline.vae.modules()))
    after = pipeline.encode_prompt(["a red cat"])[0]
    assert 0 < (after - before).norm() / before.norm() < ERROR["int8"]


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8 + 32 / 512), ("nf4", 4 + 8 / 64 + 32 / (64 * 256))])
def test_bits_of_a_weight(kind, bits):
    model = nn.ModuleList([nn.Linear(512, 1024, bias=False, dtype=torch.bfloat16)])
    before = module_bytes(model)
    quantize(model, kind, CPU)
    weights = 512 * 1024
    assert before == 2 * weights
    assert module_bytes(model) * 8 / weights == pytest.approx(bits, rel=0.02)  # and tables of a few hundred bytes
    assert statistics(model)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_quantized_weights(kind):
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(64, 128)])
    quantize(model, kind, CPU)
    model.requires_grad_(False)
    x = torch.randn(5, 64, requires_grad=True)
    with torch.no_grad():
        bias = model[0](torch.zeros(1, 64))
        weight = (model[0](torch.eye(64)) - bias).T  # what it multiplies with
    upstream = torch.randn(5, 128)
    model[0](x).backward(upstream)
    assert (x.grad - upstream @ weight).norm() / x.grad.norm() < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_train_on_it_and_leave_it_as_it_was(kind):
    family = load_family(tiny.saved("flux"), torch.float32, CPU, quantize=kind)
    model = family.components["denoiser"]
    before = prediction(family, "flux")
    chosen = select(model, [], "attention", Target("", 4))
    adapters = inject_fresh(model, "fresh", chosen, FreshOptions())
    assert torch.equal(prediction(family, "flux"), before)
    for parameter in adapters.parameters():
        nn.init.normal_(parameter, std=0.1)
    assert not torch.equal(prediction(family, "flux"), before)
    eject(model, "fresh")
    assert torch.equal(prediction(family, "flux"), before)


@pytest.mark.parametrize(("name", "algorithm"), [("dora", "lora"), ("oft", "oft"), ("ia3", "ia3"), ("glora", "glora")])
def test_what_needs_the_base_weight_says_why_it_cannot(name, algorithm):
    model = load_family(tiny.saved("flux"), torch.float32, CPU, quantize="nf4").components["denoiser"]
    chosen = select(model, [], "attention", Target("", 4, algorithm=algorithm))
    reason = f"layer '.*to_q': '{name}' depends on the base weight, which a Linear4bit does not keep as it is"
    with pytest.raises(ConfigError, match=reason):
        inject_fresh(model, "fresh", chosen, FreshOptions(dora=name == "dora"))


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_foreseen(kind):
    family, plain = (load_family(tiny.saved("flux"), torch.float32, CPU, quantize=q) for q in (kind, "no"))
    side = tiny.side("flux")
    with torch.no_grad():
        latents = family.encode_image(torch.zeros(2, 3, side, side))
        text = family.encode_prompt(["a red cat"] * 2)
    chosen = {"denoiser": select(family.components["denoiser"], [], "attention", Target("", 4))}
    step = Step(chosen, FreshOptions(), LossOptions(), {"latents": latents, "text": text}, "adamw")
    found, usual = estimate(family, step), estimate(plain, step)
    assert found.weights == weight_bytes(family)
    assert found.weights["denoiser"] < usual.weights["denoiser"]
    assert found.activations == usual.activations
    assert any(map(is_quantized, family.components["denoiser"].modules()))  # it is still what it was
    bare = weightless_module(family.components["denoiser"])
    assert all(parameter.is_meta for parameter in bare.parameters())
    assert set(block_layers(bare)) == set(block_layers(plain.components["denoiser"]))


def test_nf4_that_is_read_by_wrong_scales_is_refused(monkeypatch):
    monkeypatch.setattr(quantized, "is_misread", lambda width: width == 24)
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(64, 24), nn.Linear(24, 64), nn.Linear(24, 8)])})
    with pytest.raises(ModelError, match=r"layers of 24 inputs by wrong scales \(blocks.1, and 1 more\): take int8"):
        quantize(model, "nf4", CPU)
    assert not any(map(is_quantized, model.modules()))
    quantize(model, "int8", CPU)
    assert all(map(is_quantized, model["blocks"]))


def test_a_base_that_would_be_misread_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(quantized, "is_misread", lambda width: True)
    base = tiny.saved("flux")
    with pytest.raises(ModelError, match=rf"^base {base} cannot be loaded: nf4: on this CPU"):
        load_family(base, torch.float32, CPU, quantize="nf4")


def test_misreading_is_measured(monkeypatch):
    measure = is_misread.__wrapped__
    assert not measure(64)
    real = bitsandbytes.functional.dequantize_4bit

    def by_wrong_scales(packed, state):
        state.absmax = state.absmax.roll(1)
        return real(packed, state)

    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", by_wrong_scales)
    assert measure(64)


def test_a_missing_library_is_told_before_anything_is_loaded(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "bitsandbytes":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.delitem(sys.modules, "bitsandbytes")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"quantize = nf4 needs the package 'bitsandbytes': .*\[quantize\]"):
        load_family("/nowhere", torch.float32, CPU, quantize="nf4")
