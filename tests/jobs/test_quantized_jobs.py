"""`train` and `generate` with a base in 8 or 4 bits."""

from __future__ import annotations

import pytest
from PIL import Image
from safetensors.torch import load_file

from tests import tiny
from tests.jobs.train_helpers import config, notes, trained
from vislora.errors import ConfigError
from vislora.jobs.generate import generate
from vislora.jobs.train import run

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.usefixtures("narrow_nf4")


@pytest.mark.quick("sd-nf4", "flux-int8")
@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("family", ["sd", "flux"])
def test_an_adapter_is_trained_and_used(tmp_path, family, kind):
    made, records = trained(tmp_path, family, quantize=kind, sample={"every": 4}, loop__gradient_checkpointing=True)
    assert any(tensor.any() for name, tensor in load_file(made.path).items() if "lora_up" in name)
    assert "denoiser" in notes(records)
    settings = {"base": str(tiny.saved(family)), "prompt": ("a red cat",), "steps": 2, "device": "cpu"}
    adapter = {"adapter": (f"{made.path}:1.0",), "output": tmp_path / "out"}
    one = generate(**settings, **adapter, quantize=kind)[0]
    plain = generate(**settings, **adapter)[0]
    again = generate(like=one.path, output=tmp_path / "out", device="cpu")[0]
    assert one.recipe.quantize == again.recipe.quantize == kind
    assert pixels(again) == pixels(one)
    assert pixels(plain) != pixels(one)


def pixels(picture) -> bytes:
    with Image.open(picture.path) as image:
        return image.tobytes()


def test_a_resumed_run_is_the_same_run(tmp_path):
    whole, _ = trained(tmp_path, "flux", quantize="nf4")
    part = {"output": tmp_path / "part", "name": "run", "quantize": "nf4", "loop__save_every": 2}
    records = run(config(tmp_path, "flux", **part))
    for record in records:
        if "training" in str(record) and getattr(record, "done", 0) == 3:
            records.close()
    resumed, told = trained(tmp_path, "flux", **part, resume=True)
    assert "going on from step 2" in notes(told)
    assert load_file(whole.path).keys() == load_file(resumed.path).keys()
    assert all((tensor == load_file(resumed.path)[name]).all() for name, tensor in load_file(whole.path).items())


def test_a_run_does_not_go_on_in_other_bits(tmp_path):
    trained(tmp_path, "flux", quantize="nf4")
    with pytest.raises(ConfigError, match="quantize"):
        trained(tmp_path, "flux", quantize="int8", resume=True)
