"""An adapter of ours, saved in diffusers' format, in diffusers' own loader."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tests.jobs.train_helpers import trained
from vislora import load
from vislora.errors import ConfigError

torch.set_num_threads(1)


def latents(pipeline):
    """Return what the pipeline makes of one prompt before the VAE."""
    pipeline.set_progress_bar_config(disable=True)
    draw = torch.Generator().manual_seed(0)
    how = {"num_inference_steps": 2, "guidance_scale": 1.0, "width": 16, "height": 16, "output_type": "latent"}
    with torch.no_grad():
        return pipeline("a red cat", generator=draw, **how).images


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux", "lumina2", "auraflow"])
def test_diffusers_loads_it_and_makes_our_image(family, tmp_path):
    value, _ = trained(tmp_path, family, format="diffusers", data__resolution=16, optimizer__learning_rate=0.05)
    ours, theirs = tiny.PIPELINES[family](), tiny.PIPELINES[family]()
    plain = latents(ours)
    load(ours, value.path)
    theirs.load_lora_weights(str(value.path))
    made = latents(ours)
    assert (made - plain).abs().max() > 1e-3
    assert (made - latents(theirs)).abs().max() < 1e-4


def test_text_encoders_that_no_file_has_a_place_for_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no program reads adapters for the text encoder of 'lumina2'"):
        trained(tmp_path, "lumina2", format="diffusers", data__resolution=16, adapter__text_encoders=True)
