"""Folders of every kind that PEFT has for vision models: what PEFT merges, ours and PEFT's own, against our deltas."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftModel
from torch import Tensor, nn

from tests import tiny
from tests.formats.format_helpers import fixture, module
from tests.layers import drawn
from vislora import formats
from vislora.algebra.compare import compare
from vislora.errors import AdapterFileError
from vislora.formats import AdapterFile, AdapterModule
from vislora.formats.peft_writing import factorization
from vislora.registry import ALGORITHMS

LINEARS = r"mid_block\..*(attn1\.to_q|attn1\.to_out\.0|ff\.net\.2)"
LAYERS = r"mid_block\..*(attn1\.to_q|attn1\.to_out\.0|ff\.net\.2|conv1|proj_in|time_emb_proj)"
BIASED = r"mid_block\..*(conv1|proj_in|ff\.net\.2)"
RANKS = {"rank_pattern": {"conv1": 2, "to_q": 3}, "alpha_pattern": {"proj_in": 5, "to_q": 1}}
CONFIGS = {
    "lora": LoraConfig(r=4, lora_alpha=6, target_modules=LAYERS, **RANKS),
    "lora-rank-stabilised": LoraConfig(r=4, lora_alpha=6, target_modules=LAYERS, use_rslora=True, **RANKS),
    "lora-bias": LoraConfig(r=4, lora_alpha=8, target_modules=BIASED, lora_bias=True, **RANKS),
    "dora": LoraConfig(r=4, lora_alpha=6, target_modules=LAYERS, use_dora=True),
    "loha": LoHaConfig(r=4, alpha=6, target_modules=LAYERS, **RANKS),
    "loha-tucker": LoHaConfig(r=4, alpha=6, target_modules=LAYERS, use_effective_conv2d=True, **RANKS),
    "lokr": LoKrConfig(r=2, alpha=3, target_modules=LAYERS, decompose_factor=2, **RANKS),
    "lokr-both": LoKrConfig(r=1, alpha=3, target_modules=LAYERS, decompose_both=True),
    "lokr-tucker": LoKrConfig(r=1, alpha=3, target_modules=LAYERS, use_effective_conv2d=True),
    "lokr-full": LoKrConfig(r=64, alpha=16, target_modules=LAYERS),
    "oft": OFTConfig(r=0, oft_block_size=4, target_modules=LAYERS),
    "oft-exact": OFTConfig(r=2, oft_block_size=0, target_modules=LAYERS, use_cayley_neumann=False),
    "oft-shared": OFTConfig(r=0, oft_block_size=4, target_modules=LAYERS, block_share=True, num_cayley_neumann_terms=3),
    "oft-limited": OFTConfig(r=0, oft_block_size=4, target_modules=LINEARS, coft=True, eps=0.05),
    "oft-long": OFTConfig(r=0, oft_block_size=2, target_modules=LINEARS, num_cayley_neumann_terms=7),
    "oft-short": OFTConfig(r=0, oft_block_size=2, target_modules=LINEARS, num_cayley_neumann_terms=2),
}

# PEFT takes its own biases for shards of something larger
pytestmark = pytest.mark.filterwarnings("ignore:Adapter 'default'")


class Middle(nn.Module):
    """The middle of a real UNet: linears and convs under their real paths."""

    def __init__(self) -> None:
        super().__init__()
        self.mid_block = tiny.model("unet").mid_block


def merged(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().double() for name, tensor in model.merge_and_unload().state_dict().items()}


def assert_changes_are_ours(adapter: AdapterFile, before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Assert that `after` is `before` plus our deltas, and differs nowhere else."""
    expected = {name: tensor.double() for name, tensor in before.items()}
    for item in adapter.modules:
        expected[f"{item.path}.weight"] = expected[f"{item.path}.weight"] + adapter.delta(
            item, before[f"{item.path}.weight"]
        )
        bias = adapter.bias_delta(item)
        if bias is not None:
            expected[f"{item.path}.bias"] = expected[f"{item.path}.bias"] + bias
    assert expected.keys() == after.keys()
    for name, tensor in after.items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=1e-5, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}"
        )
    changed = [name for name in after if not torch.equal(after[name], before[name].double())]
    assert len(changed) >= len(adapter.modules)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a function: label -> the folder that PEFT saves, its numbers random; all weights before and after it."""
    made: dict[str, tuple] = {}

    def save(label: str):
        if label not in made:
            model = Middle()
            before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            torch.manual_seed(3)
            wrapped = peft.get_peft_model(model, CONFIGS[label])
            for name, parameter in wrapped.named_parameters():
                if parameter.requires_grad:
                    noise = 0.2 * torch.randn_like(parameter)
                    parameter.data = parameter.data.abs() + noise.abs() if "magnitude" in name else noise
            folder = tmp_path_factory.mktemp(label)
            wrapped.save_pretrained(folder)
            made[label] = folder, before, merged(wrapped)
        return made[label]

    return save


@pytest.mark.parametrize("label", CONFIGS)
def test_peft_saves_we_read_and_write_and_peft_loads(label, saved, tmp_path):
    folder, before, after = saved(label)
    adapter = formats.load(folder)
    assert not adapter.extras
    assert_changes_are_ours(adapter, before, after)
    formats.save(adapter, tmp_path / "a", "peft")
    assert compare(adapter, formats.load(tmp_path / "a")).exact
    assert_changes_are_ours(adapter, before, merged(PeftModel.from_pretrained(Middle(), tmp_path / "a")))


@pytest.mark.parametrize(
    "label", ["lora", "lora-bias", "dora", "loha", "loha-tucker", "lokr", "lokr-both", "lokr-full"]
)
def test_the_kinds_that_lycoris_has_too_go_to_kohya_files_and_back(label, saved, tmp_path):
    adapter = formats.load(saved(label)[0])
    formats.save(adapter, tmp_path / "a.safetensors", "kohya")
    read = formats.load(tmp_path / "a.safetensors")
    comparison = compare(adapter, read)
    assert comparison.ok(1e-7), comparison.problems(1e-7)[:3]
    formats.save(read, tmp_path / "b", "peft")
    assert compare(adapter, formats.load(tmp_path / "b")).ok(1e-7)
    if label == "lokr-full":  # its scale went into a factor
        peer = merged(PeftModel.from_pretrained(Middle(), tmp_path / "b"))
        assert_changes_are_ours(adapter, saved(label)[1], peer)


def test_peft_s_oft_is_not_lycoris(saved, tmp_path):
    adapter = formats.load(saved("oft")[0])
    with pytest.raises(AdapterFileError, match="with neumann_terms and oft_R, for which kohya files have no slot"):
        formats.save(adapter, tmp_path / "a.safetensors", "kohya")
    with pytest.raises(AdapterFileError, match="for which diffusers files have no slot"):
        formats.save(adapter, tmp_path / "a.safetensors", "diffusers")


@pytest.mark.parametrize("name", ["loha", "lokr"])
def test_peft_loads_lycoris_files_that_we_converted(name, tmp_path):
    adapter = formats.load(fixture(f"lycoris_tiny/{name}.safetensors"))
    formats.save(adapter, tmp_path / "a", "peft")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["peft_type"] == name.upper()
    assert config.get("decompose_factor", 4) == 4
    assert compare(adapter, formats.load(tmp_path / "a")).exact


def test_factorization_is_peft_s():
    from peft.tuners.lokr.layer import factorization as peer

    for size in (*range(1, 130), 250, 320, 360, 640, 1280, 2560, 9216, 21504):
        for factor in (-1, 1, 2, 3, 4, 7, 8, 12, 16, 100, 5000):
            assert factorization(size, factor) == peer(size, factor), (size, factor)


def mixed(*modules: AdapterModule) -> AdapterFile:
    return AdapterFile(modules=list(modules), family="sd")


def of_kind(kind: str, path: str, layer: nn.Module, rank: int = 2, **more) -> AdapterModule:
    slots = drawn(layer, ALGORITHMS[kind], rank)
    return AdapterModule(component="denoiser", path=path, algo=kind, tensors=slots, **more)


TO_Q, TO_K, TO_V = (f"mid_block.attentions.0.transformer_blocks.0.attn1.to_{letter}" for letter in "qkv")
REFUSED = {
    "two kinds": (
        mixed(of_kind("loha", TO_Q, nn.Linear(16, 16)), of_kind("loha", TO_K, nn.Linear(16, 16)), module(TO_V)),
        "1 modules of kind lora among others of kind loha",
    ),
    "a bias on some": (mixed(module(TO_Q, bias=torch.ones(24)), module(TO_K)), "1 modules without a bias"),
    "a bias and no scale": (mixed(module(TO_Q, bias=torch.ones(24), alpha=0.0)), "with a bias and the scale 0"),
    "only a bias": (
        mixed(AdapterModule(component="denoiser", path=TO_Q, algo="full", tensors={}, bias=torch.ones(4))),
        "1 modules with a bias and nothing else",
    ),
    "a bias on a product": (
        mixed(of_kind("loha", TO_Q, nn.Linear(16, 16), bias=torch.ones(16))),
        "kind loha with a bias: PEFT has no such",
    ),
    "no factor": (
        mixed(
            AdapterModule(
                component="denoiser",
                path=TO_Q,
                algo="lokr",
                tensors={"lokr_w1": torch.ones(8, 2), "lokr_w2": torch.ones(2, 8)},
            )
        ),
        "no decompose_factor of PEFT splits",
    ),
    "no block size": (
        mixed(*(of_kind("oft_peft", path, nn.Linear(width, 8), 4) for path, width in ((TO_Q, 16), (TO_K, 18)))),
        "blocks of different sizes",
    ),
    "another kind": (mixed(of_kind("glora", TO_Q, nn.Linear(16, 16))), "a1 and a2 and b1 and b2, for which peft"),
}


@pytest.mark.parametrize("label", REFUSED)
def test_what_one_config_cannot_say_is_refused(label, tmp_path):
    adapter, message = REFUSED[label]
    with pytest.raises(AdapterFileError, match=message):
        formats.save(adapter, tmp_path / "a", "peft")
    assert not (tmp_path / "a").exists()
