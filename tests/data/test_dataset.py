from itertools import islice

import pytest
import torch
from data_helpers import make_image

from vislora.config.data import DataConfig
from vislora.data.buckets import Bucket, assign
from vislora.data.cache import Cache
from vislora.data.dataset import TrainingSet, collate, counts, is_dropped
from vislora.data.encode import cache_latents, cache_texts, views
from vislora.data.sampler import Sampler
from vislora.data.scan import scan
from vislora.errors import ConfigError, DataError

SQUARE = Bucket(64, 64)


def value_of(generator):
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value


def encode_text(captions):
    return {"hidden": torch.tensor([[float(len(caption))] for caption in captions])}


@pytest.fixture
def examples(tmp_path):
    for number in range(3):
        path = make_image(tmp_path / f"images/{number}.png", (64, 64), colour=(80 * number, 0, 0))
        path.with_suffix(".txt").write_text("x" * (number + 1))
    return scan(tmp_path / "images").examples


@pytest.fixture
def training_set(examples, tmp_path):
    def build(dropout=0.0, flip=False, text=True):
        cache = Cache(tmp_path / "cache")
        wanted = views(examples, assign(examples, 64, 8), fingerprint="vae", flip=flip)
        value_of(cache_latents(cache, wanted, lambda pixels: pixels[:, :, ::8, ::8]))
        keys = value_of(cache_texts(cache, ["", *(e.caption for e in examples)], encode_text, fingerprint="clip"))
        return TrainingSet(cache, wanted, keys if text else None, seed=5, caption_dropout=dropout)

    return build


def test_a_batch_has_everything(training_set, examples):
    sampler = Sampler(assign(examples, 64, 8), 3)
    batch, tensors = next(training_set().batches(sampler))
    assert tensors["latents"].shape == (3, 3, 8, 8)
    for row, index in enumerate(batch.indices):
        assert tensors["captions"][row] == examples[index].caption
        assert tensors["text"]["hidden"][row].item() == len(examples[index].caption)
        assert tensors["latents"][row, 0, 0, 0].item() == pytest.approx(80 * index / 127.5 - 1)
    assert tensors["original_size"].tolist() == tensors["target_size"].tolist() == [[64, 64]] * 3
    assert tensors["crop_top_left"].tolist() == [[0, 0]] * 3


def test_captions_alone_when_text_encoders_train(training_set):
    item = training_set(text=False)[1, 0, SQUARE]
    assert (item["caption"], item["text"]) == ("xx", None)
    assert collate([item])["text"] is None


def test_dropped_captions_take_the_empty_ones_features(training_set):
    dropping = training_set(dropout=0.5)
    items = [dropping[2, visit, SQUARE] for visit in range(40)]
    captions = {item["caption"] for item in items}
    assert captions == {"", "xxx"}
    assert all(item["text"]["hidden"].item() == len(item["caption"]) for item in items)
    assert [item["caption"] for item in items] == [dropping[2, visit, SQUARE]["caption"] for visit in range(40)]
    assert {training_set(dropout=1.0)[i, 0, SQUARE]["caption"] for i in range(3)} == {""}


def test_dropout_has_the_asked_share():
    dropped = [is_dropped(0, visit, index, 0.1) for visit in range(50) for index in range(100)]
    assert sum(dropped) / len(dropped) == pytest.approx(0.1, abs=0.015)
    assert not any(is_dropped(0, visit, 0, 0.0) for visit in range(100))


def test_views_change_from_visit_to_visit(tmp_path):
    image = make_image(tmp_path / "images/a.png", (64, 64))
    image.with_suffix(".txt").write_text("x")
    (example,) = scan(tmp_path / "images").examples
    wanted = views([example], assign([example], 64, 8), fingerprint="vae", flip=True)
    cache = Cache(tmp_path / "cache")
    for number, view in enumerate(wanted[0]):
        cache.put(view.key, {"latents": torch.full((1, 2, 2), float(number))})
    data = TrainingSet(cache, wanted, None)
    seen = [data[0, visit, SQUARE]["latents"].mean().item() for visit in range(30)]
    assert set(seen) == {0.0, 1.0}


def test_each_bucket_has_its_own_views(tmp_path):
    make_image(tmp_path / "images/a.png", (64, 64)).with_suffix(".txt").write_text("x")
    examples = scan(tmp_path / "images").examples
    buckets = assign(examples, 64, 8, more=[32])
    wanted = views(examples, buckets, fingerprint="vae", flip=True)
    cache = Cache(tmp_path / "cache")
    for number, view in enumerate(wanted[0]):
        cache.put(view.key, {"latents": torch.full((1, view.bucket.height // 8, 2), float(number))})
    data = TrainingSet(cache, wanted, None)
    seen = {
        (batch.bucket, tuple(tensors["latents"].shape), tensors["latents"].mean().item())
        for batch, tensors in islice(data.batches(Sampler(buckets, 1)), 40)
    }
    assert seen == {
        (Bucket(32, 32), (1, 1, 4, 2), 0.0),
        (Bucket(32, 32), (1, 1, 4, 2), 1.0),
        (SQUARE, (1, 1, 8, 2), 2.0),
        (SQUARE, (1, 1, 8, 2), 3.0),
    }


def test_a_lost_entry_is_named(training_set, examples, tmp_path):
    data = training_set()
    data.cache = Cache(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"latents of .*0\.png are not in the cache"):
        data[0, 0, SQUARE]
    data = training_set()
    del data.text_keys["x"]
    with pytest.raises(DataError, match="caption 'x'"):
        data[0, 0, SQUARE]


def test_differing_shapes_are_an_error():
    items = [{"latents": torch.zeros(1, 2, side), "caption": "", "text": None} for side in (2, 3)]
    with pytest.raises(DataError, match=r"'latents' has different shapes.*\(1, 2, 2\), \(1, 2, 3\)"):
        collate(items)


def test_counts(examples):
    assert counts(examples, assign(examples, 64, 8)) == {"images": 3, "captions": 3, "uncaptioned": 0, "buckets": 1}


def test_config():
    config = DataConfig.of({"folder": "images", "background": "#0A0b0c", "resolution": 512})
    assert config.background_rgb == (10, 11, 12)
    assert DataConfig.of({"folder": "images", "background": "Gray"}).background_rgb == (128, 128, 128)
    with pytest.raises(ConfigError) as caught:
        DataConfig.of({"background": "pink", "resolution": 100, "repeats": 0, "caption_dropout": 2, "crops": "top"})
    message = str(caught.value)
    for field in ("background", "resolution", "repeats", "caption_dropout", "crops"):
        assert f"{field}: " in message
    assert all(field.description for field in DataConfig.model_fields.values())
