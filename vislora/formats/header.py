"""Safetensors headers, read and strictly validated without torch or numpy.

Spec: https://github.com/huggingface/safetensors#format - 8 bytes little-endian length, JSON, then the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vislora.errors import AdapterFileError

MAX_HEADER = 100_000_000
MAX_AXES = 64
# in the order in which safetensors stores tensors of these types
BITS = {
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F32": 32, "U32": 32, "I32": 32, "BF16": 16, "F16": 16, "U16": 16,
    "I16": 16, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8, "F8_E8M0": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I8": 8, "U8": 8,
    "BOOL": 8,
}  # fmt: skip
_ORDER = {dtype: place for place, dtype in enumerate(BITS)}
SCALARS = {
    "F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b", "U64": "<Q", "U32": "<I",
    "U16": "<H", "U8": "<B",
}  # fmt: skip
# types that are the upper bytes of a wider one
HALVES = {"BF16": "F32", "F8_E5M2": "F16"}
PICKLE_ADVICE = (
    "it is a pickle, and opening a pickle can run any code that is hidden in it, so vislora never does; "
    "--allow-pickle (allow_pickle=True) reads the tensors in it and nothing else, in a process of its own that can do "
    "nothing else; or write them to a .safetensors file, if you trust it: "
    "safetensors.torch.save_file(torch.load(FILE, weights_only=True), NEW)"
)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file. `start`, `end`: its bytes, counted from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def count(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a safetensors file holds."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    size: int


def read_header(path: Path) -> Header:
    """Read the header of `path`. Raises `AdapterFileError` that names the file and its first fault."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            start = file.read(64)
            length = _header_length(path, start, size)
            file.seek(8)
            text = file.read(length)
    except OSError as error:
        raise AdapterFileError(f"{path}: cannot be read: {error.strerror or error}") from error
    entries = _json(path, text)
    metadata = _metadata(path, entries.pop("__metadata__", {}))
    tensors = {key: _tensor(path, key, entry, 8 + length) for key, entry in entries.items()}
    _check_layout(path, tensors, 8 + length, size)
    return Header(tensors, metadata, size)


def is_pickle(path: Path) -> bool:
    """Say whether a file is a pickle, or a zip file of one, by its first bytes."""
    try:
        with open(path, "rb") as file:
            return _is_pickle(file.read(64))
    except OSError:
        return False  # reading it will tell why


