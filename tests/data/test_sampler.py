import hashlib
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vislora.data.buckets import Bucket
from vislora.data.draws import draw
from vislora.data.sampler import Sampler, batches
from vislora.errors import DataError

BUCKETS = {Bucket(64, 64): [0, 2, 4, 6, 8], Bucket(72, 56): [1, 3, 5], Bucket(56, 72): [7]}


@st.composite
def bucketings(draw_):
    counts = draw_(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    places = iter(range(sum(counts)))
    return {Bucket(64 + 8 * n, 64): [next(places) for _ in range(count)] for n, count in enumerate(counts)}


@given(bucketings(), st.integers(1, 5), st.integers(0, 9), st.integers(0, 9), st.lists(st.integers(1, 3), min_size=1))
def test_every_example_comes_exactly_as_often_as_asked(buckets, batch_size, seed, epoch, counts):
    places = [index for indices in buckets.values() for index in indices]
    repeats = {index: counts[index % len(counts)] for index in places}
    found = batches(buckets, batch_size, seed, epoch, repeats)
    seen = Counter(index for batch in found for index in batch.indices)
    assert seen == Counter(repeats)
    for batch in found:
        assert 1 <= len(batch.indices) == len(batch.visits) <= batch_size
        assert set(batch.indices) <= set(buckets[batch.bucket])
    assert len(found) == sum(-(-sum(repeats[index] for index in some) // batch_size) for some in buckets.values())
    visits = Counter(
        (index, visit) for batch in found for index, visit in zip(batch.indices, batch.visits, strict=True)
    )
    assert set(visits.values()) == {1}
    for index, count in repeats.items():
        assert {visit for one, visit in visits if one == index} == set(range(epoch * count, (epoch + 1) * count))


def test_what_is_seen_often_is_seen_all_over_the_epoch():
    """Each half, quarter, ... of an epoch has the same share of it."""
    often = {0: 8, 1: 2}
    found = batches({Bucket(8, 8): range(6)}, 14, seed=2, epoch=0, repeats=often)
    (places,) = [batch.indices for batch in found]
    assert len(places) == 14
    assert [places.index(0) < 7, places[::-1].index(0) < 7] == [True, True]
    assert places[:7].count(0) in (3, 4, 5)
    assert places[:7].count(1) == 1


def test_one_number_for_all_is_the_plan_of_older_checkpoints():
    repeats = {index: 2 for indices in BUCKETS.values() for index in indices}
    plan = (sorted((bucket, tuple(indices)) for bucket, indices in BUCKETS.items()), 2, 0, 2)
    assert Sampler(BUCKETS, 2, 0, repeats).state()["plan"] == hashlib.sha256(repr(plan).encode()).hexdigest()
    assert batches(BUCKETS, 2, 0, 1, {}) == batches(BUCKETS, 2, 0, 1, dict.fromkeys(range(9), 1))


def test_order_depends_on_seed_and_epoch_alone():
    assert batches(BUCKETS, 2, 0, 0) == batches(dict(reversed(BUCKETS.items())), 2, 0, 0)
    orders = {tuple(batches(BUCKETS, 2, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_the_order_never_changes_between_versions():
    found = batches({Bucket(8, 8): range(6)}, 2, seed=1, epoch=0)
    assert [batch.indices for batch in found] == [
        (1, 2),
        (3, 5),
        (4, 0),
    ]
    assert draw(1, "a") == pytest.approx(0.6666373, abs=1e-6)


@given(bucketings(), st.integers(1, 4), st.integers(0, 40))
def test_resuming_gives_the_same_batches(buckets, batch_size, steps):
    repeats = {0: 3, 1: 2}
    whole = list(islice(Sampler(buckets, batch_size, seed=3, repeats=repeats), steps + 20))
    first = Sampler(buckets, batch_size, seed=3, repeats=repeats)
    for _ in range(steps):
        first.next()
    second = Sampler(buckets, batch_size, seed=3, repeats=repeats)
    second.restore(first.state())
    assert list(islice(second, 20)) == whole[steps:]
    assert second.state()["epoch"] == (steps + 19) // len(second)


@pytest.mark.parametrize(
    "change", [{"batch_size": 3}, {"seed": 1}, {"repeats": {0: 2}}, {"buckets": {Bucket(8, 8): [0]}}]
)
def test_a_state_of_another_plan_is_refused(change):
    settings = {"buckets": BUCKETS, "batch_size": 2, "seed": 0, "repeats": {}}
    state = Sampler(**settings).state()
    with pytest.raises(DataError, match="other images"):
        Sampler(**{**settings, **change}).restore(state)


def test_impossible_sizes():
    with pytest.raises(DataError, match="batch_size"):
        batches(BUCKETS, 0, 0, 0)
    with pytest.raises(DataError, match="no examples"):
        Sampler({}, 1)


def test_draws_are_even():
    values = [draw("x", n) for n in range(4000)]
    assert 0.0 <= min(values) < max(values) < 1.0
    assert sum(values) / len(values) == pytest.approx(0.5, abs=0.02)
    assert draw("a", 1) != draw("a1")
