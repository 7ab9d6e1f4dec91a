import dataclasses

import pytest
import torch
from data_helpers import make_example, make_image
from torch import nn

from vislora.data.buckets import Bucket, assign
from vislora.data.cache import Cache, weights_fingerprint
from vislora.data.encode import View, cache_latents, cache_texts, text_key, views
from vislora.data.scan import scan
from vislora.errors import DataError
from vislora.records import Progress

BASE = View(make_example("a.png", 80, 64), Bucket(64, 64), (0.5, 0.5), False, (255, 255, 255), "vae")


def drain(generator):
    records = []
    while True:
        try:
            records.append(next(generator))
        except StopIteration as end:
            return records, end.value


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images"
    for number, size in enumerate([(64, 64), (100, 64), (64, 64)]):
        path = make_image(images / f"{number}.png", size, colour=(number * 40, 20, 30))
        path.with_suffix(".txt").write_text(f"number {number}")
    return images


class Encoder:
    """Halves the sides, keeps the colours, and remembers what it was given."""

    def __init__(self):
        self.shapes = []

    def __call__(self, pixels):
        self.shapes.append(tuple(pixels.shape))
        return nn.functional.avg_pool2d(pixels, 2)


def encode_folder(folder, cache, **how):
    examples = scan(folder).examples
    wanted = views(examples, assign(examples, 64, 8), fingerprint="vae", **how)
    encoder = Encoder()
    records, encoded = drain(cache_latents(cache, wanted, encoder, batch_size=2))
    return wanted, encoder, records, encoded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_tensors_come_back_as_they_went_in(tmp_path, dtype):
    tensors = {"a": torch.arange(6).reshape(2, 3).to(dtype), "b": torch.tensor(1).to(dtype), "c": torch.zeros(0, 2)}
    Cache(tmp_path).put("ab" * 32, {**tensors, "t": tensors["a"].T})
    back = Cache(tmp_path).get("ab" * 32)
    assert set(back) == {"a", "b", "c", "t"}
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)
    assert torch.equal(back["t"], tensors["a"].T)


def test_unknown_keys_and_leftovers(tmp_path):
    cache = Cache(tmp_path)
    key = "cd" * 32
    assert cache.get(key) is None
    cache.path(key).parent.mkdir()
    leftover = cache.path(key).with_name(f".{key}.safetensors.1234.part")
    leftover.write_bytes(b"half a fi")
    assert cache.get(key) is None
    cache.put(key, {"a": torch.ones(1)})
    assert cache.size()[0] == 1


@pytest.mark.parametrize("damage", ["cut", "empty", "flip", "header", "stranger"])
def test_a_damaged_file_is_as_good_as_none(tmp_path, damage):
    key = "ef" * 32
    Cache(tmp_path).put(key, {"a": torch.arange(64.0)})
    path = Cache(tmp_path).path(key)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-3] ^= 16
    elif damage == "header":
        data[:8] = b"\xff" * 8
    elif damage == "stranger":
        data = bytearray((2).to_bytes(8, "little") + b"{}")
    path.write_bytes({"cut": data[:-5], "empty": b""}.get(damage, data))
    assert Cache(tmp_path).get(key) is None


def test_memory_is_bounded_and_prune_forgets(tmp_path):
    cache = Cache(tmp_path, memory_bytes=40)
    cache.put("aa" * 32, {"a": torch.ones(8)})
    cache.put("bb" * 32, {"a": torch.zeros(8)})
    assert cache.get("aa" * 32) is cache.get("aa" * 32)
    assert cache.get("bb" * 32) is not cache.get("bb" * 32)
    assert cache.prune(["bb" * 32]) == 1
    assert cache.get("aa" * 32) is None
    cache.put("bb" * 32, {"a": torch.full((8,), 2.0)})
    assert cache.get("bb" * 32)["a"][0] == 2
    assert cache.get("bb" * 32) is cache.get("bb" * 32)


@pytest.mark.parametrize(
    "change",
    [
        {"example": dataclasses.replace(BASE.example, sha256="f" * 64)},
        {"bucket": Bucket(72, 56)},
        {"position": (0.0, 0.5)},
        {"flip": True},
        {"background": (0, 0, 0)},
        {"fingerprint": "other vae"},
    ],
)
def test_every_setting_is_in_the_key(change):
    assert dataclasses.replace(BASE, **change).key != BASE.key


def test_what_does_not_change_the_pixels_is_not_in_the_key(tmp_path):
    renamed = dataclasses.replace(BASE.example, path=tmp_path / "b.png", caption="another")
    assert dataclasses.replace(BASE, example=renamed).key == BASE.key
    assert dataclasses.replace(BASE, position=(0.5, 0.1)).key == BASE.key  # nothing to choose upwards


def test_latents_are_cached_once(folder, tmp_path):
    wanted, encoder, records, encoded = encode_folder(folder, Cache(tmp_path / "cache"))
    assert encoded == 3
    assert encoder.shapes == [(2, 3, 64, 64), (1, 3, 48, 80)]
    assert records == [Progress("caching latents", done, 3) for done in (0, 2, 3)]
    _, encoder, records, encoded = encode_folder(folder, Cache(tmp_path / "cache"))
    assert (encoder.shapes, encoded) == ([], 0)
    assert records == [Progress("caching latents", 3, 3)]
    stored = Cache(tmp_path / "cache").get(wanted[1][0].key)
    assert stored["latents"].shape == (3, 24, 40)
    assert torch.equal(stored["latents"], nn.functional.avg_pool2d(wanted[1][0].pixels(), 2))
    assert stored["original_size"].tolist() == [64, 100]
    assert stored["crop_top_left"].tolist() == [2, 0]  # 80 x 51.2 after resizing


