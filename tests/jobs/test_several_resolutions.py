"""Runs that see each image at more than one resolution."""

from __future__ import annotations

from collections import Counter

import pytest
from PIL import Image
from safetensors import safe_open

from tests import tiny
from tests.jobs.test_train_resume import same, stopped
from tests.jobs.train_helpers import config, image_folder, notes, trained
from vislora.training.loss import DenoisingLoss


@pytest.fixture
def seen(monkeypatch):
    """How often each caption was seen at each size of the latents, in training and in measuring."""
    found = {True: Counter(), False: Counter()}
    forward = DenoisingLoss.forward

    def counted(module, batch, generator):
        size = tuple(batch["latents"].shape[-2:])
        found[module.training].update((caption, size) for caption in batch["captions"])
        return forward(module, batch, generator)

    monkeypatch.setattr(DenoisingLoss, "forward", counted)
    return found


@pytest.fixture
def root(tmp_path):
    """Two images of 64 pixels and one of 32."""
    folder = image_folder(tmp_path / "images", 2, (64, 64))
    Image.new("RGB", (32, 32), "red").save(folder / "small.png")
    (folder / "small.txt").write_text("small")
    return tmp_path


HOW = {"data__resolution": 32, "data__more_resolutions": [64], "loop__batch_size": 1, "loop__steps": 5}


@pytest.mark.quick("sd")
@pytest.mark.parametrize("family", ["sd", "sdxl", "flux"])
def test_each_image_is_seen_at_all_that_it_is_large_enough_for(family, root, seen):
    value, records = trained(root, family, **HOW)
    sizes = sorted({size for _, size in seen[True]})
    assert len(sizes) == 2
    small, large = sizes
    assert large == (2 * small[0], 2 * small[1])
    large_enough = [(caption, size) for caption in ("a red cat", "the house, ink") for size in sizes]
    assert seen[True] == dict.fromkeys([*large_enough, ("small", small)], 1)
    assert "1 image(s) are too small for the larger resolutions and not seen there: small.png" in notes(records)
    assert "32x32: 3 images" in notes(records)
    assert "64x64: 2 images" in notes(records)
    with safe_open(value.path, "pt") as file:
        assert (file.metadata()["ss_num_train_images"], file.metadata()["ss_num_epochs"]) == ("5", "1")
        assert '"images": 3' in file.metadata()["vislora.data"]


def test_what_is_held_out_is_so_at_every_resolution(root, seen):
    trained(root, "sd", **HOW, data__held_out=0.34)
    learned, held = ({caption for caption, _ in seen[kind]} for kind in (True, False))
    assert (len(learned), len(held)) == (2, 1)
    assert not learned & held


def test_masks_and_repeats_go_with_them(root, seen):
    (root / "masks").mkdir()
    Image.new("L", (64, 64), 255).save(root / "masks" / "0.png")
    how = {"data__masks": root / "masks", "data__repeats": 2, "loop__steps": 10}
    trained(root, "sd", **{**HOW, **how})
    assert set(seen[True].values()) == {2}


def test_a_stopped_run_goes_on_to_the_same_bits(root):
    whole, _ = trained(root, "sd", output=root / "whole", **HOW)
    stopped(config(root, "sd", **HOW), after=2)
    value, _ = trained(root, "sd", resume=True, **HOW)
    assert same(whole.path, value.path)


def test_pairs_are_cut_alike(root, seen):
    image_folder(root / "sources", 2, (64, 64))
    Image.new("RGB", (32, 32), "blue").save(root / "sources" / "small.png")
    for path in (root / "sources").glob("*.txt"):
        path.unlink()
    trained(root, data__sources=root / "sources", base=str(tiny.saved("flux-kontext")), **HOW)
    assert sum(seen[True].values()) == 5