def header_bytes(
    entries: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, list[str]]:
    """Return the first bytes of a file of these tensors (name, dtype, shape), and their names in the payload's order.

    Both are as safetensors has them, so that hashes are too: wide types first, then by name; padded to 8 bytes.
    Raises `AdapterFileError` for a name or metadata that is not text.
    """
    content: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    order, start = [], 0
    for name, dtype, shape in sorted(entries, key=lambda entry: (_ORDER[entry[1]], entry[0])):
        end = start + math.prod(shape) * BITS[dtype] // 8
        content[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        order.append(name)
        start = end
    odd = [key for key, value in metadata.items() if not isinstance(value, str)]
    try:
        text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        odd.append(error.object[max(error.start - 40, 0) : error.end])
    if odd:
        raise AdapterFileError(f"names and metadata of a safetensors file are text, {odd[0]!r} is not")
    if len(text) > MAX_HEADER:
        raise AdapterFileError(f"a header takes at most {MAX_HEADER:,} bytes, this one has {len(text):,}")
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text, order


def read_scalar(path: Path, key: str, info: TensorInfo) -> float:
    """Decode a tensor of one element, such as an alpha. Raises `AdapterFileError` when it is not one number."""
    if info.count != 1 or info.dtype not in (*SCALARS, *HALVES, "F8_E4M3"):
        raise AdapterFileError(f"{path}: '{key}' should be one number, it is {info.dtype} of shape {list(info.shape)}")
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))  # thousands of alphas: no object for each
    try:
        os.lseek(descriptor, info.start, os.SEEK_SET)
        data = os.read(descriptor, info.end - info.start)
    finally:
        os.close(descriptor)
    if info.dtype == "F8_E4M3":
        return _e4m3(data[0])
    wide = HALVES.get(info.dtype, info.dtype)
    return float(struct.unpack(SCALARS[wide], data.rjust(BITS[wide] // 8, b"\0"))[0])


def _e4m3(byte: int) -> float:
    """Decode an 8-bit float: sign, 4 bits of exponent (bias 7), 3 of fraction; no infinities (arXiv 2209.05433)."""
    exponent, fraction = byte >> 3 & 15, byte & 7
    if byte & 127 == 127:
        return math.nan
    size = (8 + fraction) * 2.0 ** (exponent - 10) if exponent else fraction * 2.0**-9
    return -size if byte & 128 else size


def _header_length(path: Path, start: bytes, size: int) -> int:
    if size == 0:
        raise AdapterFileError(f"{path}: the file is empty (0 bytes); download or copy it again")
    length = int.from_bytes(start[:8], "little")
    if size >= 10 and start[8:9] == b"{" and 2 <= length <= min(MAX_HEADER, size - 8):
        return length
    if _is_pickle(start):
        raise AdapterFileError(f"{path}: cannot be opened: {PICKLE_ADVICE}")
    if start.startswith((b"version https://git-lfs", b"<!DOCTYPE", b"<html")):
        raise AdapterFileError(f"{path}: this is a web page or a Git LFS pointer; download the file itself")
    if start[8:9] == b"{":
        fault = f"its header should take {length} bytes, the file has {size}: it is truncated or damaged"
        raise AdapterFileError(f"{path}: {fault}")
    raise AdapterFileError(f"{path}: not a safetensors file (it begins with {start[:12]!r})")


def _is_pickle(start: bytes) -> bool:
    return start[:2] == b"PK" or (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05" and start[8:9] != b"{")


def _json(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise AdapterFileError(f"{path}: the name '{twice}' stands twice in the header")
        return found

    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        if isinstance(error, AdapterFileError):
            raise
        raise AdapterFileError(f"{path}: its header is not valid JSON ({error}); the file is damaged") from error
    if not isinstance(entries, dict):
        raise AdapterFileError(f"{path}: its header is not a JSON object; the file is damaged")
    return entries


def _metadata(path: Path, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise AdapterFileError(f"{path}: its metadata should map text to text")
    for name in (*value, *value.values()):
        _check_text(path, name)
    return value


def _check_text(path: Path, name: str) -> None:
    """JSON can hold halves of characters, which no file can: they could be read, and never be written again."""
    if name.isascii():
        return
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise AdapterFileError(f"{path}: {name[:60]!r} in its header is not text; the file is damaged") from error


def _tensor(path: Path, key: str, entry: Any, data_start: int) -> TensorInfo:
    _check_text(path, key)
    fault = f"{path}: the header entry of '{key[:200]}' is damaged"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise AdapterFileError(f"{fault}: it needs dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise AdapterFileError(f"{fault}: unknown dtype {dtype!r}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise AdapterFileError(f"{fault}: shape {str(shape)[:100]}, data_offsets {str(offsets)[:100]}")
    if len(shape) > MAX_AXES or math.prod(side for side in shape if side) >= 2**63:
        raise AdapterFileError(f"{fault}: no tensor has the shape {str(shape)[:100]}")
    needed = math.prod(shape) * BITS[dtype] // 8
    if offsets[1] - offsets[0] != needed:
        raise AdapterFileError(f"{fault}: {dtype} {shape} takes {needed} bytes, data_offsets are {offsets}")
    return TensorInfo(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _naturals(value: Any) -> bool:
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:  # True is an int to `isinstance`
        return False
    return not value or (min(value) >= 0 and max(value) < 2**63)


def _check_layout(path: Path, tensors: dict[str, TensorInfo], data_start: int, size: int) -> None:
    """Tensors must follow each other without gaps or overlaps and end where the file ends."""
    expected = data_start
    for key, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != expected:
            word = "overlaps another tensor" if info.start < expected else "leaves a gap before it"
            raise AdapterFileError(f"{path}: '{key}' {word}; the file is damaged")
        expected = info.end
    if expected != size:
        fault = "truncated" if expected > size else "longer than its header says"
        raise AdapterFileError(f"{path}: the file is {fault}: its header describes {expected} bytes, it has {size}")
