from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.formats.format_helpers import module, sd_adapter
from vislora import formats
from vislora.algebra.compare import compare
from vislora.config.convert import ConvertConfig
from vislora.errors import AdapterFileError, ConfigError, VisloraError
from vislora.formats.adapter_file import AdapterFile
from vislora.jobs import proof
from vislora.jobs.convert import convert, run
from vislora.records import Done, Note

PLACES = {"kohya": "out.safetensors", "diffusers": "out.safetensors", "peft": "out", "comfy": "out.safetensors"}


@pytest.fixture
def source(tmp_path):
    formats.save(sd_adapter(), tmp_path / "source.safetensors", "kohya")
    return tmp_path / "source.safetensors"


@pytest.mark.parametrize("to", PLACES)
def test_a_conversion_is_proven(to, source, tmp_path):
    report = convert(source, tmp_path / PLACES[to], to, report=tmp_path / "report.json")
    assert report.ok
    assert report.verdict == "proven: 9 of 9 modules equal (max difference 0)"
    assert compare(sd_adapter(), formats.load(tmp_path / PLACES[to])).exact
    written = json.loads((tmp_path / "report.json").read_text())
    assert (written["ok"], written["proven"], len(written["differences"])) == (True, 9, 9)
    assert sorted(item.name for item in tmp_path.iterdir()) == sorted({"source.safetensors", PLACES[to], "report.json"})


def test_the_job_ends_with_the_report_and_the_exit_code(source, tmp_path):
    config = ConvertConfig(source=source, destination=tmp_path / "a.safetensors", to="diffusers")
    *_, last = run(config)
    assert isinstance(last, Done)
    assert last.exit_code == 0
    assert last.summary == last.value.verdict


def test_what_cannot_be_kept_is_told_and_nothing_is_written(tmp_path):
    adapter = sd_adapter()
    adapter.modules.append(module("conv_out", shape=(8, 4, 3, 3), tucker=True))
    formats.save(adapter, tmp_path / "a.safetensors", "kohya")
    tensors = load_file(tmp_path / "a.safetensors")
    save_file(
        {**tensors, "_aux.x": torch.ones(1), "bundle_emb.cat.clip_l": torch.ones(2, 8)}, tmp_path / "b.safetensors"
    )
    records = list(run(ConvertConfig(source=tmp_path / "b.safetensors", destination=tmp_path / "c", to="peft")))
    lines = [item.text for item in records if isinstance(item, Note)]
    assert any(
        "1 modules with mid, for which peft files have no slot; convert it to plain LoRA (--as lora) (first: " in line
        for line in lines
    )
    assert any("1 embeddings, which have no place" in line for line in lines)
    assert any("1 tensors that belong to no module (first: _aux.x)" in line for line in lines)
    assert records[-1].exit_code == 1
    assert not (tmp_path / "c").exists()
    report = convert(tmp_path / "b.safetensors", tmp_path / "c", "peft", allow_loss=True)
    assert report.written
    assert not report.ok
    assert len(report.lost) == 3
    assert "3 loss(es), as allowed" in report.verdict
    assert compare(adapter, formats.load(tmp_path / "c")).ok(1e-6)


def test_kinds_that_a_format_cannot_hold_are_named(tmp_path):
    glora = {f"lora_unet_conv_out.{name}.weight": torch.ones(4, 4) for name in ("a1", "a2", "b1", "b2")}
    other = {"lora_unet_mid_block_resnets_0_conv1.set_weight": torch.ones(4, 4, 3, 3)}
    unknown = {"lora_unet_mid_block_resnets_0_conv1.reshape_weight": torch.tensor([4, 8])}
    formats.save(sd_adapter(), tmp_path / "a.safetensors", "kohya")
    save_file({**load_file(tmp_path / "a.safetensors"), **glora}, tmp_path / "b.safetensors")
    report = convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "diffusers")
    slots = "a1 and a2 and b1 and b2"
    line = f"1 modules with {slots}, for which diffusers files have no slot (first: denoiser: conv_out)"
    assert report.lost == [line]
    assert convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kohya").ok
    formats.save(sd_adapter(), tmp_path / "a.safetensors", "kohya")
    tensors = load_file(tmp_path / "a.safetensors")
    kept = {key: tensor for key, tensor in tensors.items() if "resnets_0_conv1" not in key}
    save_file({**kept, **other}, tmp_path / "d.safetensors")
    report = convert(tmp_path / "d.safetensors", tmp_path / "e.safetensors", "kohya")
    where = "(first: denoiser: mid_block.resnets.0.conv1)"
    assert report.lost == [f"1 modules with set_weight, for which kohya files have no slot {where}"]
    assert convert(tmp_path / "d.safetensors", tmp_path / "e.safetensors", "comfy").ok
    save_file({**kept, **unknown}, tmp_path / "f.safetensors")
    report = convert(tmp_path / "f.safetensors", tmp_path / "g.safetensors", "kohya")
    assert report.lost == [f"not supported yet: 1 modules of kind reshape {where}"]


def test_a_mismatch_is_never_written(source, tmp_path, monkeypatch):
    real = proof.write

    def tampered(packed, path):
        packed[0].tensors["unet.conv_in.lora_B.weight"] = packed[0].tensors["unet.conv_in.lora_B.weight"] + 1e-3
        real(packed, path)

    monkeypatch.setattr(proof, "write", tampered)
    (tmp_path / "a.safetensors").write_bytes(b"precious")
    report = convert(source, tmp_path / "a.safetensors", "diffusers", overwrite=True)
    assert not report.written
    assert "denoiser: conv_in: differs by" in report.problems[0]
    assert (tmp_path / "a.safetensors").read_bytes() == b"precious"
    assert len(list(tmp_path.iterdir())) == 2


def test_places(source, tmp_path):
    with pytest.raises(ConfigError, match="the source itself"):
        convert(source, source, "kohya", overwrite=True)
    (tmp_path / "taken.safetensors").write_bytes(b"precious")
    with pytest.raises(ConfigError, match="set overwrite"):
        convert(source, tmp_path / "taken.safetensors", "kohya")
    with pytest.raises(VisloraError, match=r"named \*\.safetensors"):
        convert(source, tmp_path / "a.pt", "kohya")
    with pytest.raises(VisloraError, match="a peft adapter is a folder"):
        convert(source, tmp_path / "a.safetensors", "peft")
    with pytest.raises(ConfigError, match="allow_loss"):
        convert(source, tmp_path / "a.safetensors", "kohya", allow_los=True)
    with pytest.raises(ConfigError, match="to: "):
        convert(source, tmp_path / "a.safetensors", "koya")
    with pytest.raises(AdapterFileError, match="no such file"):
        convert(tmp_path / "missing.safetensors", tmp_path / "a.safetensors", "kohya")


def test_family_can_be_named_when_the_file_does_not_tell(tmp_path):
    adapter = AdapterFile(modules=[module("text_model.encoder.layers.0.mlp.fc1", "te:clip_l")])
    formats.save(adapter, tmp_path / "a.safetensors", "diffusers")
    refused = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya")
    assert "unknown family" in refused.lost[0]
    assert convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya", family="sd").ok
