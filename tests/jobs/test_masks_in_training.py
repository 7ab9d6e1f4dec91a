"""What a mask leaves out has no say in training."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.jobs.train_helpers import notes, trained
from vislora.errors import ConfigError, DataError
from vislora.records import Progress
from vislora.training.loss import mean_of


def masks_of(root, count=4, colour=255):
    (root / "masks").mkdir(exist_ok=True)
    for number in range(count):
        mask = Image.new("L", (24, 24))
        mask.paste(colour, (0, 0, 24, 8))
        mask.save(root / "masks" / f"{number}.png")
    return root / "masks"


def test_the_mean_is_of_what_the_mask_keeps():
    error = torch.arange(2 * 3 * 4.0).reshape(2, 3, 2, 2)
    mask = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]], [[[0.5, 0.5], [0.0, 0.0]]]])
    kept = [error[0, :, 0, 0].mean(), error[1, :, 0].mean()]
    assert torch.allclose(mean_of(error, mask), torch.stack(kept))
    assert torch.allclose(mean_of(error, torch.full_like(mask, 0.3)), mean_of(error, None))
    assert torch.allclose(mean_of(error[:, :, None], mask), mean_of(error, mask))


@pytest.mark.quick("sd", "flux")
@pytest.mark.parametrize("family", ["sd", "sdxl", "flux", "qwen-image", "sana"])
def test_every_family_learns_in_part(family, tmp_path):
    masks = masks_of(tmp_path, 2)
    whole, _ = trained(tmp_path, family, output=tmp_path / "whole", loop__steps=2)
    part, records = trained(tmp_path, family, data__masks=masks, loop__steps=2)
    assert "2 of 4 images have a mask" in notes(records)
    assert Progress("caching masks", 1, 1) in records  # both are the same bytes
    one, other = load_file(part.path), load_file(whole.path)
    assert set(one) == set(other)
    assert any(not torch.equal(one[key], other[key]) for key in one)  # the files' metadata differ anyway


def test_a_white_mask_changes_nothing(tmp_path):
    masks = masks_of(tmp_path)
    for path in masks.iterdir():
        Image.new("L", (24, 24), 255).save(path)
    whole, _ = trained(tmp_path, output=tmp_path / "whole")
    white, _ = trained(tmp_path, data__masks=masks)
    one, other = load_file(whole.path), load_file(white.path)
    assert all(torch.allclose(one[key], other[key], atol=1e-5) for key in one)


def test_a_changed_mask_is_refused_on_resume(tmp_path):
    masks = masks_of(tmp_path)
    trained(tmp_path, data__masks=masks, loop__steps=2)
    masks_of(tmp_path, colour=128)
    with pytest.raises(ConfigError, match=r"mask 0\.png was changed"):
        trained(tmp_path, data__masks=masks, loop__steps=4, resume=True)


def test_a_black_mask_is_told_before_the_first_step(tmp_path):
    with pytest.raises(DataError, match="black wherever"):
        trained(tmp_path, data__masks=masks_of(tmp_path, colour=0))
    assert not (tmp_path / "run" / "config.toml").exists()
