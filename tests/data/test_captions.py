import json

import pytest
from data_helpers import make_image

from vislora.data.captions import caption_from_name, tag_orders, with_trigger
from vislora.data.dataset import counts
from vislora.data.scan import captions_of, dataset_hash, scan
from vislora.data.subsets import Subset
from vislora.errors import DataError


@pytest.fixture
def folder(tmp_path):
    make_image(tmp_path / "a.png")
    make_image(tmp_path / "b.png", colour=(0, 0, 0))
    return tmp_path


def captions(folder, **how):
    return {example.path.name: example.caption for example in scan(folder, **how).examples}


def problems(folder, **how):
    with pytest.raises(DataError) as caught:
        scan(folder, **how)
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.txt", "a.caption", "a.png.txt", "a.TXT"])
def test_sidecars(folder, name):
    (folder / name).write_bytes(b"\xef\xbb\xbf  a red apple\r\n")
    (folder / "b.txt").write_text("äpfel", encoding="utf-8")
    assert captions(folder) == {"a.png": "a red apple", "b.png": "äpfel"}


def test_lines_are_joined_and_that_is_noted(folder):
    (folder / "a.txt").write_text("one\n\ntwo\n")
    (folder / "b.txt").write_text("three")
    result = scan(folder)
    assert result.examples[0].caption == "one two"
    assert any("joined to one: a.txt" in note for note in result.notes)


def test_each_line_may_be_a_caption_of_its_own(folder):
    (folder / "a.txt").write_text("a red  apple on a table\n\n apple \nsks, fruit\napple\n")
    (folder / "b.txt").write_text("a pear")
    found = scan(folder, each_line=True, subsets=[Subset("*", 1, "sks")])
    apple, pear = found.examples
    assert apple.captions == ("sks, a red apple on a table", "sks, apple", "sks, fruit")
    assert (apple.caption, pear.captions) == (apple.captions[0], ("sks, a pear",))
    assert not any("joined" in note for note in found.notes)
    assert captions_of(found.examples) == [*apple.captions, "sks, a pear"]
    assert counts(found.examples, {})["captions"] == 4
    (folder / "a.txt").write_text("a red apple on a table\nplum\nsks, fruit")
    other = scan(folder, each_line=True, subsets=[Subset("*", 1, "sks")]).examples
    assert dataset_hash(other) != dataset_hash(found.examples)


def test_a_list_in_metadata_is_read_like_lines(folder):
    lines = [{"file_name": "a.png", "text": ["one", "two"]}, {"file_name": "b.png", "text": []}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "b.txt").write_text("three")
    assert [example.captions for example in scan(folder, each_line=True).examples] == [("one", "two"), ("three",)]
    assert captions(folder)["a.png"] == "one two"
    for text in (["one", 2], 0):
        (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": text}))
        assert "metadata.jsonl: line 1: the caption is int, not text" in problems(folder)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("grün".encode("latin-1"), r"a\.txt: not UTF-8 \(byte 2 is 0xfc\)"),
        ("a cat".encode("utf-16"), r"a\.txt: not UTF-8"),
        ("a cat".encode("utf-16-le"), r"a\.txt: contains NUL"),
    ],
)
def test_other_encodings_are_errors(folder, data, reason):
    (folder / "a.txt").write_bytes(data)
    (folder / "b.txt").write_text("x")
    with pytest.raises(DataError, match=reason):
        scan(folder)
    assert "a.png: no caption" not in problems(folder)


def test_all_missing_captions_are_named(folder):
    (folder / "b.txt").write_text(" \n")
    message = problems(folder)
    assert message.startswith("2 problem(s)")
    assert "a.png: no caption" in message
    assert "b.png: b.txt has no words" in message


