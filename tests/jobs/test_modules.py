"""Adapters on a module of one's own, as docs/families.md shows it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import vislora
from tests import tiny
from vislora.errors import ConfigError

torch.set_num_threads(1)
PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"


class WithLayout(nn.Module):
    """An SD3 transformer that is told a layout (batch, 4): an MLP turns it into one more token of the text."""

    def __init__(self):
        super().__init__()
        self.transformer = tiny.sd3_transformer()
        self.layout_mlp = tiny.seeded(lambda: nn.Sequential(nn.Linear(4, 24), nn.SiLU(), nn.Linear(24, 32)), 0)

    def forward(self, layout):
        inputs = tiny.sd3_inputs()
        text = torch.cat([inputs["encoder_hidden_states"], self.layout_mlp(layout)[:, None]], 1)
        return self.transformer(**{**inputs, "encoder_hidden_states": text})[0]


LAYOUT = torch.tensor([[0.1, 0.2, 0.5, 0.6], [0.3, 0.3, 0.9, 0.8]])


def train(model, optimizer):
    goal = torch.zeros(2, 4, 8, 8)
    for _ in range(8):
        optimizer.zero_grad()
        (model(LAYOUT) - goal).square().mean().backward()
        optimizer.step()


def test_the_page_does_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = WithLayout()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain, seen = model(LAYOUT).detach(), {}
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len([line for line in block.splitlines() if line.strip()]) == 5

    def trained(model, optimizer):
        train(model, optimizer)
        seen["out"] = model(LAYOUT).detach()

    exec(compile(block, "families.md", "exec"), {"vislora": vislora, "torch": torch, "model": model, "train": trained})
    assert (seen["out"] - plain).abs().max() > 1e-4
    assert torch.equal(model(LAYOUT), plain)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert vislora.load(model, "layout-adapter") == []
    assert (model(LAYOUT) - seen["out"]).abs().max() < 1e-5
    vislora.set_strengths(model, {"layout-adapter": 0.0})
    assert torch.equal(model(LAYOUT), plain)


def test_peft_reads_it(tmp_path):
    from peft import PeftModel

    model = WithLayout()
    adapters = vislora.adapt(model, ["layout_mlp.*", "transformer.*.attn.to_q"], rank=2, alpha=6.0)
    train(model, torch.optim.AdamW(adapters.parameters(), lr=1e-2))
    out = model(LAYOUT).detach()
    vislora.save_adapter(adapters, tmp_path / "adapter")
    vislora.eject(model)
    theirs = PeftModel.from_pretrained(WithLayout(), tmp_path / "adapter")
    assert (theirs(LAYOUT) - out).abs().max() < 1e-5


def test_presets_and_mistakes():
    model = WithLayout()
    adapters = vislora.adapt(model, "attention", rank=2)
    assert {parameter.shape[0] for name, parameter in adapters.named_parameters() if name.endswith(":down")} == {2}
    with pytest.raises(ConfigError, match="is loaded already"):
        vislora.adapt(model, "attention")
    vislora.eject(model)
    with pytest.raises(ConfigError, match=r"'layout_mlpp\.\*' matches no layer; near misses"):
        vislora.adapt(model, "layout_mlpp.*")
