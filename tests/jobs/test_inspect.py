from __future__ import annotations

import json
import subprocess
import sys

import torch
from safetensors.torch import save_file

from tests.formats.format_helpers import REPOSITORY, sd_adapter
from vislora import formats
from vislora.config.inspect import InspectConfig
from vislora.jobs.inspect import inspect, run


def test_a_summary_has_the_counts(tmp_path):
    formats.save(sd_adapter(), tmp_path / "a.safetensors", "kohya")
    summary = inspect(tmp_path / "a.safetensors")
    assert (summary.format, summary.family) == ("kohya", "sd")
    assert summary.components == {"denoiser": 7, "te:clip_l": 2}
    assert summary.kinds == {"lora": 9}
    assert summary.ranks == {"3": 4, "2": 3, "4": 2}
    assert sum(summary.alphas.values()) == 9
    assert summary.size == (tmp_path / "a.safetensors").stat().st_size
    slots = [tensor.numel() for item in sd_adapter().modules for tensor in item.tensors.values()]
    assert summary.parameters == sum(slots) + 9  # and the alphas
    assert "conv_in" in [item["path"] for item in summary.modules]
    assert summary.problems == []


def test_the_table_and_the_json(tmp_path):
    formats.save(sd_adapter(), tmp_path / "a", "peft")
    *_, table = run(InspectConfig(path=tmp_path / "a"))
    assert "denoiser: 7, te:clip_l: 2" in table.summary
    assert "note: kept" in table.summary
    *_, data = run(InspectConfig(path=tmp_path / "a", json=True))
    assert len(json.loads(data.summary)["modules"]) == 9


def test_damage_and_other_things_are_named(tmp_path):
    save_file({"lora_unet_conv_in.lora_up.weight": torch.ones(4, 2)}, tmp_path / "a.safetensors")
    *_, done = run(InspectConfig(path=tmp_path / "a.safetensors"))
    assert done.exit_code == 1
    assert "lacks down" in done.summary
    save_file({"first_stage_model.encoder.conv_in.weight": torch.ones(4, 2)}, tmp_path / "b.safetensors")
    *_, done = run(InspectConfig(path=tmp_path / "b.safetensors"))
    assert done.value.what == "a whole checkpoint"
    assert done.value.format is None


def test_inspecting_needs_neither_torch_nor_numpy(tmp_path):
    formats.save(sd_adapter(), tmp_path / "a.safetensors", "diffusers")
    code = (
        "import sys\nfrom vislora.config.inspect import InspectConfig\nfrom vislora.jobs.inspect import run\n"
        "*_, done = run(InspectConfig(path=sys.argv[1]))\nassert 'lora: 9' in done.summary\n"
        "print([name for name in ('torch', 'numpy', 'diffusers') if name in sys.modules])\n"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path / "a.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout.strip() == "[]"
