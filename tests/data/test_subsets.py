"""Subsets of a folder: which image is in which, what it gets, and patterns that fit none."""

import pytest
from data_helpers import make_image

from vislora.data.scan import scan
from vislora.data.subsets import Subset
from vislora.errors import ConfigError, DataError

REST = Subset("*", 2, "ink")


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(["anna/1.png", "anna/old/2.png", "bob/1.png", "3.png"]):
        make_image(tmp_path / name, colour=(number, 0, 0))
        (tmp_path / name).with_suffix(".txt").write_text("a person")
    return tmp_path


def found(folder, *subsets):
    examples = scan(folder, subsets=[*subsets, REST]).examples
    return {example.path.relative_to(folder).as_posix(): (example.repeats, example.caption) for example in examples}


def test_the_first_that_fits_decides(folder):
    given = found(folder, Subset("anna/old/*", 1, "young anna"), Subset("anna/*", 5, "anna"), Subset("bob/*", 3))
    assert given == {
        "anna/old/2.png": (1, "young anna, a person"),
        "anna/1.png": (5, "anna, a person"),
        "bob/1.png": (3, "a person"),
        "3.png": (2, "ink, a person"),
    }


def test_patterns_are_globs_or_regular_expressions(folder):
    one = found(folder, Subset(r"re:(anna|bob)/1\.png", 4))
    assert {name for name, (repeats, _) in one.items() if repeats == 4} == {"anna/1.png", "bob/1.png"}
    with pytest.raises(ConfigError, match="no valid regular expression"):
        found(folder, Subset("re:(", 4))


def test_a_pattern_without_images_is_told(folder):
    with pytest.raises(DataError) as told:
        found(folder, Subset("ana/*", 2), Subset("bob/*", 2), Subset("bob/1*", 3))
    assert "'ana/*': matches no image (did you mean 'anna/*'" in str(told.value)
    assert "'bob/1*': its images belong to a pattern before it" in str(told.value)
    assert "'bob/*':" not in str(told.value)


def test_the_rest_may_be_nothing(folder):
    assert {repeats for repeats, _ in found(folder, Subset("*/*", 3), Subset("3.png", 1)).values()} == {1, 3}


def test_notes_tell_the_share_of_each(folder):
    notes = scan(folder, subsets=[Subset("anna/*", 3), Subset("bob/*", 1), Subset("*", 1)]).notes
    assert "'anna/*': 2 image(s), 3 times an epoch: 75% of it" in notes
    assert "'bob/*': 1 image(s), once an epoch: 12% of it" in notes
    assert not any("epoch" in line for line in scan(folder, subsets=[REST]).notes)
