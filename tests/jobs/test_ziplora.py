"""ZipLoRA on a tiny base: the merged adapter comes nearer to what each predicts alone; what it refuses."""

from __future__ import annotations

import pytest
import torch

import vislora
from tests import tiny
from tests.jobs.test_generate import adapters  # noqa: F401
from vislora import formats
from vislora.errors import AdapterMismatchError, ConfigError
from vislora.models.base import load_family

torch.set_num_threads(1)
PROMPTS = {"sd-a": ["a red cat", "the house"], "sd-b": ["a blue dog", "an ink tree"]}


def zipped(adapters, path, **changes):  # noqa: F811
    pair = [f"{adapters}/sd-a.safetensors", f"{adapters}/sd-b.safetensors"]
    settings = {"method": "ziplora", "learn_on": str(tiny.saved("sd")), "prompts": PROMPTS, "steps": 25}
    return vislora.merge(pair, path, **{**settings, **changes})


def distances(path, adapters):  # noqa: F811
    """Return how far an adapter's predictions are from those of each of the two alone, on its own prompts."""
    found = []
    family = load_family(tiny.saved("sd"), torch.float32, torch.device("cpu"))
    for name, prompts in PROMPTS.items():
        pipe = tiny.PIPELINES["sd"]()
        text = family.encode_prompt(prompts)["prompt_embeds"].detach()
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        made = []
        for file in (path, adapters / f"{name}.safetensors"):
            vislora.load(pipe, file, vislora.Strength(1.0, components={"te": 0}), name="it")
            with torch.no_grad():
                made.append(pipe.unet(x, torch.tensor([300, 700]), text).sample)
            vislora.eject(pipe)
        found.append(float((made[0] - made[1]).square().mean()))
    return sum(found)


@pytest.mark.slow
def test_the_whole_comes_nearer_to_each_alone(tmp_path, adapters):  # noqa: F811
    report = zipped(adapters, tmp_path / "zip.safetensors")
    assert report.method == "ziplora"
    assert 0.01 < report.error < 1.0
    vislora.merge([f"{adapters}/sd-a.safetensors", f"{adapters}/sd-b.safetensors"], tmp_path / "sum.safetensors")
    assert distances(tmp_path / "zip.safetensors", adapters) < 0.8 * distances(tmp_path / "sum.safetensors", adapters)


def test_columns_are_scaled_and_nothing_else(tmp_path, adapters):  # noqa: F811
    zipped(adapters, tmp_path / "zip.safetensors", steps=2)
    one, other = (formats.load(adapters / f"sd-{letter}.safetensors") for letter in "ab")
    made = formats.load(tmp_path / "zip.safetensors")
    module = next(item for item in made.modules if item.component == "denoiser")
    downs = [adapter.find(module.path).tensors["down"].float() for adapter in (one, other)]
    factors = module.tensors["down"].flatten(2).flatten(1) / torch.cat(downs).flatten(1)
    rows = factors.split([len(down) for down in downs])
    for part in rows:
        assert torch.allclose(part, part[:1].expand_as(part), rtol=1e-3)
    assert not torch.allclose(rows[0], torch.ones_like(rows[0]), atol=1e-4)


@pytest.mark.slow
def test_learning_is_the_same_again(tmp_path, adapters):  # noqa: F811
    for name in ("one", "two"):
        zipped(adapters, tmp_path / f"{name}.safetensors", steps=3, seed=4)
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("given", "changes", "kind", "message"),
    [
        (["sd-a"], {}, ConfigError, "merges two adapters"),
        (["sd-a", "sd-b"], {"prompts": {"sd-a": ["x"]}}, ConfigError, "none for 'sd-b'"),
        (["sd-a:0.5", "sd-b"], {}, ConfigError, "give it no strength"),
        (
            ["sd-a", "sd-b"],
            {"learn_on": str(tiny.saved("sd3"))},
            AdapterMismatchError,
            "looks like an adapter for 'sd'",
        ),
    ],
)
def test_what_cannot_be_zipped(given, changes, kind, message, tmp_path, adapters):  # noqa: F811
    settings = {"method": "ziplora", "learn_on": str(tiny.saved("sd")), "prompts": PROMPTS, **changes}
    with pytest.raises(kind, match=message):
        vislora.merge(given, tmp_path / "x.safetensors", adapters=(adapters,), **settings)
    assert not (tmp_path / "x.safetensors").exists()
