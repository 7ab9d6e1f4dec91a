"""Patterns of a config decide as PEFT's own function does, and never take long."""

from __future__ import annotations

import random
import re
import time

import pytest
from peft.utils.other import get_pattern_key

from vislora.errors import AdapterFileError
from vislora.formats.patterns import Patterns

PATHS = (
    "mid_block.attentions.0.proj_in",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0",
    "up_blocks.2.resnets.1.conv1",
    "to_k",
    "not_to_k",
    "encoder.layers.11.mlp.fc1",
    "",
)
PATTERNS = (
    "to_k",
    "^to_k",
    "attn1.to_k",
    "to.k",
    "^mid_block.attentions.0.proj_in",
    r"(down|up)_blocks\..*attn[12]\.to_k",
    r".*\.conv\d",
    r"to_(q|k|v|out\.0)",
    r"layers\.(\d+)\.mlp\.fc1",
    r"layers\.1{2}\.mlp\..*",
    r"[^.]+_in",
    r"(?:proj|conv)_(?P<end>in|out)?",
    "a|to_k|b",
    r"down.*?k",
    r"\w+",
    r"(^to_k)$",
    r"o{,2}to_k{1,}",
    "conv1|",
    r"[]x\]a-z0-9_.]*",
)


def expected(patterns, path):
    return get_pattern_key(patterns, path)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_fits_what_it_fits_in_peft(pattern):
    for path in PATHS:
        assert Patterns({pattern: "yes"}).find([path], "no") == ("yes" if fits(pattern, path) else "no"), path


def fits(pattern, path):
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def test_the_first_that_fits_decides_as_in_peft():
    dice = random.Random(3)
    for _ in range(200):
        chosen = dice.sample(PATTERNS, 4)
        for path in PATHS[:-1]:
            assert Patterns({item: item for item in chosen}).find([path], path) == get_pattern_key(chosen, path)


def test_random_expressions_fit_what_they_fit_for_re():
    dice = random.Random(5)
    for _ in range(400):
        pattern = "".join(
            dice.choice(["a", "b", ".", "a*", "b+", "a?", "(a|b)", "(ab)*", "|", "[ab]", "b{1,2}"]) for _ in "12345"
        )
        for _ in range(5):
            path = "".join(dice.choice("ab.") for _ in range(dice.randrange(7)))
            assert (Patterns({pattern: 1}).find([path], 0) == 1) == fits(pattern, path), (pattern, path)


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(a|aa)+$", "(a*)*b", "(.*a){25}", ".*.*.*.*.*.*b", "a?" * 100 + "a" * 100, "((a?){9}){9}b"]
)
def test_expressions_that_never_end_elsewhere_are_quick_here(pattern):
    before = time.monotonic()
    Patterns({pattern: 1}).find(["a" * 300 + "!"], 0)
    assert time.monotonic() - before < 2


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "no regular expression"),
        ("a" * 498 + "|bc", "longer than 500"),
        ("(a{1000}){1000}", "repeats too much"),
        ("(?=a)b", "looks around"),
        (r"(a)\2", "looks around"),
        ("(?i)a", "no regular expression"),
        ("a*+b", "looks around"),
        ("x{99999999999}", "no regular expression"),
        ("(" * 240 + ")" * 240, ""),
    ],
)
def test_expressions_that_are_refused(pattern, message):
    if message:
        with pytest.raises(AdapterFileError, match=message):
            Patterns({pattern: 1})
    else:
        Patterns({pattern: 1})
