"""Weights in prompts: how they are read, and what text encoders make of them."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from vislora.errors import ConfigError
from vislora.models.base import load_family
from vislora.models.emphasis import as_read, emphasised, has_weights, reads_weights, weighed
from vislora.models.sampling import Sampling, Shot, make_images
from vislora.models.words import teach

torch.set_num_threads(1)
CPU = torch.device("cpu")
READ = {
    "a red cat": ("a red cat", {}),
    "a (red:1.3) cat": ("a red cat", {"red": 1.3}),
    "a (red: .5 ) cat": ("a red cat", {"red": 0.5}),
    "((red:2) cat:0.5)": ("red cat", {"red": 1.0, " cat": 0.5}),
    "(a (red:-1) cat:1.5), ink": ("a red cat, ink", {"a ": 1.5, "red": -1.5, " cat": 1.5}),
    "a cat (smiling)": ("a cat (smiling)", {}),
    "a (cat (smiling):1.2)": ("a cat (smiling)", {"cat (smiling)": 1.2}),
    r"(saber \(fate\):1.1)": ("saber (fate)", {"saber (fate)": 1.1}),
    r"a \(red:1.3\) cat": ("a (red:1.3) cat", {}),
    "a) cat :1.3) (": ("a) cat :1.3) (", {}),
    "(:1.3)": ("", {}),
    r"back\slash": (r"back\slash", {}),
    "(a red:x) (1:2:3)": ("(a red:x) 1:2", {"1:2": 3.0}),
}


@pytest.mark.parametrize("prompt", READ)
def test_weights_are_read(prompt):
    text, expected = READ[prompt]
    found = weighed(prompt)
    assert found.text == text
    weights = [1.0] * len(text)
    for part, weight in expected.items():
        start = text.index(part)
        weights[start : start + len(part)] = [weight] * len(part)
    assert found.weights == pytest.approx(weights)
    assert found.is_plain == all(weight == 1.0 for weight in weights)


@pytest.mark.parametrize("number", ["10.5", "-11", "1" + "0" * 400])
def test_a_weight_beyond_all_sense_is_an_error(number):
    with pytest.raises(ConfigError, match=r"the weight of '\(red:.*' is not in -10 to 10"):
        weighed(f"a (red:{number}) cat")


def family_of(name):
    return load_family(tiny.saved(name), torch.float32, CPU)


@torch.no_grad()
def read(family, *prompts):
    """Return what the base makes of prompts with weights."""
    found = as_read(family, prompts)
    with emphasised(family, found):
        return family.encode_prompt([prompt.text for prompt in found])


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "pixart", "auraflow"])
def test_features_of_a_part_lie_on_the_line_from_the_empty_prompt(name):
    family = family_of(name)
    plain, empty = read(family, "a red cat"), read(family, "")
    more, half, one = read(family, "a (red:1.5) cat"), read(family, "a (red:0.5) cat"), read(family, "a (red:1) cat")
    for key in plain:
        assert torch.equal(one[key], plain[key])
        if plain[key].dim() < 3 or not plain[key].is_floating_point():
            assert torch.equal(more[key], plain[key])  # a pooled text, a mask
            continue
        changed = (more[key] != plain[key]).any(-1)[0]
        assert 0 < changed.sum() < len(changed) / 2
        if name != "auraflow":  # its pipeline makes zero of what is behind the prompt's end
            middle = torch.where(changed[:, None], (plain[key] + empty[key]) / 2, plain[key])
            torch.testing.assert_close(half[key], middle)
        torch.testing.assert_close(more[key] - plain[key], plain[key] - half[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_each_row_of_a_batch_has_its_own_weights(name):
    family = family_of(name)
    prompts = ["a (red:1.5) cat", "a red cat", "(a red:0.5) cat", "(a dog:0.3), ink"]
    together = read(family, *prompts)
    for row, prompt in enumerate(prompts):
        alone = read(family, prompt)
        for key in alone:
            torch.testing.assert_close(together[key][row : row + 1], alone[key])


def test_a_prompt_that_is_cut_off_keeps_its_weights():
    family = family_of("sd")
    long = ", ".join(["a red cat"] * 40)
    plain, found = read(family, long), read(family, f"(a red cat:2){long[9:]}")
    changed = (plain["prompt_embeds"] != found["prompt_embeds"]).any(-1)[0].nonzero().flatten().tolist()
    assert changed == list(range(1, len(changed) + 1))
    assert len(changed) < 20


def test_a_word_that_is_taught_has_weights_too():
    family = family_of("sd")
    width = family.pipeline.text_encoder.config.hidden_size
    teach(
        family.pipeline,
        "a",
        {"<s1>": {"emb_params": torch.randn(3, width, generator=torch.Generator().manual_seed(0))}},
    )
    plain, found = read(family, "a <s1> cat"), read(family, "a (<s1>:1.5) cat")
    ids = family.pipeline.tokenizer("a").input_ids
    first = len(ids) - 1
    changed = (plain["prompt_embeds"] != found["prompt_embeds"]).any(-1)[0].nonzero().flatten().tolist()
    assert changed == [first, first + 1, first + 2]


def images(family, prompt, negative="", guidance=3.0):
    how = Sampling(2, guidance, tiny.side("sd"), tiny.side("sd"))
    return next(make_images(family, [Shot(prompt, negative, 0)], how))[0].tobytes()


def test_images_are_of_the_weights_and_nothing_stays():
    family = family_of("sd")
    plain = images(family, "a red cat", "a dog")
    assert images(family, "a (red:1) cat", "(a dog:1)") == plain
    assert images(family, "a (red:3) cat", "a dog") != plain
    assert images(family, "a red cat", "(a dog:3)") != plain
    with pytest.raises(ConfigError, match="not in -10 to 10"):
        images(family, "a (red:30) cat")
    assert images(family, "a red cat", "a (red:3) dog") != images(family, "a (red:3) cat", "a red dog") != plain
    with pytest.raises(ConfigError, match="'a red cat' is the negative prompt too, with other weights"):
        images(family, "a red cat", "a (red:3) cat")
    assert not family.pipeline.text_encoder._forward_hooks
    assert images(family, "a red cat", "a dog") == plain


def test_a_prompt_that_comes_otherwise_is_told():
    family = family_of("sd")
    with (
        pytest.raises(ConfigError, match="changes prompts before it reads them: leave weights out"),
        emphasised(family, as_read(family, ["a (red:2) cat"])),
    ):
        family.encode_prompt(["another cat"])
    assert not family.pipeline.text_encoder._forward_hooks


@pytest.mark.parametrize("name", ["qwen-image", "sana"])
def test_bases_that_read_within_instructions_read_weights_as_text(name):
    family = family_of(name)
    assert not reads_weights(family)
    assert as_read(family, ["a (red:30) cat"])[0].text == "a (red:30) cat"
    assert has_weights("a (red:30) cat")
    assert not has_weights("a (red) cat")
