"""An adapter of ours, saved in diffusers' format, in diffusers' own loader."""

from __future__ import annotations

from inspect import signature

import pytest
import torch

from tests import tiny
from tests.jobs.train_helpers import trained
from vislora import load
from vislora.errors import ConfigError
from vislora.registry import FAMILIES

torch.set_num_threads(1)


def latents(pipeline, family):
    """Return what the pipeline makes of one prompt before the VAE."""
    pipeline.set_progress_bar_config(disable=True)
    draw = torch.Generator().manual_seed(0)
    known = signature(pipeline.__call__).parameters
    always = {key: value for key, value in FAMILIES[family].card.always.items() if key in known}
    side = tiny.side(family)
    how = {"num_inference_steps": 2, "guidance_scale": 1.0, "width": side, "height": side, "output_type": "latent"}
    with torch.no_grad():
        return pipeline(prompt="a red cat", generator=draw, **how, **always).images


# not PixArt, whose pipelines have no loader, and not SDXL's refiner, which makes no picture from a prompt
@pytest.mark.quick("sd", "sdxl", "flux")
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("pixart", "sdxl-refiner")])
def test_diffusers_loads_it_and_makes_our_image(family, tmp_path):
    value, _ = trained(
        tmp_path, family, format="diffusers", data__resolution=tiny.side(family), optimizer__learning_rate=0.05
    )
    ours, theirs = tiny.PIPELINES[family](), tiny.PIPELINES[family]()
    plain = latents(ours, family)
    load(ours, value.path)
    theirs.load_lora_weights(str(value.path))
    made = latents(ours, family)
    assert (made - plain).abs().max() > 1e-3
    assert (made - latents(theirs, family)).abs().max() < 1e-4


def test_text_encoders_that_no_file_has_a_place_for_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no program reads adapters for the text encoder of 'lumina2'"):
        trained(tmp_path, "lumina2", format="diffusers", data__resolution=16, adapter__text_encoders=True)
