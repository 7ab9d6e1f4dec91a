import os
import re

import pytest
from data_helpers import make_image, png_header, quadrants
from PIL import Image

from vislora.data.listing import natural_key
from vislora.data.scan import dataset_hash, scan
from vislora.errors import DataError


def captioned(path, text="a thing", **how):
    make_image(path, **how)
    path.with_suffix(".txt").write_text(text)
    return path


def truncated(path):
    noise = Image.frombytes("RGB", (64, 64), os.urandom(64 * 64 * 3))
    noise.save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BAD = {
    "cut.jpg": (truncated, "truncated"),
    "cut.png": (truncated, "cannot be decoded"),
    "cut.webp": (truncated, "cannot be decoded|not an image"),
    "empty.png": (lambda path: path.write_bytes(b""), r"empty \(0 bytes\)"),
    "text.png": (lambda path: path.write_text("hello"), "not an image"),
    "long.png": (lambda path: Image.new("1", (30000, 10)).save(path), "too large: 30000 x 10"),
    "bomb.png": (lambda path: path.write_bytes(png_header(30000, 30000)), "too large: more than"),
    "large.png": (lambda path: path.write_bytes(png_header(12000, 12000)), "too large: 12000 x 12000"),
    "tiny.png": (lambda path: make_image(path, (7, 40)), "too small: 7 x 40"),
    "phone.heic": (lambda path: path.write_bytes(b"ftypheic"), r"\.heic is not supported"),
    "link.png": (lambda path: path.symlink_to("nowhere.png"), "link to nothing"),
}


@pytest.fixture
def bad_folder(tmp_path):
    captioned(tmp_path / "good.png")
    for name, (make, _) in BAD.items():
        make(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text("a caption")
    return tmp_path


def test_every_bad_image_is_named_at_once(bad_folder):
    with pytest.raises(DataError) as caught:
        scan(bad_folder)
    message = str(caught.value)
    assert message.startswith(f"{len(BAD)} problem(s) in {bad_folder}")
    for name, (_, reason) in BAD.items():
        assert re.search(rf"^  {re.escape(name)}: .*({reason})", message, re.MULTILINE), (name, message)
    assert message.endswith("fix or remove them, or continue without them with --data.skip-bad")
    assert "good.png" not in message


def test_skip_bad_leaves_them_out_and_says_so(bad_folder):
    result = scan(bad_folder, skip_bad=True)
    assert [example.path.name for example in result.examples] == ["good.png"]
    assert {path.name for path, _ in result.skipped} == set(BAD)
    assert all(reason for _, reason in result.skipped)


def test_a_skipped_image_needs_no_caption(tmp_path):
    captioned(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"(?s)bad.png: the file is empty.*bad.png: no caption"):
        scan(tmp_path)
    assert len(scan(tmp_path, skip_bad=True).examples) == 1


def test_nothing_usable_is_an_error_even_with_skip_bad(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"(?s)no usable image.*bad\.png"):
        scan(tmp_path, skip_bad=True)


def test_examples(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    quadrants(32, 24).save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "a.txt").write_text("a flag")
    (example,) = scan(tmp_path).examples
    assert (example.width, example.height) == (24, 32)
    assert example.caption == "a flag"
    assert len(example.sha256) == 64


def test_the_order_is_natural_and_subfolders_are_read(tmp_path):
    for name in ("b10.png", "b2.png", "a/c1.png", "B3.png"):
        captioned(tmp_path / name)
    names = [example.path.relative_to(tmp_path).as_posix() for example in scan(tmp_path).examples]
    assert names == ["a/c1.png", "b2.png", "B3.png", "b10.png"]
    flat = scan(tmp_path, recursive=False)
    assert len(flat.examples) == 3
    assert any("not read" in note and "a" in note for note in flat.notes)
    assert natural_key("x2") < natural_key("x10")


def test_litter_is_passed_over(tmp_path):
    captioned(tmp_path / "a.png")
    for name in (".hidden.png", "._a.png", "Thumbs.db", "README.txt", "LICENSE.txt", "license-cc0.txt", "NOTICE"):
        (tmp_path / name).write_text("no image")
    captioned(tmp_path / "license_plate.png")
    (tmp_path / "a.npz").write_text("x")
    result = scan(tmp_path)
    assert [example.path.name for example in result.examples] == ["a.png", "license_plate.png"]
    assert any("neither image nor caption" in note and "a.npz" in note for note in result.notes)


def test_folder_errors(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        scan(tmp_path / "gone")
    with pytest.raises(DataError, match="is a file"):
        scan(make_image(tmp_path / "a.png"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images in"):
        scan(tmp_path / "empty")
    make_image(tmp_path / "outer/inner/a.png")
    with pytest.raises(DataError, match="1 subfolder"):
        scan(tmp_path / "outer", recursive=False)


def test_a_link_to_a_folder_above_ends(tmp_path):
    captioned(tmp_path / "a.png")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert len(scan(tmp_path).examples) == 1


def test_duplicates_animations_and_repeat_folders_are_noted(tmp_path):
    captioned(tmp_path / "a.png")
    captioned(tmp_path / "b.png")
    captioned(tmp_path / "10_cat/c.png", colour=(1, 2, 3))
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "d.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "d.txt").write_text("moving")
    notes = "\n".join(scan(tmp_path).notes)
    assert "identical files, all used: a.png, b.png" in notes
    assert "only the first frame is used of d.gif" in notes
    assert "10_cat" in notes
    assert 'give it in data.subsets, such as pattern = "10_cat/*", repeats = 10' in notes


def test_problems_of_all_kinds_come_in_one_error(tmp_path):
    captioned(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"")
    (tmp_path / "bad.txt").write_text("text")
    make_image(tmp_path / "apple.png")
    (tmp_path / "aple.txt").write_text("typo")
    with pytest.raises(DataError) as caught:
        scan(tmp_path)
    message = str(caught.value)
    assert message.startswith("3 problem(s)")
    assert "bad.png: the file is empty" in message
    assert "aple.txt: caption of no image (did you mean 'apple'?)" in message
    assert "apple.png: no caption" in message
    assert "--data.allow-missing-captions" in message


def test_more_bad_images_than_fit_a_screen_are_all_named(tmp_path):
    for number in range(45):
        (tmp_path / f"{number}.png").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        scan(tmp_path, allow_missing_captions=True)
    assert all(f"  {number}.png: " in str(caught.value) for number in range(45))


def test_dataset_hash_knows_images_and_captions_but_not_places(tmp_path):
    for folder in ("one", "two"):
        captioned(tmp_path / folder / "a.png")
        captioned(tmp_path / folder / "b.png", colour=(0, 0, 0))
    first, second = (scan(tmp_path / folder).examples for folder in ("one", "two"))
    assert dataset_hash(first) == dataset_hash(second) != dataset_hash(first[::-1])
    (tmp_path / "two/a.txt").write_text("another thing")
    assert dataset_hash(scan(tmp_path / "two").examples) != dataset_hash(first)
