"""Our bytes are safetensors' bytes; what is not finite is found in every type."""

from __future__ import annotations

import hashlib
import json
import math
from contextlib import ExitStack

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from vislora.errors import AdapterFileError
from vislora.formats.header import read_header, read_scalar
from vislora.formats.tensor_file import DTYPES, copied, is_finite, mapped, same_bits, write_tensors

FLOATS = [dtype for dtype in DTYPES.values() if dtype.is_floating_point]


def tensors():
    """One of every type, in several shapes; names that need escapes; one empty."""
    seeded = torch.Generator().manual_seed(0)
    found = {}
    for number, (name, dtype) in enumerate(DTYPES.items()):
        raw = torch.randint(0, 2, (number + 1, 3 * dtype.itemsize), generator=seeded, dtype=torch.uint8)
        found[f"b.{name}"] = raw.view(dtype) if dtype != torch.bool else raw.bool()
        found[f"a.{name}"] = found[f"b.{name}"][0, 0].clone()
    return {**found, 'é"\\\n\u2028': torch.ones(2, 2), "empty": torch.zeros(0, 4)}


@pytest.mark.parametrize("metadata", [{}, {"note": 'a\t"b"\\ \x1f é'}])
def test_the_bytes_are_those_of_safetensors(metadata, tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, tensors(), metadata)
    assert path.read_bytes() == save(tensors(), metadata or None)
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(tensors())
        assert (file.metadata() or {}) == metadata
    assert all(same_bits(found, tensors()[key]) for key, found in load_file(path).items())


def test_metadata_is_in_order_of_its_keys_and_bytes_never_change(tmp_path):
    for name, keys in (("a", "xyzab"), ("b", "bazyx")):
        write_tensors(tmp_path / name, tensors(), {key: key for key in keys})
    data = (tmp_path / "a").read_bytes()
    assert data == (tmp_path / "b").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    assert list(json.loads(data[8 : 8 + length])["__metadata__"]) == ["a", "b", "x", "y", "z"]


def test_slices_transposed_and_shared_tensors_are_written_as_what_they_look_like(tmp_path):
    whole = torch.arange(24.0).view(4, 6)
    odd = {"rows": whole[1:3], "columns": whole[:, 1:3], "turned": whole.T, "same": whole, "again": whole}
    write_tensors(tmp_path / "a", {**odd, "trained": torch.nn.Parameter(whole)}, {})
    found = load_file(tmp_path / "a")
    assert all(torch.equal(found[key], tensor) for key, tensor in odd.items())
    assert torch.equal(found["trained"], whole)


@pytest.mark.parametrize("opened", [mapped, copied])
def test_every_type_is_read_back(opened, tmp_path):
    write_tensors(tmp_path / "a", tensors(), {})
    header = read_header(tmp_path / "a")
    with ExitStack() as stack:
        read = opened(tmp_path / "a", stack)
        assert all(same_bits(read(header.tensors[key]), tensor) for key, tensor in tensors().items())


@pytest.mark.parametrize("size", [10, 300_000])
def test_training_hashes_are_those_of_sd_scripts(size, tmp_path):
    metadata = {"ss_a": "1", "note": "mine", "sshs_model_hash": "", "sshs_legacy_hash": ""}
    made = {"a": torch.arange(float(size)), "b": torch.ones(3, dtype=torch.float16)}
    write_tensors(tmp_path / "a", made, metadata)
    data = save(made, {"ss_a": "1"})
    start = 8 + int.from_bytes(data[:8], "little")
    found = read_header(tmp_path / "a").metadata
    assert found["sshs_model_hash"] == hashlib.sha256(data[start:]).hexdigest()
    assert found["sshs_legacy_hash"] == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    assert all(torch.equal(load_file(tmp_path / "a")[key], tensor) for key, tensor in made.items())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_bit_pattern_is_finite_or_not_as_torch_says(dtype):
    if dtype.itemsize > 2:
        ends = [torch.finfo(dtype).max, torch.finfo(dtype).min, torch.finfo(dtype).tiny, -0.0, math.inf, -math.inf]
        values = torch.tensor([*ends, math.nan, -math.nan], dtype=dtype)
    else:
        kind = {1: torch.uint8, 2: torch.int16}[dtype.itemsize]
        values = torch.arange(1 << 8 * dtype.itemsize, dtype=torch.int32).to(kind).view(dtype)
        values = values[:: 1 if dtype.itemsize == 1 else 37]
    for value in values:
        assert is_finite(value.clone()) == bool(torch.isfinite(value.double()))
    assert is_finite(torch.zeros(0, dtype=dtype))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.int32, torch.uint16, torch.uint8], ids=str)
def test_scalars_of_every_type(dtype, tmp_path):
    if "fnuz" in str(dtype):
        pytest.skip("nobody writes an alpha in it")
    for number in (0.0, 0.015625, 1.0, 4.0, 112.0) + ((-1.5,) if dtype.is_floating_point else ()):
        tensor = torch.tensor(number).to(dtype)
        write_tensors(tmp_path / "a", {"a": tensor}, {})
        assert read_scalar(tmp_path / "a", "a", read_header(tmp_path / "a").tensors["a"]) == float(tensor)


@pytest.mark.parametrize(("key", "metadata"), [("\ud800", {}), ("a", {"b": "\udfff"}), ("a", {"b": 1})])
def test_what_is_not_text_is_never_written(key, metadata, tmp_path):
    with pytest.raises(AdapterFileError, match="are text"):
        write_tensors(tmp_path / "a", {key: torch.ones(1)}, metadata)
    assert not (tmp_path / "a").exists()
