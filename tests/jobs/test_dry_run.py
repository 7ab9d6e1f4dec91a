"""`--dry-run`: everything before the first step, and a picture of what training would see."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.jobs.train_helpers import config, image_folder, notes, same, trained
from vislora.errors import ConfigError
from vislora.jobs import dry_run
from vislora.jobs.train import run
from vislora.records import Done

RED = (200, 0, 0)


def plain(folder, **sizes):
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in sizes.items():
        Image.new("RGB", size, RED).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a {name}")
    return folder


def cells(path, count):
    """Return the pictures of a sheet, 192 pixels each, with 12 between them, as they lie in its first row."""
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    return [pixels[12:204, 12 + 204 * place : 204 + 204 * place] for place in range(count)]


def share(cell, colour, near=2):
    return float((abs(cell - np.array(colour)).max(-1) <= near).mean())


def test_it_stops_before_the_first_step_and_the_run_is_what_it_would_have_been(tmp_path):
    value, records = trained(tmp_path, "sd", dry_run=True, loop__steps=6)
    assert (value.step, value.finished) == (0, False)
    assert sorted(item.name for item in (tmp_path / "run").iterdir()) == ["cache", "images.png"]
    assert "denoiser: " in notes(records)
    assert "6 steps on 4 images, 2 at once: each is seen 3 times" in records[-1].summary
    assert str(tmp_path / "run" / "images.png") in records[-1].summary
    after, _ = trained(tmp_path, "sd", loop__steps=2)
    alone, _ = trained(tmp_path, "sd", loop__steps=2, output=tmp_path / "alone", name="run")
    assert same(after.path, alone.path)


def test_a_run_that_is_there_stays_as_it_is(tmp_path):
    value, _ = trained(tmp_path, "sd", loop__steps=2)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for more in ({}, {"overwrite": True}, {"resume": True}):
        trained(tmp_path, "sd", loop__steps=4, dry_run=True, **more)
    now = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert now.pop(tmp_path / "run" / "images.png")
    assert now == before
    assert trained(tmp_path, "sd", loop__steps=3, resume=True)[0].step == 3
    with pytest.raises(ConfigError, match="holds a run already"):
        list(run(config(tmp_path, "sd")))
    assert value.path.exists()


def test_what_is_cut_off_or_masked_is_pale(tmp_path):
    plain(tmp_path / "images", a=(24, 24), b=(48, 24), c=(24, 24))
    (tmp_path / "masks").mkdir()
    mask = Image.new("L", (24, 24), 255)
    mask.paste(0, (0, 0, 24, 12))
    mask.save(tmp_path / "masks" / "c.png")
    trained(tmp_path, "sd", dry_run=True, data__max_aspect=1.0, data__masks=str(tmp_path / "masks"))
    whole, cut, half = cells(tmp_path / "run" / "images.png", 3)
    pale = tuple(round(0.25 * side + 0.75 * 255) for side in RED)
    assert share(whole, RED) == 1.0
    # two to one: as high as half the cell, half of it seen; the frame is one pixel
    assert share(cut, RED) == pytest.approx(0.25, abs=0.02)
    assert share(cut, pale) == pytest.approx(0.25, abs=0.02)
    assert share(half, RED) == pytest.approx(0.5, abs=0.05)
    assert share(half[-70:], RED) > 0.99
    assert share(half[:70], pale) > 0.99


def test_of_many_images_those_are_drawn_that_lose_the_most(tmp_path, monkeypatch):
    monkeypatch.setattr(dry_run, "MOST", 2)
    plain(tmp_path / "images", a=(24, 24), b=(30, 24), c=(24, 24), d=(48, 24))
    _, records = trained(tmp_path, "sd", dry_run=True, data__max_aspect=1.0)
    assert "of 4 images, the 2 that lose the most to the crop are drawn" in notes(records)
    most, second = cells(tmp_path / "run" / "images.png", 2)
    assert share(most, RED) < 0.3
    assert share(second, RED) > 0.6


def test_an_image_that_lies_anywhere_is_told_from_what_is_held_out(tmp_path):
    image_folder(tmp_path / "images", 4, (30, 20))
    *_, last = run(config(tmp_path, "sd", dry_run=True, data__held_out=0.25, data__crop="random", data__flip=True))
    assert isinstance(last, Done)
    assert "on 3 images" in last.summary