def test_missing_captions_allowed(folder):
    (folder / "b.txt").write_text("")
    assert captions(folder, allow_missing_captions=True) == {"a.png": "", "b.png": ""}
    assert captions(folder, allow_missing_captions=True, subsets=[Subset(trigger="zwx")]) == {
        "a.png": "zwx",
        "b.png": "zwx",
    }
    assert any(
        "2 image(s) without a caption: a.png, b.png" in note for note in scan(folder, allow_missing_captions=True).notes
    )


def test_two_images_share_a_sidecar_with_a_note(tmp_path):
    make_image(tmp_path / "a.png")
    make_image(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("both")
    assert captions(tmp_path) == {"a.png": "both", "a.jpg": "both"}
    assert any("a.txt is the caption of 2 images: a.jpg, a.png" in note for note in scan(tmp_path).notes)


def test_contradicting_captions(folder):
    (folder / "a.txt").write_text("one")
    (folder / "a.caption").write_text("two")
    (folder / "b.txt").write_text("same")
    (folder / "b.caption").write_text("same\n")
    message = problems(folder)
    assert message.startswith("1 problem(s)")
    assert "a.png: different captions in a.caption and a.txt; keep one" in message


def test_metadata_jsonl_and_csv(folder):
    lines = [{"file_name": "a.png", "text": "first"}, {"file_name": "./b.png", "caption": "second"}]
    (folder / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    assert captions(folder) == captions(folder, captions="metadata") == {"a.png": "first", "b.png": "second"}
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text('\ufefffile_name,caption\na.png,"first, and more"\nb.png,second\n', "utf-8")
    assert captions(folder) == {"a.png": "first, and more", "b.png": "second"}


def test_metadata_in_a_subfolder_names_files_from_there(tmp_path):
    make_image(tmp_path / "sub/deep/a.png")
    (tmp_path / "sub/metadata.csv").write_text("file_name,text\ndeep\\a.png,deep one\n")
    assert captions(tmp_path) == {"a.png": "deep one"}


def test_metadata_and_sidecars_together(folder):
    (folder / "metadata.csv").write_text("file_name,text\na.png,from metadata\n")
    (folder / "b.txt").write_text("from text")
    assert captions(folder) == {"a.png": "from metadata", "b.png": "from text"}
    (folder / "a.txt").write_text("otherwise")
    assert "a.png: different captions in a.txt and metadata.csv (entry 1)" in problems(folder)
    assert captions(folder, captions="txt") == {"a.png": "otherwise", "b.png": "from text"}
    assert any("metadata.csv" in note and "not read" in note for note in scan(folder, captions="txt").notes)


JSON_LINES = """\
{"file_name": "aa.png", "text": "typo"}
{"file_name": "a.png", "text": "good"
["a.png"]
{"name": "a.png", "text": "x"}
{"file_name": "a.png"}
{"file_name": "a.png", "text": 5}
{"file_name": "a.png", "text": "x", "caption": "y"}
"""


def test_every_bad_metadata_line_is_named(folder):
    (folder / "metadata.jsonl").write_text(JSON_LINES)
    message = problems(folder, allow_missing_captions=True)
    for expected in (
        "metadata.jsonl: there is no image 'aa.png' (did you mean 'a.png'",
        "metadata.jsonl: line 2: not JSON",
        "line 3: not an object",
        "line 4: no file_name (found: name, text)",
        "line 5: neither text nor caption",
        "line 6: the caption is int, not text",
        "line 7: both text and caption",
    ):
        assert expected in message


def test_bad_csv(folder):
    (folder / "metadata.csv").write_text("file_name,text\na.png,one, two\nb.png\n")
    message = problems(folder)
    assert "metadata.csv: line 2: 1 cell(s) too many" in message
    assert "b.png: metadata.csv (entry 2) has no words" in message
    (folder / "metadata.csv").write_text("image;text\na.png;x\n")
    assert "line 2: no file_name (found: image;text)" in problems(folder)
    (folder / "metadata.csv").write_bytes(b"file_name,text\na.png,\xff\n")
    assert "metadata.csv: not UTF-8" in problems(folder)


def test_metadata_asked_for_but_absent(folder):
    (folder / "a.txt").write_text("unused")
    message = problems(folder, captions="metadata")
    assert "no metadata.jsonl or metadata.csv" in message
    assert "a.png: no caption" in message


def test_file_names_only_when_asked_for(tmp_path):
    make_image(tmp_path / "red-apple_02.png")
    make_image(tmp_path / "red-apple_02.jpg")
    (tmp_path / "red-apple_02.txt").write_text("unused")
    assert set(captions(tmp_path, captions="filename").values()) == {"red apple"}
    assert any("not read" in note for note in scan(tmp_path, captions="filename").notes)
    make_image(tmp_path / "0001.png")
    assert "0001.png: its name has no words" in problems(tmp_path, captions="filename")


def test_unknown_source(folder):
    assert "auto, txt, metadata, filename" in problems(folder, captions="blip")


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("red-apple_02", "red apple"),
        ("a cat (3)", "a cat"),
        ("0001", ""),
        ("apple2", "apple2"),
        ("Old__Tree", "Old Tree"),
    ],
)
def test_caption_from_name(tmp_path, name, caption):
    assert caption_from_name(tmp_path / f"{name}.png") == caption


