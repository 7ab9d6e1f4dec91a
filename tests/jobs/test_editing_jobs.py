"""Training from pairs of images, and generating from an image to edit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tests import tiny, tiny_dits
from tests.jobs.train_helpers import image_folder, notes, trained
from vislora.errors import ConfigError, DataError
from vislora.jobs import train as job
from vislora.jobs.generate import generate
from vislora.jobs.recipes import read_recipe
from vislora.models import base, qwen_image
from vislora.training.loss import DenoisingLoss

torch.set_num_threads(1)


@pytest.fixture
def root(tmp_path):
    """Return a folder of pairs: the sources are the images, mirrored."""
    image_folder(tmp_path / "images")
    (tmp_path / "sources").mkdir()
    for path in (tmp_path / "images").glob("*.png"):
        Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "sources" / path.name)
    return tmp_path


@pytest.fixture
def seeing(monkeypatch):
    """Give the base of Qwen-Image-Edit its processor, and its text encoder small pictures."""
    monkeypatch.setattr(qwen_image, "SEEN", dict.fromkeys(qwen_image.SEEN, 32**2))
    load = base.load_family

    def loading(*args):
        family = load(*args)
        family.pipeline.processor = tiny_dits.SeesImages()
        return family

    monkeypatch.setattr(job, "load_family", loading)


def watched(monkeypatch):
    """Return a list that gets the batch of every step."""
    seen = []
    forward = DenoisingLoss.forward
    monkeypatch.setattr(
        DenoisingLoss, "forward", lambda self, batch, draw: (seen.append(batch), forward(self, batch, draw))[1]
    )
    return seen


@pytest.mark.parametrize("family", ["flux-kontext", "flux2"])
def test_a_base_that_edits_trains_from_pairs(family, root, monkeypatch):
    batches = watched(monkeypatch)
    value, _ = trained(root, family, data__sources=root / "sources")
    assert value.finished
    assert all(batch["source"].shape == batch["latents"].shape for batch in batches)
    assert not torch.equal(batches[0]["source"], batches[0]["latents"])


def test_what_the_text_encoder_sees_is_cached_by_caption_and_source(root, seeing, monkeypatch):
    batches = watched(monkeypatch)
    value, records = trained(root, "qwen-image-edit", data__sources=root / "sources", data__caption_dropout=0.5)
    assert value.finished
    assert isinstance(batches[0]["text"]["prompt_embeds"], (list, torch.Tensor))
    counts = [record for record in records if getattr(record, "task", "") == "caching captions"]
    assert counts[-1].total == 2 * 4  # each caption and the empty one, with each of four sources


def test_a_slider_of_a_base_that_edits_has_both_ends_with_each_source(root, seeing, monkeypatch):
    batches = watched(monkeypatch)
    slider = {"more": "{caption}, blue"}
    value, records = trained(root, "qwen-image-edit", data__sources=root / "sources", slider=slider)
    assert value.finished
    assert all(text.endswith("blue") for batch in batches for text in batch["more_captions"])
    counts = [record for record in records if getattr(record, "task", "") == "caching captions"]
    assert counts[-1].total == 2 * 2 * 4  # each caption and the empty one, both as they are and blue, with each source


def test_the_source_decides_what_is_learnt(root, monkeypatch):
    """The gradients of one step are others with other sources."""
    found = {}
    for name in ("sources", "others"):
        (root / "others").mkdir(exist_ok=True)
        for path in (root / "sources").glob("*.png"):
            Image.new("RGB", (24, 24), "black").save(root / "others" / path.name)
        value, _ = trained(root, "flux-kontext", data__sources=root / name, output=root / f"run-{name}", loop__steps=2)
        found[name] = value.path.read_bytes()
    assert found["sources"] != found["others"]


def test_a_changed_source_is_refused_on_resume(root):
    trained(root, "flux-kontext", data__sources=root / "sources", loop__steps=2)
    Image.new("RGB", (24, 24), "black").save(root / "sources" / "0.png")
    with pytest.raises(ConfigError, match=r"source 0\.png"):
        trained(root, "flux-kontext", data__sources=root / "sources", loop__steps=4, resume=True)


def test_sources_of_one_name_in_two_folders_are_both_watched(root):
    for kind in ("images", "sources"):
        (root / kind / "sub").mkdir()
        (root / kind / "sub" / "0.png").write_bytes((root / kind / "1.png").read_bytes())
    (root / "images" / "sub" / "0.txt").write_text("ink")
    trained(root, "flux-kontext", data__sources=root / "sources", loop__steps=2)
    Image.new("RGB", (24, 24), "black").save(root / "sources" / "0.png")
    with pytest.raises(ConfigError, match=r"source 0\.png"):
        trained(root, "flux-kontext", data__sources=root / "sources", loop__steps=4, resume=True)


def test_sources_and_base_must_go_together(root):
    with pytest.raises(ConfigError, match=r"family 'sd3' edits no images; FLUX\.1 Kontext"):
        trained(root, "sd3", data__sources=root / "sources")
    with pytest.raises(ConfigError, match=r"data\.sources: this base edits images"):
        trained(root, "qwen-image-edit")
    _, records = trained(root, "flux-kontext")
    assert "no data.sources" in notes(records)
    (root / "sources" / "2.png").unlink()
    with pytest.raises(DataError, match=r"2\.png: no source image"):
        trained(root, "flux-kontext", data__sources=root / "sources", output=root / "other")


def test_samples_start_from_the_sources(root, monkeypatch):
    shown = []
    make = job.preview.__globals__["make_images"]
    monkeypatch.setitem(
        job.preview.__globals__,
        "make_images",
        lambda *args, source=None, **kwargs: (shown.append(source), make(*args, source=source, **kwargs))[1],
    )
    trained(root, "flux-kontext", data__sources=root / "sources", loop__steps=1, sample__every=1)
    assert [image.size for image in shown] == [(16, 16)] * 8


def test_an_image_is_edited_and_made_again(root):
    how = {"base": str(tiny.saved("flux-kontext")), "steps": 2, "device": "cpu", "width": 32, "height": 16}
    source = root / "sources" / "1.png"
    plain, edited = (
        generate(prompt=("a red cat",), output=root / name, **how, **more)[0]
        for name, more in (("plain", {}), ("edited", {"source": source}))
    )
    assert edited.image.size == (32, 16)
    assert not np.array_equal(np.array(plain.image), np.array(edited.image))
    assert read_recipe(edited.path).source.path == str(source)
    again = generate(like=edited.path, output=root / "again", device="cpu")[0]
    assert np.array_equal(np.array(again.image), np.array(edited.image))
    Image.new("RGB", (24, 24), "black").save(source)
    with pytest.raises(ConfigError, match=r"1\.png, has changed since"):
        generate(like=edited.path, output=root / "again", device="cpu")
    with pytest.raises(ConfigError, match=r"nowhere\.png is no file"):
        generate(prompt=("a",), output=root / "x", source=root / "nowhere.png", **how)
