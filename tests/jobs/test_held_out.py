from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from tests.jobs.train_helpers import config, image_folder, notes, same, trained
from vislora import formats
from vislora.data.buckets import Bucket
from vislora.data.scan import Example
from vislora.errors import ConfigError
from vislora.jobs.held_out import split, told
from vislora.jobs.train import run
from vislora.records import Done, Progress
from vislora.training.loss import DenoisingLoss
from vislora.training.validation import Measured, lowest

HELD = {"data__held_out": 0.5, "loop__validate_every": 1, "optimizer__schedule": "constant"}
WORSE = {**HELD, "optimizer__learning_rate": 0.5, "loop__steps": 6}
"""So high a rate that the loss soon rises."""


def losses(run_folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    return {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}


def stopped(settings, after: int) -> Done:
    last = None
    for record in run(settings):
        last = record
        if isinstance(record, Progress) and record.task == "training" and record.done == after:
            signal.raise_signal(signal.SIGINT)
    assert isinstance(last, Done)
    return last


def examples(count: int) -> list[Example]:
    return [Example(Path(f"{number}.png"), "a cat", 64, 64, f"{number:064x}") for number in range(count)]


BUCKETS = {Bucket(64, 64): [0, 1, 2, 5, 6, 7, 8], Bucket(32, 96): [3, 4, 9]}


@pytest.mark.parametrize(("share", "held"), [(0.0, 0), (0.01, 1), (0.25, 2), (0.9, 9)])
def test_each_example_is_trained_on_or_held_out(share, held):
    learned, kept = split(examples(10), BUCKETS, share, seed=3)
    assert sum(map(len, kept.values())) == held
    for bucket, indices in BUCKETS.items():
        assert sorted([*learned.get(bucket, []), *kept.get(bucket, [])]) == indices
    assert all([*learned.values(), *kept.values()])
    assert split(examples(10), BUCKETS, share, seed=3) == (learned, kept)


def test_the_seed_and_the_images_alone_decide_which():
    def held(found: list[Example], seed: int) -> frozenset[str]:
        return frozenset(found[index].sha256 for part in split(found, BUCKETS, 0.3, seed)[1].values() for index in part)

    assert len({held(examples(10), seed) for seed in range(20)}) > 10
    assert held(examples(10), 0) == held(examples(10)[::-1], 0)


def test_something_must_be_left_to_train_on(tmp_path):
    image_folder(tmp_path / "images", 1)
    with pytest.raises(ConfigError, match=r"data\.held_out: 0\.5 of 1 images leaves none"):
        trained(tmp_path, **HELD)
    assert not (tmp_path / "run" / "config.toml").exists()


def test_what_is_held_out_is_in_no_step(tmp_path, monkeypatch):
    seen = Counter()
    forward = DenoisingLoss.forward

    def counted(module, batch, generator):
        seen.update((module.training, caption) for caption in batch["captions"])
        return forward(module, batch, generator)

    monkeypatch.setattr(DenoisingLoss, "forward", counted)
    image_folder(tmp_path / "images", 8)
    for path in (tmp_path / "images").glob("*.txt"):
        path.write_text(path.stem)
    value, records = trained(tmp_path, data__held_out=0.25, loop__steps=6, loop__validate_every=3)
    learned, held = ({caption for training, caption in seen if training is which} for which in (True, False))
    assert (len(learned), len(held)) == (6, 2)
    assert not learned & held
    assert "2 of 8 images are held out" in notes(records)
    assert json.loads(formats.load(value.path).metadata["vislora.data"])["images"] == 6


def test_measuring_changes_no_step_and_repeats(tmp_path):
    rich = {"adapter__dropout": 0.2, "data__caption_dropout": 0.5, "data__flip": True, "data__held_out": 0.5}
    often, _ = trained(tmp_path, output=tmp_path / "often", loop__validate_every=1, **rich)
    once, _ = trained(tmp_path, output=tmp_path / "once", loop__validate_every=4, **rich)
    assert same(often.path, once.path)
    assert list(losses(tmp_path / "often")) == [0, 1, 2, 3, 4]
    assert losses(tmp_path / "once") == {step: losses(tmp_path / "often")[step] for step in (0, 4)}


@pytest.mark.quick("sd-*")
@pytest.mark.parametrize(("family", "rate"), [("sd", 0.5), ("sdxl", 0.5)])
def test_the_adapter_of_the_lowest_loss_is_kept(family, rate, tmp_path):
    how = {**WORSE, "optimizer__learning_rate": rate}
    value, records = trained(tmp_path, family, **how)
    found = losses(tmp_path / "run")
    best = min((step for step in found if step), key=found.__getitem__)
    assert best < 6
    assert value.lowest == tmp_path / "run" / "checkpoints" / f"run-{best:06d}.safetensors"
    assert sorted(path.name for path in value.lowest.parent.iterdir()) == [value.lowest.name, "step-000006"]
    assert f"lowest {found[best]:.4f} at step {best}" in records[-1].summary
    assert str(value.lowest) in records[-1].summary
    until = stopped(config(tmp_path, family, output=tmp_path / "until", name="run", **how), after=best)
    assert same(until.value.path, value.lowest)
    assert Image.open(tmp_path / "run" / "loss.png").size == (720, 360)


def test_a_stopped_run_goes_on_with_what_was_measured(tmp_path):
    whole, _ = trained(tmp_path, output=tmp_path / "whole", name="run", **WORSE)
    stopped(config(tmp_path, **WORSE), after=4)
    value, _ = trained(tmp_path, resume=True, **WORSE)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert value.lowest.name == whole.lowest.name
    assert same(value.lowest, whole.lowest)


def test_a_killed_run_has_the_adapter_of_its_checkpoint(tmp_path):
    """Until the next checkpoint none is deleted."""
    settings = config(tmp_path, **HELD, loop__steps=6, loop__save_every=3)
    records = run(settings)
    for record in records:
        if isinstance(record, Progress) and record.task == "training" and record.done == 6:
            break
    records.close()
    found = losses(tmp_path / "run")
    kept = min((step for step in found if 0 < step <= 3), key=found.__getitem__)
    assert (tmp_path / "run" / "checkpoints" / f"run-{kept:06d}.safetensors").exists()


def test_a_run_that_goes_on_under_another_name_leaves_the_adapters_of_before(tmp_path):
    first, _ = trained(tmp_path, **WORSE)
    other, records = trained(tmp_path, name="other", resume=True, **WORSE)
    assert first.lowest.exists()
    assert other.lowest is None
    assert "held-out" not in records[-1].summary


def test_any_image_that_changed_is_told_on_resume(tmp_path):
    stopped(config(tmp_path, **HELD), after=2)
    for path in (tmp_path / "images").glob("*.txt"):
        before = path.read_text()
        path.write_text("another caption")
        with pytest.raises(ConfigError, match=rf"{path.stem}\.png was changed"):
            trained(tmp_path, resume=True, **HELD)
        path.write_text(before)


def test_pairs_are_held_out_with_their_sources(tmp_path):
    image_folder(tmp_path / "sources")
    value, _ = trained(tmp_path, "flux-kontext", data__sources=tmp_path / "sources", data__resolution=16, **HELD)
    assert value.lowest.exists()
    assert sorted(losses(tmp_path / "run")) == [0, 1, 2, 3, 4]


def test_that_of_peft_is_a_folder_and_a_new_run_takes_it_away(tmp_path):
    value, _ = trained(tmp_path, format="peft", **HELD)
    assert len(formats.load(value.lowest).modules) == len(formats.load(value.path).modules)
    fresh, _ = trained(tmp_path, overwrite=True)
    assert fresh.lowest is None
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000004"]


def test_what_is_told():
    measured = [Measured(0, 0.3), Measured(50, 0.1), Measured(100, 0.2)]
    assert told(measured[:1]) == "loss on held-out images at step 0: 0.3000"
    assert told(measured[:2]) == "loss on held-out images at step 50: 0.1000 (the base's 0.3000)"
    assert told(measured).endswith("at step 100: 0.2000 (the base's 0.3000, lowest 0.1000 at step 50)")
    assert lowest(measured[:1]) is None
    assert lowest([Measured(0, 0.0), Measured(1, float("nan")), Measured(2, 0.5)]) == Measured(2, 0.5)