def test_an_edited_image_of_the_same_size_is_encoded_anew(folder, tmp_path):
    cache = Cache(tmp_path / "cache")
    encode_folder(folder, cache)
    make_image(folder / "0.png", (64, 64), colour=(9, 9, 9))
    wanted, _, _, encoded = encode_folder(folder, cache)
    assert encoded == 1
    assert cache.get(wanted[0][0].key)["latents"].max() < 0


def test_a_damaged_entry_is_made_again(folder, tmp_path):
    wanted, *_ = encode_folder(folder, Cache(tmp_path / "cache"))
    path = Cache(tmp_path / "cache").path(wanted[2][0].key)
    path.write_bytes(path.read_bytes()[:40])
    *_, encoded = encode_folder(folder, Cache(tmp_path / "cache"))
    assert encoded == 1
    assert Cache(tmp_path / "cache").get(wanted[2][0].key) is not None


def test_flips_and_random_crops(folder, tmp_path):
    wanted, _, _, encoded = encode_folder(folder, Cache(tmp_path / "cache"), flip=True, crop="random")
    assert [len(its_views) for its_views in wanted] == [8, 8, 8]
    assert [len({view.key for view in its_views}) for its_views in wanted] == [2, 8, 2]
    assert encoded == 12


def test_mirrored_crops_tell_their_place(folder, tmp_path):
    example = scan(folder).examples[1]
    cache = Cache(tmp_path / "cache")
    left = View(example, Bucket(64, 64), (0.0, 0.0), False, (0, 0, 0), "vae")
    flipped = dataclasses.replace(left, flip=True)
    drain(cache_latents(cache, [[left, flipped]], Encoder()))
    assert cache.get(left.key)["crop_top_left"].tolist() == [0, 0]
    assert cache.get(flipped.key)["crop_top_left"].tolist() == [0, 36]


def test_an_image_changed_meanwhile_is_an_error(folder, tmp_path):
    examples = scan(folder).examples
    wanted = views(examples, assign(examples, 64, 8), fingerprint="vae")
    make_image(folder / "2.png", colour=(1, 1, 1))
    with pytest.raises(DataError, match=r"(?s)changed.*2\.png"):
        drain(cache_latents(Cache(tmp_path / "cache"), wanted, Encoder()))


def test_latents_must_be_finite_and_complete(folder, tmp_path):
    examples = scan(folder).examples
    wanted = views(examples, assign(examples, 64, 8), fingerprint="vae")
    with pytest.raises(DataError, match=r"(?s)not finite.*float16.*0\.png"):
        drain(cache_latents(Cache(tmp_path / "cache"), wanted, lambda pixels: pixels * float("nan")))
    with pytest.raises(DataError, match="1 rows for 2"):
        drain(cache_latents(Cache(tmp_path / "cache"), wanted, lambda pixels: pixels[:1], batch_size=2))
    assert Cache(tmp_path / "cache").size() == (0, 0)


def test_an_example_in_no_bucket_is_an_error(folder):
    with pytest.raises(DataError, match=r"(?s)no bucket.*1\.png"):
        views(scan(folder).examples, {Bucket(64, 64): [0, 2]}, fingerprint="vae")


def encode_text(captions):
    rows = torch.tensor([[len(caption), 1] for caption in captions], dtype=torch.bfloat16)
    return {"hidden": rows[:, None].repeat(1, 4, 1), "mask": torch.ones(len(captions), 4, dtype=torch.bool)}


def test_texts_are_cached_once(tmp_path):
    cache = Cache(tmp_path)
    records, keys = drain(cache_texts(cache, ["", "cat", "dog", "cat"], encode_text, fingerprint="clip", batch_size=2))
    assert list(keys) == ["", "cat", "dog"]
    assert [record.done for record in records] == [0, 2, 3]
    stored = Cache(tmp_path).get(keys["cat"])
    assert stored["hidden"].shape == (4, 2)
    assert stored["hidden"].dtype == torch.bfloat16
    assert stored["hidden"][0, 0] == 3
    records, _ = drain(cache_texts(Cache(tmp_path), ["cat", "bird"], encode_text, fingerprint="clip"))
    assert [(record.done, record.total) for record in records] == [(1, 2), (2, 2)]
    with pytest.raises(DataError, match=r"(?s)'bad'.*not finite.*'bird'"):
        drain(cache_texts(cache, ["bird"], lambda c: {"bad": torch.full((len(c), 1), torch.inf)}, fingerprint="x"))


def test_text_keys():
    assert text_key("a", "clip") == text_key("a", "clip")
    assert len({text_key("a", "clip"), text_key("b", "clip"), text_key("a", "t5"), text_key("a ", "clip")}) == 4


def test_weights_fingerprint():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    first = weights_fingerprint(module)
    assert first == weights_fingerprint(module)
    assert first != weights_fingerprint(module, {"scaling_factor": 0.13})
    assert first != weights_fingerprint(module.to(torch.bfloat16))
    module.float()[0].weight.data[0, 0] += 1
    assert first != weights_fingerprint(module)
