"""Textual inversions inside adapter files: named, kept bit for bit where the format has a place, never dropped."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.formats.format_helpers import WRITABLE, sd_adapter
from vislora import formats
from vislora.algebra.compare import compare
from vislora.errors import AdapterFileError
from vislora.formats.embeddings import bundle_key, embedding_name, is_embedding
from vislora.jobs.convert import convert
from vislora.registry import FORMATS

BUNDLES = {
    "bundle_emb.cat.string_to_param.*": ("cat", "string_to_param.*"),
    "bundle_emb.my.style.v2.string_to_param.*": ("my.style.v2", "string_to_param.*"),
    "bundle_emb.cat.emb_params": ("cat", "emb_params"),
    "bundle_emb.my.clip_l.t5": ("my.clip_l", "t5"),
    "bundle_emb.<cat>.clip_g_out": ("<cat>", "clip_g_out"),
    "bundle_emb.a.b.qwen3": ("a.b", "qwen3"),
}


@pytest.mark.parametrize("key", BUNDLES)
def test_names_are_parsed_from_the_right_and_keys_come_back(key):
    assert is_embedding(key, {})
    assert embedding_name(key) == BUNDLES[key]
    assert bundle_key(*BUNDLES[key]) == key


def test_what_is_an_embedding():
    assert is_embedding("<s1>", {})
    assert is_embedding("krk", {"krk": "<embed>"})
    assert not is_embedding("krk", {"krk": "4"})
    assert not is_embedding("bundle_emb.", {})
    assert not is_embedding("bundle_emb.cat", {})
    assert not is_embedding("lora_unet_conv_in.alpha", {})


@pytest.fixture
def bundled(tmp_path):
    formats.save(sd_adapter(), tmp_path / "plain.safetensors", "kohya")
    tensors = {key: torch.randn(3, 768).half() for key in BUNDLES}
    save_file({**load_file(tmp_path / "plain.safetensors"), **tensors}, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def test_they_pass_through_kohya_files_bit_for_bit(bundled, tmp_path):
    report = convert(bundled, tmp_path / "b.safetensors", "kohya")
    assert (report.ok, report.lost) == (True, [])
    before, after = load_file(bundled), load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in BUNDLES)
    assert len(formats.load(tmp_path / "b.safetensors").embeddings) == len({name for name, _ in BUNDLES.values()})


@pytest.mark.parametrize("name", [name for name in WRITABLE if not FORMATS[name].embeddings])
def test_other_formats_refuse_them_unless_loss_is_allowed(name, bundled, tmp_path):
    place = tmp_path / ("b" if FORMATS[name].container == "folder" else "b.safetensors")
    with pytest.raises(AdapterFileError, match=f"5 embeddings, which have no place in a {name} adapter"):
        formats.save(formats.load(bundled), place, name)
    assert not convert(bundled, place, name).written
    report = convert(bundled, place, name, allow_loss=True)
    assert report.written
    assert len(report.lost) == 1
    assert formats.load(place).embeddings == {}


def test_a_changed_or_lost_embedding_is_a_difference(bundled):
    first, second = formats.load(bundled), formats.load(bundled)
    assert compare(first, second).exact
    second.embeddings["cat"]["emb_params"] = second.embeddings["cat"]["emb_params"] + 1
    del second.embeddings["a.b"]
    assert compare(first, second).problems(1.0) == [
        "embedding: a.b: is missing in the second",
        "embedding: cat: is not the same in both",
    ]


def test_they_and_what_slider_tools_leave_are_reported(bundled, tmp_path):
    tensors = {**load_file(bundled), "_aux.x": torch.ones(1), "_aux.y": torch.ones(1), "odd": torch.ones(1)}
    save_file(tensors, tmp_path / "b.safetensors")
    read = formats.load(tmp_path / "b.safetensors")
    assert sorted(read.extras) == ["_aux.x", "_aux.y", "odd"]
    assert read.notes == [
        "it carries 5 textual inversion embeddings (first: <cat>)",
        "2 tensors are by-products of the tool that made the file and are not used (first: _aux.x)",
        "1 tensors belong to no module and are not used (first: odd)",
    ]
