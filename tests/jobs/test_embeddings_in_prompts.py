"""Textual inversion embeddings, alone and within adapters: in prompts, in recipes, on a pipeline of one's own."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import vislora
from tests import tiny
from tests.jobs.test_generate import COMMON, adapters, made, same  # noqa: F401
from vislora import formats
from vislora.config.generate import GenerateConfig
from vislora.errors import AdapterFileError, ConfigError
from vislora.jobs import generate as job
from vislora.records import Note

torch.set_num_threads(1)


def meaning(word):
    """Return the vectors that the tiny base has for a word that it knows."""
    pipeline = tiny.PIPELINES["sd"]()
    return pipeline.text_encoder.get_input_embeddings().weight[pipeline.tokenizer(word).input_ids[1:-1]].detach()


@pytest.fixture
def red(tmp_path):
    save_file({"emb_params": meaning("red")}, tmp_path / "my-red.safetensors")
    return tmp_path / "my-red.safetensors"


def test_its_name_is_a_word(red, tmp_path):
    known = made(tmp_path, prompt="a red cat", negative_prompt="red")
    taught = made(tmp_path, prompt="a my-red cat", negative_prompt="MY-RED", embedding=(red,))
    assert same(taught, known)
    assert not same(made(tmp_path, prompt="a my-red cat"), known)


def test_the_recipe_repeats_it(red, tmp_path):
    picture = made(tmp_path, prompt="a my-red cat", embedding=(red,))[0]
    again = vislora.generate(like=picture.path, output=tmp_path / "again")
    assert same(again, [picture])
    save_file({"emb_params": meaning("cat")}, red)
    with pytest.raises(AdapterFileError, match=r"my-red\.safetensors is gone or has changed"):
        vislora.generate(like=picture.path, output=tmp_path / "again")


def test_a_word_that_no_prompt_has_is_told(red, tmp_path):
    settings = {"base": str(tiny.saved("sd")), "prompt": ("a my-redcat",), "output": tmp_path / "out", **COMMON}
    records = job.run(GenerateConfig.of({**settings, "embedding": (red,)}))
    notes = [record.text for record in records if isinstance(record, Note)]
    assert any("no prompt has its word 'my-red'" in note for note in notes)


def test_pickles_are_read_when_they_are_allowed(tmp_path):
    content = {"string_to_token": {"*": 265}, "string_to_param": {"*": meaning("red")}, "name": "red", "step": 100}
    torch.save(content, tmp_path / "my-red.pt")
    with pytest.raises(AdapterFileError, match="--allow-pickle"):
        made(tmp_path, prompt="a my-red cat", embedding=(tmp_path / "my-red.pt",))
    taught = made(tmp_path, prompt="a my-red cat", embedding=(tmp_path / "my-red.pt",), allow_pickle=True)
    assert same(taught, made(tmp_path, prompt="a red cat"))


def test_one_that_is_given_as_an_adapter_is_told_where_it_belongs(red, tmp_path):
    with pytest.raises(AdapterFileError, match=r"a textual inversion embedding \(generate takes it as --embedding\)"):
        made(tmp_path, adapter=(str(red),))


def test_what_is_no_embedding_is_told(tmp_path, adapters):  # noqa: F811
    with pytest.raises(AdapterFileError, match="this is no textual inversion embedding"):
        formats.load_embedding(adapters / "sd-a.safetensors")
    save_file({"some.weight": torch.ones(1, 16)}, tmp_path / "odd.safetensors")
    with pytest.raises(AdapterFileError, match="this is no textual inversion embedding"):
        formats.load_embedding(tmp_path / "odd.safetensors")
    save_file({"emb_params": torch.full((1, 16), torch.nan)}, tmp_path / "nan.safetensors")
    with pytest.raises(AdapterFileError, match="not finite"):
        formats.load_embedding(tmp_path / "nan.safetensors")


def test_the_tokens_that_a_file_names_are_the_words(tmp_path):
    save_file({"<cat-toy>": meaning("red"), "<s1>": meaning("cat")}, tmp_path / "learned_embeds.safetensors")
    pipeline = tiny.PIPELINES["sd"]()
    assert vislora.load_embedding(pipeline, tmp_path / "learned_embeds.safetensors") == ["<cat-toy>", "<s1>"]
    taught = made(tmp_path, prompt="a <cat-toy> <s1>", embedding=(tmp_path / "learned_embeds.safetensors",))
    assert same(taught, made(tmp_path, prompt="a red cat"))
    with pytest.raises(ConfigError, match="something named 'learned_embeds' is loaded already"):
        vislora.load_embedding(pipeline, tmp_path / "learned_embeds.safetensors")
    vislora.eject(pipeline, "learned_embeds")
    assert len(pipeline.tokenizer) == len(tiny.PIPELINES["sd"]().tokenizer)


def bundle(adapters, tmp_path, **words):  # noqa: F811
    tensors = {f"bundle_emb.{word}.string_to_param.*": vectors for word, vectors in words.items()}
    save_file({**load_file(adapters / "sd-a.safetensors"), **tensors}, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def test_the_words_within_an_adapter_come_and_go_with_it(adapters, tmp_path):  # noqa: F811
    path = bundle(adapters, tmp_path, sks=meaning("red"))
    taught = made(tmp_path, prompt="a sks cat", adapter=(f"{path}:0.7",))
    assert same(taught, made(tmp_path, prompt="a red cat", adapter=(f"{adapters}/sd-a.safetensors:0.7",)))
    pipeline = tiny.PIPELINES["sd"]()
    known = len(pipeline.tokenizer)
    assert vislora.load(pipeline, path) == []
    assert len(pipeline.tokenizer) == known + len(meaning("red"))
    vislora.eject(pipeline)
    assert len(pipeline.tokenizer) == known


def test_words_for_another_base_are_told_and_the_adapter_is_loaded(adapters, tmp_path):  # noqa: F811
    path = bundle(adapters, tmp_path, sks=torch.zeros(1, 768))
    left = vislora.load(tiny.PIPELINES["sd"](), path)
    assert len(left) == 1
    assert "1 words: the word 'sks' is for another base" in left[0]


def test_nothing_is_loaded_where_a_word_is_taken(adapters, red, tmp_path):  # noqa: F811
    path = bundle(adapters, tmp_path, **{"my-red": meaning("cat")})
    pipeline = tiny.PIPELINES["sd"]()
    vislora.load_embedding(pipeline, red)
    with pytest.raises(ConfigError, match="the word 'my-red' is taught by 'my-red' already"):
        vislora.load(pipeline, path)
    with pytest.raises(ConfigError, match="no adapter named 'a'"):
        vislora.set_strengths(pipeline, {"a": 1.0})