@pytest.mark.parametrize(
    ("caption", "trigger", "expected"),
    [
        ("a cat", "zwx", "zwx, a cat"),
        ("a zwx cat", "zwx", "a zwx cat"),
        ("ZWX cat", "zwx", "ZWX cat"),
        ("a zwxy cat", "zwx", "zwx, a zwxy cat"),
        ("(zwx:1.2) cat", "zwx", "(zwx:1.2) cat"),
        ("in c++ style", "c++", "in c++ style"),
        ("", "zwx", "zwx"),
        ("a cat", None, "a cat"),
        ("a cat", "", "a cat"),
    ],
)
def test_trigger(caption, trigger, expected):
    assert with_trigger(caption, trigger) == expected


def test_accents_composed_or_not_are_one_name(tmp_path):
    make_image(tmp_path / "cafe\u0301.png")
    (tmp_path / "caf\u00e9.txt").write_text("coffee")
    assert list(captions(tmp_path).values()) == ["coffee"]


def test_tags_are_seen_in_other_orders_behind_those_that_keep_their_place():
    caption = "sks, 1girl,red hair , smile,night"
    orders = tag_orders(caption, 8, keep=2, seed=1)
    assert orders[0] == caption
    assert len(orders) == len(set(orders)) > 4
    for order in orders[1:]:
        assert order.startswith("sks, 1girl, ")
        assert sorted(order.split(", ")) == ["1girl", "night", "red hair", "sks", "smile"]
    assert orders == tag_orders(caption, 8, keep=2, seed=1)
    assert orders != tag_orders(caption, 8, keep=2, seed=2)
    assert len(tag_orders("a, b, c", 100, keep=0, seed=0)) == 6


def test_some_tags_are_left_out_of_other_orders():
    caption = "sks, " + ", ".join("abcdefghij")
    first, *others = tag_orders(caption, 100, keep=1, seed=1, dropout=0.3)
    assert first == caption
    assert all(order.split(", ")[0] == "sks" for order in others)
    kept = [tag for order in others for tag in order.split(", ")[1:]]
    assert len(kept) / (10 * len(others)) == pytest.approx(0.7, abs=0.05)
    assert set(kept) == set("abcdefghij")
    assert set(tag_orders("sks, a cat", 50, keep=1, seed=0, dropout=0.5)) == {"sks", "sks, a cat"}
    assert set(tag_orders("a, b", 50, keep=0, seed=0, dropout=0.5)) == {"", "a", "b", "a, b", "b, a"}


@pytest.mark.parametrize("caption", ["", "a cat", "sks, a cat", "sks, "])
def test_one_tag_has_one_order(caption):
    assert tag_orders(caption, 8, keep=1, seed=0) == [caption]
