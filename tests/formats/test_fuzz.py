"""Damaged files of every format and kind give an adapter or an `AdapterFileError`; benchmarks/fuzz.py runs more."""

from __future__ import annotations

import random

import pytest

from benchmarks import fuzz
from benchmarks.mutations import MUTATIONS
from vislora.registry import FORMATS


@pytest.mark.parametrize("seed", [11, 12, 13, 14])
def test_damaged_files_never_do_anything_else(seed, tmp_path):
    tally = fuzz.Tally()
    for number in range(400):
        fuzz.run_case(number, seed, tmp_path, tally)
    assert not tally.failures
    assert sum(tally.outcomes.values()) == 400
    assert {result for _, result in tally.outcomes} == {"refused", "loaded"}


def test_there_is_a_sample_of_every_kind_and_format():
    names = " ".join(fuzz.samples())
    assert all(f" as {name}" in names for name in FORMATS if FORMATS[name].writable)
    assert all(f"{kind} as kohya" in names for kind in ("lora", "loha", "lokr", "dora"))
    assert all(fuzz.intact(name).modules for name in fuzz.samples())


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_mutation_changes_something(mutation):
    changed = 0
    for name, sample in fuzz.samples().items():
        changed += any(MUTATIONS[mutation](sample, random.Random(f"{name}{turn}")) != sample for turn in range(20))
    assert changed


def test_the_order_of_the_payload_does_not_matter(tmp_path):
    for number, (name, sample) in enumerate(fuzz.samples().items()):
        shuffled = MUTATIONS["order of payload"](sample, random.Random(number))
        assert fuzz.outcome(fuzz.lay_down(shuffled, tmp_path / str(number)), fuzz.intact(name)) == "loaded"
