from __future__ import annotations

import pytest
from PIL import Image

from vislora.data.buckets import Bucket
from vislora.data.encode import views
from vislora.data.pairs import find_sources, source_views
from vislora.data.scan import scan
from vislora.errors import DataError


def draw(path, size=(32, 24), colour=(200, 30, 60)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def folders(tmp_path):
    """Return (targets, sources): three pairs, one of them in a subfolder, one with another suffix."""
    for number, name in enumerate(("a", "b", "sub/c")):
        draw(tmp_path / "targets" / f"{name}.png", colour=(number, 0, 0))
        draw(tmp_path / "sources" / f"{name}.{'webp' if name == 'b' else 'png'}", (48, 24), (0, number, 0))
    return tmp_path / "targets", tmp_path / "sources"


def examples(folder):
    return scan(folder, captions="filename").examples


def test_sources_are_found_by_name_in_the_order_of_the_examples(folders):
    targets, sources = folders
    found = find_sources(examples(targets), targets, sources)
    assert [source.path.relative_to(sources).as_posix() for source in found] == ["a.png", "b.webp", "sub/c.png"]
    assert [(source.width, source.height) for source in found] == [(48, 24)] * 3
    assert len({source.sha256 for source in found}) == 3


def test_everything_that_is_wrong_is_told_at_once(folders):
    targets, sources = folders
    draw(targets / "alone.png")
    draw(sources / "nobody.png")
    draw(sources / "a.jpg")
    (sources / "sub" / "c.png").write_bytes(b"no image")
    (sources / "x.psd").write_bytes(b"psd")
    with pytest.raises(DataError) as caught:
        find_sources(examples(targets), targets, sources)
    text = str(caught.value)
    for part in ("5 problem(s)", "alone.png: no source", "nobody.png: no training image", "a: several sources: a.jpg"):
        assert part in text
    assert "c.png: not an image" in text
    assert ".psd is not supported" in text


def test_sources_of_images_that_are_left_out_are_of_no_use_either(folders):
    targets, sources = folders
    used = [example for example in examples(targets) if example.path.name != "a.png"]
    assert len(find_sources(used, targets, sources, left_out=[targets / "a.png"])) == 2


def test_a_missing_folder_is_named(folders):
    with pytest.raises(DataError, match="nowhere"):
        find_sources(examples(folders[0]), folders[0], folders[1] / "nowhere")


def test_a_source_is_cut_as_its_example_is(folders):
    targets, sources = folders
    found = examples(targets)
    wanted = views(found, {Bucket(16, 16): [0, 1, 2]}, fingerprint="vae", crop="random", flip=True)
    shown = source_views(wanted, find_sources(found, targets, sources))
    for its_views, its_sources in zip(wanted, shown, strict=True):
        for view, source in zip(its_views, its_sources, strict=True):
            assert (source.bucket, source.position, source.flip) == (view.bucket, view.position, view.flip)
            assert source.key != view.key
    before = shown[0][0].key
    draw(sources / "a.png", (48, 24), (9, 9, 9))
    assert source_views(wanted, find_sources(found, targets, sources))[0][0].key != before
