"""Words that are learned with an adapter: in its file, on its pipeline, resumed, refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import vislora
from tests import tiny
from tests.jobs.train_helpers import notes, trained
from vislora import formats
from vislora.errors import ConfigError
from vislora.models.base import load_family

torch.set_num_threads(1)
CPU = torch.device("cpu")
CAT = {"word": "cat", "vectors": 2, "begin": "dog"}


def learned(root, family="sd", words=(CAT,), **settings):
    return trained(root, family, adapter={"rank": 2, "words": list(words)}, **settings)


@pytest.mark.parametrize(
    ("family", "keys"),
    [("sd", ["bundle_emb.cat.string_to_param.*"]), ("sdxl", ["bundle_emb.cat.clip_g", "bundle_emb.cat.clip_l"])],
)
def test_the_file_carries_the_words_and_loading_it_teaches_them(family, keys, tmp_path):
    value, _ = learned(tmp_path, family)
    tensors = load_file(value.path)
    assert sorted(key for key in tensors if key.startswith("bundle_emb")) == keys
    base = load_family(tiny.saved(family), torch.float32, CPU)
    with torch.no_grad():
        before = base.encode_prompt(["a red cat"])["prompt_embeds"]
        assert vislora.load(base.pipeline, value.path) == []
        after = base.encode_prompt(["a red cat"])["prompt_embeds"]
    assert not torch.allclose(before, after)
    for key in keys:
        encoder = base.components["te:clip_g" if key.endswith("clip_g") else "te:clip_l"]
        ids = base.pipeline.tokenizer("cat", return_tensors="pt").input_ids[0, 1:-1]
        assert torch.equal(encoder.get_input_embeddings()(ids), tensors[key])
    assert formats.load(value.path).metadata["modelspec.trigger_phrase"] == "cat"


def test_they_are_learned_at_their_own_rate_and_the_base_is_as_before(tmp_path):
    slow, _ = learned(tmp_path, output=tmp_path / "slow", optimizer__word_learning_rate=1e-9)
    fast, _ = learned(tmp_path, output=tmp_path / "fast")
    pipeline = load_family(tiny.saved("sd"), torch.float32, CPU).pipeline
    first = pipeline.text_encoder.get_input_embeddings().weight[pipeline.tokenizer("dog dog").input_ids[1:-1]]
    one, two = (load_file(value.path)["bundle_emb.cat.string_to_param.*"] for value in (slow, fast))
    assert torch.allclose(one, first[: len(one)], atol=1e-6)
    assert not torch.allclose(two, first[: len(two)], atol=1e-3)


@pytest.mark.quick("0.5")
@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_a_run_with_words_goes_on_to_the_same_bits(ema, tmp_path):
    settings = {"optimizer__schedule": "constant", "loop__ema": ema, "data__caption_dropout": 0.3}
    whole, _ = learned(tmp_path, output=tmp_path / "whole", **settings)
    parted = {"output": tmp_path / "parted", **settings}
    learned(tmp_path, loop__steps=2, **parted)
    parts, records = learned(tmp_path, resume=True, **parted)
    assert "going on from step 2 of 4" in notes(records)
    one, two = load_file(whole.path), load_file(parts.path)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_samples_and_priors_go_with_words(tmp_path):
    prior = {"replace": {"red cat": ["dog"]}, "images": 2}
    value, _ = learned(tmp_path, sample={"every": 4, "prompts": ["a red cat"]}, prior=prior, data__held_out=0.25)
    assert (value.path.parent / "samples" / "000004.png").exists()


@pytest.mark.parametrize(
    ("family", "settings", "told"),
    [
        ("sd", {"words": [{"word": "sks"}]}, "no caption has the word 'sks'"),
        ("sd", {"words": [CAT, {"word": "Cat"}]}, "adapter: words: 'cat' is given twice"),
        ("sd", {"format": "peft"}, "1 embeddings, which have no place in a peft adapter"),
        ("sd3", {}, "adapter.words: only bases whose text encoders are all CLIP's"),
        ("sd", {"slider": {"more": "{caption}, x"}}, "adapter.words: a slider learns from the base's own predictions"),
    ],
)
def test_what_cannot_be_learned_is_told(family, settings, told, tmp_path):
    with pytest.raises(ConfigError) as caught:
        learned(tmp_path, family, **settings)
    assert told in str(caught.value)
    base = load_family(tiny.saved("sd"), torch.float32, CPU)
    assert len(base.pipeline.tokenizer) == len(tiny.PIPELINES["sd"]().tokenizer)
