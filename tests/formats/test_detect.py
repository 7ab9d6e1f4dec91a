"""Who recognises what, and that recognising needs no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from tests.formats.format_helpers import EXAMPLE_KEYS, REPOSITORY, WRITABLE, module, sd_adapter
from vislora import formats
from vislora.formats.adapter_file import AdapterFile
from vislora.formats.detect import parse_file
from vislora.formats.header import read_header
from vislora.formats.slots import kind_of, split_key
from vislora.registry import FORMATS


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_shows_keys_that_it_claims_and_no_other_does(name):
    assert name in EXAMPLE_KEYS, f"add example keys of '{name}' to EXAMPLE_KEYS in format_helpers.py"
    for key in EXAMPLE_KEYS[name]:
        assert [other for other in FORMATS if FORMATS[other].matches([key], {})] == [name], key


@pytest.mark.parametrize("written", WRITABLE)
def test_every_detector_says_no_to_every_other_formats_files(written, tmp_path):
    path = tmp_path / ("a" if FORMATS[written].container == "folder" else "a.safetensors")
    formats.save(sd_adapter(), path, written)
    parts = parse_file(path).parts
    for name in FORMATS:
        for part in parts:
            assert FORMATS[name].matches(part.header.tensors, part.header.metadata) == (name == written)


OTHERS = [
    "model.diffusion_model.out.2.weight",
    "emb_params",
    "diffusion_model.x.weight",
    "conv_in.weight",
]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("key", OTHERS)
def test_detectors_say_no_to_other_files(name, key):
    assert not FORMATS[name].matches([key], {})


KEYS = {
    "a.b.lora_down.weight": ("a.b", "down"),
    "a.b.lora_A.weight": ("a.b", "down"),
    "a.b.lora_A.default.weight": ("a.b", "down"),
    "a.b.lora_B.my_style.weight": ("a.b", "up"),
    "a.b.lora_embedding_A": ("a.b", "embedding_down"),
    "a.b.lora_embedding_B.default": ("a.b", "embedding_up"),
    "a.b.lora_magnitude_vector": ("a.b", "lora_magnitude_vector"),
    "a.b.lora_magnitude_vector.default.weight": ("a.b", "lora_magnitude_vector"),
    "a.b.lora_B.bias": ("a.b", "up_bias"),
    "a_b.alpha": ("a_b", "alpha"),
    "a_b.dora_scale": ("a_b", "dora_scale"),
    "a_b.hada_w1_a": ("a_b", "hada_w1_a"),
    "a_b.lokr_w2_b": ("a_b", "lokr_w2_b"),
    "a_b.diff_b": ("a_b", "bias"),
    "a_b.oft_blocks.2": ("a_b", "oft_blocks"),
    "a_b.b1.weight": ("a_b", "b1"),
    "a_b.lora.down.weight2": None,
    "": None,
}


@pytest.mark.parametrize("key", KEYS)
def test_keys_are_split_at_the_longest_known_slot(key):
    assert split_key(key) == KEYS[key]


def test_kinds():
    assert kind_of({"down", "up", "alpha", "dora_scale"}) == "lora"
    assert kind_of({"hada_w1_a", "alpha"}) == "loha"
    assert kind_of({"bias"}) == "full"
    assert kind_of({"down", "hada_w1_a"}) == "unknown"
    assert kind_of({"alpha"}) == "unknown"


def test_sdxl_is_not_taken_for_sd(tmp_path):
    deep = module("down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_k")
    formats.save(AdapterFile(modules=[deep], family=None), tmp_path / "a.safetensors", "diffusers")
    assert formats.load(tmp_path / "a.safetensors").family == "sdxl"


def test_text_encoders_alone_leave_the_family_open_unless_metadata_tells(tmp_path):
    half = {"lora_down.weight": torch.ones(2, 4), "lora_up.weight": torch.ones(4, 2)}
    tensors = {f"lora_te2_text_model_encoder_layers_0_mlp_fc1.{end}": tensor for end, tensor in half.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    assert parse_file(tmp_path / "a.safetensors").family is None
    save_file(tensors, tmp_path / "a.safetensors", {"ss_base_model_version": "sd3_medium"})
    assert parse_file(tmp_path / "a.safetensors").family == "sd3"


def test_parsing_needs_neither_torch_nor_numpy(tmp_path):
    formats.save(sd_adapter(), tmp_path / "a", "peft")
    formats.save(sd_adapter(), tmp_path / "a.safetensors", "kohya")
    code = (
        "import sys\n"
        "import vislora.formats\n"
        "from vislora.formats.detect import parse_file\n"
        "from vislora.formats.checks import problems\n"
        "for path in sys.argv[1:]:\n"
        "    assert parse_file(path).modules and not problems(parse_file(path).modules)\n"
        "print([name for name in ('torch', 'numpy', 'safetensors', 'diffusers') if name in sys.modules])\n"
    )
    paths = [str(tmp_path / "a"), str(tmp_path / "a.safetensors")]
    done = subprocess.run(
        [sys.executable, "-c", code, *paths], capture_output=True, text=True, cwd=REPOSITORY, check=True
    )
    assert done.stdout.strip() == "[]"


def test_headers_report_what_is_there(tmp_path):
    save_file({"a": torch.ones(2, 3, dtype=torch.bfloat16)}, tmp_path / "a.safetensors", {"k": "v"})
    header = read_header(tmp_path / "a.safetensors")
    assert (header.tensors["a"].dtype, header.tensors["a"].shape, header.metadata) == ("BF16", (2, 3), {"k": "v"})
