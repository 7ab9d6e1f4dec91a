import pytest
from data_helpers import make_example
from hypothesis import assume, given
from hypothesis import strategies as st

from vislora.data.buckets import (
    Bucket,
    assign,
    bucket_for,
    bucket_notes,
    bucket_sizes,
    bucket_summary,
    cropped_share,
    enlargement,
    size_notes,
)
from vislora.errors import DataError

resolutions = st.integers(16, 2048)
steps = st.sampled_from([8, 16, 32, 64])
sides = st.integers(8, 6000)


@given(resolutions, steps, st.floats(1.0, 6.0))
def test_sizes_are_multiples_within_area_and_aspect(resolution, step, max_aspect):
    assume(resolution >= step)
    sizes = bucket_sizes(resolution, step, max_aspect)
    side = resolution // step * step
    assert Bucket(side, side) in sizes
    for width, height in sizes:
        assert width % step == height % step == 0
        assert 0 < width * height <= resolution**2
        assert max(width, height) <= max_aspect * min(width, height)
        assert Bucket(height, width) in sizes
        if width != height:  # no side could have been one step longer
            assert (min(width, height) + step) * max(width, height) > resolution**2


@given(sides, sides, resolutions, steps, st.booleans())
def test_every_image_has_a_bucket(width, height, resolution, step, upscale):
    assume(resolution >= step)
    sizes = bucket_sizes(resolution, step)
    bucket = bucket_for(width, height, sizes, step, upscale)
    assert bucket.width % step == bucket.height % step == 0
    assert 0 < bucket.width * bucket.height <= resolution**2
    if upscale:
        assert bucket in sizes
    else:
        assert bucket.width <= max(width, step)
        assert bucket.height <= max(height, step)
    assert 0.0 <= cropped_share(make_example("a", width, height), bucket) < 1.0


def test_usual_sizes():
    sizes = bucket_sizes(512, 64)
    assert {Bucket(512, 512), Bucket(576, 448), Bucket(640, 384), Bucket(384, 640)} <= set(sizes)
    assert bucket_for(4032, 3024, sizes, 64) == Bucket(576, 448)
    assert bucket_for(1080, 1920, sizes, 64) == Bucket(384, 640)
    assert bucket_sizes(64, 8, max_aspect=1) == [Bucket(64, 64)]
    assert {Bucket(64, 64), Bucket(72, 56), Bucket(80, 48)} <= set(bucket_sizes(64, 8))


def test_without_upscaling_small_images_keep_their_size():
    sizes = bucket_sizes(512, 64)
    assert bucket_for(300, 300, sizes, 64, upscale=False) == Bucket(256, 256)
    assert bucket_for(500, 300, sizes, 64, upscale=False) == Bucket(448, 256)
    assert bucket_for(5000, 100, sizes, 64, upscale=False).height == 64
    assert bucket_for(3000, 3000, sizes, 64, upscale=False) == Bucket(512, 512)
    assert bucket_for(20, 20, sizes, 64, upscale=False) == Bucket(64, 64)


@pytest.mark.parametrize(("resolution", "step", "aspect"), [(32, 64, 2.0), (64, 8, 0.5)])
def test_impossible_settings(resolution, step, aspect):
    with pytest.raises(DataError, match=f"{resolution if aspect > 1 else aspect}"):
        bucket_sizes(resolution, step, aspect)


@given(st.lists(st.tuples(sides, sides), max_size=30))
def test_assign_uses_every_example_once(sizes):
    examples = [make_example(f"{n}", *size) for n, size in enumerate(sizes)]
    members = assign(examples, 256, 32)
    assert sorted(index for indices in members.values() for index in indices) == list(range(len(examples)))
    assert list(members) == sorted(members)


@given(st.lists(st.tuples(sides, sides), max_size=30), st.booleans())
def test_larger_resolutions_have_what_need_not_be_enlarged(sizes, upscale):
    examples = [make_example(f"{n}", *size) for n, size in enumerate(sizes)]
    members = assign(examples, 512, 32, more=[256, 1024], upscale=upscale)
    for index, example in enumerate(examples):
        (least,) = (bucket for bucket, places in assign([example], 256, 32, upscale=upscale).items() if places)
        own = {bucket for bucket, places in members.items() if index in places}
        assert least in own
        assert all(enlargement(example, bucket) <= 1.0 for bucket in own - {least})
        if min(sizes[index]) >= 3 * 1024:
            assert len(own) == 3
    fewer = [n for n in range(len(sizes)) if sum(n in places for places in members.values()) < 3]
    told = size_notes(examples, members, 3)
    assert bool(told) == bool(fewer)
    assert not told or told[0].startswith(f"{len(fewer)} image(s) are too small for the larger resolutions")


def test_summary_and_notes():
    examples = [
        make_example("wide.png", 4000, 400),
        make_example("small.png", 32, 32),
        make_example("fine.png", 64, 64),
    ]
    members = assign(examples, 64, 8)
    assert "64x64: 2 images" in bucket_summary(members)
    assert sum(int(line.split()[1]) for line in bucket_summary(members)) == 3
    notes = bucket_notes(examples, members)
    assert len(notes) == 2
    assert "1 image(s) lose more than 10%" in notes[0]
    assert "wide.png (7" in notes[0]
    assert "small.png (2x)" in notes[1]
    assert bucket_notes(examples[2:], assign(examples[2:], 64, 8)) == []
