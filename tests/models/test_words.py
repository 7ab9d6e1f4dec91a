"""Words that text encoders are taught: as diffusers teaches them, or exactly as a known word; put back as it was."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from vislora.errors import AdapterMismatchError, ConfigError
from vislora.inject.targets import Target
from vislora.inject.trained import FreshOptions, inject_fresh
from vislora.models.base import load_family
from vislora.models.words import LearnedWords, forget, has_word, teach, teachers

torch.set_num_threads(1)
FAMILIES = ("sd", "sdxl", "sdxl-refiner")


@pytest.fixture(params=FAMILIES)
def family(request):
    return load_family(tiny.saved(request.param), torch.float32, torch.device("cpu"))


def readers(family):
    """Return the text encoders by slot, each with its tokenizer."""
    names = {name: attribute for name, attribute in family.card.attributes.items() if name != "denoiser"}
    return {
        name.removeprefix("te:"): (
            getattr(family.pipeline, attribute),
            getattr(family.pipeline, attribute.replace("text_encoder", "tokenizer")),
        )
        for name, attribute in names.items()
    }


def vectors(family, count=2, seed=0):
    """Return vectors of random numbers for every text encoder."""
    draw = torch.Generator().manual_seed(seed)
    widths = {slot: encoder.get_input_embeddings().weight.shape[1] for slot, (encoder, _) in readers(family).items()}
    return {slot: 0.1 * torch.randn(count, width, generator=draw) for slot, width in widths.items()}


def meaning_of(family, word):
    """Return the vectors that the text encoders have for a word that they know."""
    return {
        slot: encoder.get_input_embeddings().weight[tokenizer(word).input_ids[1:-1]].clone()
        for slot, (encoder, tokenizer) in readers(family).items()
    }


@torch.no_grad()
def read(family, *prompts):
    return family.encode_prompt(list(prompts))


def alike(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_word_with_the_meaning_of_another_is_read_as_that(family):
    """Pooled texts, too: with an old config transformers takes the token of the highest number for the end."""
    found = readers(family).values()
    parts = [(part, own) for encoder, own in found for part in encoder.modules() if hasattr(part, "eos_token_id")]
    for part, tokenizer in parts:
        part.eos_token_id = tokenizer.eos_token_id
    known = read(family, "a red cat", "red, a red house")
    for part, _ in parts:
        part.eos_token_id = 2
    teach(family.pipeline, "me", {"my-Style": meaning_of(family, "red")})
    assert alike(read(family, "a my-style cat", "MY-STYLE, a embedding:my-style house"), known)
    assert alike(read(family, "a red cat", "red, a red house"), known)
    forget(family.pipeline, "me")
    assert [part.eos_token_id for part, _ in parts] == [2] * len(parts)


def test_it_is_read_as_diffusers_reads_it(family):
    if family.card.name == "sdxl-refiner":
        pytest.skip("diffusers teaches pipelines with a first text encoder")
    taught = vectors(family)
    other = load_family(tiny.saved(family.card.name), torch.float32, torch.device("cpu"))
    for slot, (encoder, tokenizer) in readers(other).items():
        other.pipeline.load_textual_inversion(taught[slot], token="mycat", tokenizer=tokenizer, text_encoder=encoder)
    teach(family.pipeline, "me", {"mycat": taught})
    for prompt in ("a mycat", "mycat in a house, mycat"):
        theirs, ours = read(other, prompt), read(family, prompt)
        assert torch.equal(theirs["prompt_embeds"], ours["prompt_embeds"])


def test_all_is_as_it_was_when_it_is_forgotten(family):
    before = read(family, "a my-style cat")
    rows = {slot: encoder.get_input_embeddings().weight for slot, (encoder, _) in readers(family).items()}
    backends = {slot: tokenizer.backend_tokenizer for slot, (_, tokenizer) in readers(family).items()}
    teach(family.pipeline, "one", {"my-style": vectors(family)})
    teach(family.pipeline, "two", {"cat": vectors(family, 1, seed=1)})
    assert teachers(family.pipeline) == ["one", "two"]
    both = read(family, "a my-style cat")
    forget(family.pipeline, "one")
    assert not alike(read(family, "a my-style cat"), both)
    teach(family.pipeline, "one", {"my-style": vectors(family)})
    assert alike(read(family, "a my-style cat"), both)
    forget(family.pipeline, "two")
    forget(family.pipeline, "one")
    assert teachers(family.pipeline) == []
    assert alike(read(family, "a my-style cat"), before)
    assert not any("vislora" in key for encoder, _ in readers(family).values() for key in encoder.__dict__)
    for slot, (encoder, tokenizer) in readers(family).items():
        assert encoder.get_input_embeddings().weight is rows[slot]
        assert tokenizer.backend_tokenizer is backends[slot]


def test_a_word_is_no_part_of_another_and_the_longer_one_counts(family):
    before = read(family, "category, my-cats")
    teach(family.pipeline, "me", {"cat": vectors(family), "my-cat": meaning_of(family, "red")})
    assert alike(read(family, "category, my-cats"), before)
    assert alike(read(family, "a my-cat"), read(family, "a red"))
    assert has_word("a Cat, red", "cat")
    assert not has_word("category", "cat")


def test_an_adapter_on_the_embedding_leaves_words_as_they_are(family):
    teach(family.pipeline, "me", {"my-style": meaning_of(family, "red")})
    for encoder, _ in readers(family).values():
        path = next(name for name, _ in encoder.named_modules() if name.endswith("token_embedding"))
        inject_fresh(encoder, "x", {path: Target("", 2)}, FreshOptions(seed=1)).ups()[0].data.normal_()
    with_word, known = read(family, "my-style"), read(family, "red")
    assert not torch.equal(with_word["prompt_embeds"], known["prompt_embeds"])
    for encoder, tokenizer in readers(family).values():
        embedding = encoder.get_input_embeddings()
        ids = tokenizer("my-style red", return_tensors="pt").input_ids[0, 1:-1]
        new, own = embedding(ids).chunk(2)
        assert torch.equal(new, embedding.weight[ids[len(new) :]])
        assert not torch.equal(own, new)


def test_a_word_has_one_meaning(family):
    teach(family.pipeline, "one", {"cat": vectors(family)})
    with pytest.raises(ConfigError, match="the word 'Cat' is taught by 'one' already"):
        teach(family.pipeline, "two", {"Cat": vectors(family, seed=1)})
    teach(family.pipeline, "two", {"cat": vectors(family)})
    forget(family.pipeline, "one")
    assert teachers(family.pipeline) == ["two"]
    assert not alike(read(family, "a cat"), read(family, "a dog"))


def test_what_is_for_another_base_is_told(family):
    odd = {
        "no vectors": {"t5": torch.zeros(1, 16)},
        "other widths": {slot: torch.zeros(1, 7) for slot in readers(family)},
        "too many axes": {slot: rows[None] for slot, rows in vectors(family).items()},
    }
    if family.card.name == "sd":
        odd["two encoders"] = {**vectors(family), "clip_g": torch.zeros(1, 1280)}
    for slots in odd.values():
        with pytest.raises(AdapterMismatchError, match="the word 'x' is for another base"):
            teach(family.pipeline, "me", {"x": slots})
    assert teachers(family.pipeline) == []


@pytest.mark.parametrize("slot", ["emb_params", "string_to_param.*"])
def test_where_there_is_one_encoder_the_slot_need_not_say_so(slot):
    family = load_family(tiny.saved("sd"), torch.float32, torch.device("cpu"))
    teach(family.pipeline, "me", {"x": {slot: meaning_of(family, "red")["clip_l"][0]}})
    assert alike(read(family, "a x"), read(family, "a red"))


def test_a_base_with_another_text_encoder_is_taught_none():
    family = load_family(tiny.saved("flux"), torch.float32, torch.device("cpu"))
    with pytest.raises(AdapterMismatchError, match="SD and SDXL"):
        teach(family.pipeline, "me", {"x": {"clip_l": torch.zeros(1, 16)}})


def test_a_word_that_is_learned_begins_as_it_is_read_and_has_all_gradients(family):
    before = read(family, "a my-style cat")
    words = LearnedWords(family.pipeline, "me", {"my-style": (None, ""), "Dog": (3, "cat")})
    assert alike(read(family, "a my-style cat"), before)
    assert not alike(read(family, "a dog"), read(family, "a cat"))
    assert alike(read(family, "a dog"), read(family, "a cat cat cat"))
    found = family.encode_prompt(["a my-style cat, a dog"])
    sum(value.square().sum() for value in found.values()).backward()
    assert all(vectors.grad is not None and vectors.grad.any() for vectors in words.parameters())
    assert all(part.grad is None for encoder, _ in readers(family).values() for part in encoder.parameters())
    with torch.no_grad():
        for vectors in words.parameters():
            vectors.add_(1.0)
    moved = read(family, "a my-style cat, a dog")
    assert not alike(moved, found)
    made = words.embeddings()
    words.close()
    assert alike(read(family, "a my-style cat"), before)
    teach(family.pipeline, "me", made)
    assert alike(read(family, "a my-style cat, a dog"), moved)


def test_a_word_cannot_begin_as_nothing(family):
    with pytest.raises(ConfigError, match="reads nothing in ' '"):
        LearnedWords(family.pipeline, "me", {"x": (1, " ")})
