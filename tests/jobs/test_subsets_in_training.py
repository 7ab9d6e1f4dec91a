"""A run on a folder with subsets: how often each image is seen, what the file tells, and that it goes on."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import pytest
from safetensors import safe_open

from tests.jobs.test_train_resume import same, stopped
from tests.jobs.train_helpers import config, image_folder, notes, trained
from vislora.data.dataset import TrainingSet

SUBSETS = [{"pattern": "anna/*", "repeats": 3, "trigger": "sks"}, {"pattern": "bob/*", "trigger": ""}]
HOW = {"data__subsets": SUBSETS, "data__trigger": "ink", "loop__batch_size": 1, "loop__steps": 8}


@pytest.fixture
def root(tmp_path):
    image_folder(tmp_path / "images" / "anna", 2)
    image_folder(tmp_path / "images" / "bob", 1, (26, 24))
    image_folder(tmp_path / "images" / "rest", 1, (24, 26))
    return tmp_path


def test_images_are_seen_as_often_as_their_subsets_say(root, monkeypatch):
    seen = Counter()
    batch = TrainingSet.batch

    def counted(self, place):
        made = batch(self, place)
        seen.update(made["captions"])
        return made

    monkeypatch.setattr(TrainingSet, "batch", counted)
    value, records = trained(root, **HOW)
    assert seen == {"sks, a red cat": 3, "sks, the house, ink": 3, "a red cat": 1, "ink, a red cat": 1}
    assert "'anna/*': 2 image(s), 3 times an epoch: 75% of it" in notes(records)
    with safe_open(value.path, "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.trigger_phrase"] == "ink, sks"
    assert (metadata["ss_num_train_images"], metadata["ss_num_epochs"]) == ("8", "1")
    assert json.loads(metadata["ss_dataset_dirs"]) == {
        "anna": {"n_repeats": 3, "img_count": 2},
        "bob": {"n_repeats": 1, "img_count": 1},
        "rest": {"n_repeats": 1, "img_count": 1},
    }
    assert json.loads(metadata["ss_tag_frequency"])["anna"]["sks"] == 2


def test_a_stopped_run_goes_on_to_the_same_bits(root):
    whole, _ = trained(root, output=root / "whole", **HOW)
    stopped(config(root, **HOW), after=3)
    value, _ = trained(root, resume=True, **HOW)
    assert same(whole.path, value.path)


def test_the_settings_are_written_and_read(root):
    from vislora.config.flags import parse
    from vislora.config.train import TrainConfig

    trained(root, **{**HOW, "loop__steps": 1})
    written = root / "run" / "config.toml"
    again = parse(TrainConfig, ["--config", str(written)], "vislora train")
    assert [subset.model_dump() for subset in again.data.subsets] == [
        {"pattern": "anna/*", "repeats": 3, "trigger": "sks"},
        {"pattern": "bob/*", "repeats": None, "trigger": ""},
    ]
    tables = ['{pattern = "anna/*", repeats = 3, trigger = "sks"}', '{pattern = "bob/*", trigger = ""}']
    given = parse(TrainConfig, ["--folder", "x", "--data.subsets", *tables], "vislora train")
    assert given.data.subsets == again.data.subsets


def test_two_repeats_in_one_folder_have_a_name_each(root):
    shutil.rmtree(root / "images" / "bob")
    value, _ = trained(root, data__subsets=[{"pattern": "anna/0*", "repeats": 2}], loop__steps=1)
    with safe_open(value.path, "pt") as file:
        folders = json.loads(file.metadata()["ss_dataset_dirs"])
    assert folders == {
        "2_anna": {"n_repeats": 2, "img_count": 1},
        "1_anna": {"n_repeats": 1, "img_count": 1},
        "rest": {"n_repeats": 1, "img_count": 1},
    }
