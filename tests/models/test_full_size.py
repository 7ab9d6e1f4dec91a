"""Released models at full size, on the meta device: parameters, layers by preset, and a name for every layer.

The configurations are written from diffusers' defaults and what the models' cards say; the numbers of parameters, which
were published, tell that they are right.
"""

from __future__ import annotations

from functools import cache

import diffusers
import pytest
import torch

from tests.formats.test_names import REFINER, SDXL
from vislora.inject.targets import Target, select
from vislora.registry import FORMATS

_SD = {"block_out_channels": (320, 640, 1280, 1280), "sample_size": 64}
_SD3 = {"sample_size": 128, "patch_size": 2, "attention_head_dim": 64, "pooled_projection_dim": 2048}
CONFIGS = {
    "sd15": ("sd", "UNet2DConditionModel", {**_SD, "cross_attention_dim": 768, "attention_head_dim": 8}),
    "sd21": (
        "sd",
        "UNet2DConditionModel",
        {**_SD, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    ),
    "sdxl": (
        "sdxl",
        "UNet2DConditionModel",
        {**SDXL, "sample_size": 128},
    ),
    "sdxl-refiner": (
        "sdxl-refiner",
        "UNet2DConditionModel",
        {**REFINER, "sample_size": 128},
    ),
    "sd3": (
        "sd3",
        "SD3Transformer2DModel",
        {
            **_SD3,
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 192,
        },
    ),
    "sd35-large": (
        "sd3",
        "SD3Transformer2DModel",
        {
            **_SD3,
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
    ),
    "flux-dev": ("flux", "FluxTransformer2DModel", {"guidance_embeds": True}),
}
# parameters in all, and layers of the presets attention, attention-ff (with a UNet's projections) and all
WANTED = {
    "sd15": (859_520_964, 16 * 8, 16 * 12, 278),
    "sd21": (865_910_724, 16 * 8, 16 * 12, 278),
    "sdxl": (2_567_463_684, 70 * 8, 70 * 10 + 22, 788),
    "sdxl-refiner": (2_259_526_660, 44 * 8, 44 * 10 + 22, 548),
    "sd3": (2_028_328_000, 24 * 8 - 1, 24 * 12 - 3, 333),
    "sd35-large": (8_056_627_520, 38 * 8 - 1, 38 * 12 - 3, 529),
    "flux-dev": (11_901_408_320, 19 * 8 + 38 * 3, 19 * 12 + 38 * 5, 494),
}


@cache
def built(name):
    _, kind, config = CONFIGS[name]
    with torch.device("meta"):
        return getattr(diffusers, kind)(in_channels=_channels(kind), **config, **_outputs(kind))


def _channels(kind):
    return {"UNet2DConditionModel": 4, "SD3Transformer2DModel": 16}.get(kind, 64)


def _outputs(kind):
    return {"out_channels": _channels(kind)} if kind != "FluxTransformer2DModel" else {}


def require_presets_and_names(model, family, wanted):
    """Assert the number of parameters, the layers of three presets, and a name for each in four formats."""
    parameters, *counts = wanted
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    for preset, count in zip(("attention", "attention-ff", "all"), counts, strict=True):
        chosen = select(model, [], preset, Target("", 8))
        assert len(chosen) == count, preset
        for form in ("kohya", "diffusers", "comfy", "peft"):
            nameless = [path for path in chosen if FORMATS[form].place("denoiser", path, family) is None]
            assert nameless == [], form


@pytest.mark.parametrize("name", CONFIGS)
def test_presets_choose_what_they_say_and_every_layer_has_a_name(name):
    require_presets_and_names(built(name), CONFIGS[name][0], WANTED[name])
