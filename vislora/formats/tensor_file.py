"""Tensors from and to the bytes of a safetensors file, one at a time: no second copy of a whole file is ever made.

The bytes are those that safetensors writes (a test compares them), but for the metadata, which is in order of its keys.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from vislora.errors import AdapterFileError
from vislora.formats.hashes import HASHES, of_training, training_hashes
from vislora.formats.header import TensorInfo, header_bytes

DTYPES = {
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64,
    "F32": torch.float32, "U32": torch.uint32, "I32": torch.int32,
    "BF16": torch.bfloat16, "F16": torch.float16, "U16": torch.uint16, "I16": torch.int16,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# the bits of infinity, or where there is none of NaN: the least number that is not finite
_NOT_FINITE = {
    torch.float64: 0x7FF0 << 48, torch.float32: 0x7F80 << 16, torch.bfloat16: 0x7F80, torch.float16: 0x7C00,
    torch.float8_e5m2: 0x7C, torch.float8_e4m3fn: 0x7F,
}  # fmt: skip
_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
BUFFER = 1 << 20

Read = Callable[[TensorInfo], Tensor]
"""Returns the tensor whose bytes are at this place of an open file."""


def mapped(path: Path, stack: ExitStack) -> Read:
    """Open a file whose tensors stay in it: its pages are read when they are used. `stack` is not needed for that."""
    with open(path, "rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def read(info: TensorInfo) -> Tensor:
        if info.start == info.end:
            return torch.empty(info.shape, dtype=_dtype(info))
        flat = torch.frombuffer(memory, dtype=_dtype(info), count=info.count, offset=info.start)
        return flat.view(info.shape)

    return read


def copied(path: Path, stack: ExitStack) -> Read:
    """Open a file whose tensors are copied out of it; `stack` closes it."""
    file = stack.enter_context(open(path, "rb"))  # noqa: SIM115

    def read(info: TensorInfo) -> Tensor:
        tensor = torch.empty(info.shape, dtype=_dtype(info))
        file.seek(info.start)
        if file.readinto(_memory(tensor)) != info.end - info.start:
            raise OSError("the file became shorter while it was read")
        return tensor

    return read


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file. Tensors may share memory, be slices or lie on a GPU: each is made plain in its turn.

    The training hashes, where `metadata` has them, are made for these tensors while they are written.
    Raises `AdapterFileError` for a name or metadata that such a file cannot hold.
    """
    kept = {key: tensor.detach() for key, tensor in tensors.items()}
    entries = [(key, _NAMES[tensor.dtype], tuple(tensor.shape)) for key, tensor in kept.items()]
    hashed = bool(HASHES.keys() & metadata.keys())
    blank = {**metadata, **{key: "0" * length for key, length in HASHES.items()}} if hashed else metadata
    header, order = header_bytes(entries, blank)
    with ThreadPoolExecutor(1) as pool, open(path, "wb", buffering=BUFFER) as file:
        plain, _ = header_bytes(entries, of_training(metadata))
        hashes = pool.submit(training_hashes, plain, _payload(kept, order)) if hashed else None
        file.write(header)
        for data in _payload(kept, order):
            file.write(data)
        if hashes is not None:
            file.seek(0)
            file.write(header_bytes(entries, {**metadata, **hashes.result()})[0])


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Say whether two tensors have the same type, shape and bits."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    whole = 8 if one.nbytes % 8 == 0 else one.element_size()
    first, second = (bits(item).reshape(-1).view(f"i{whole}") for item in (one, other))
    return bool((first == second).all())


def bits(tensor: Tensor) -> NDArray[Any]:
    """Return the bits of a tensor as whole numbers of its elements' width; they share its memory where they can.

    numpy goes through them on one thread: faster than torch for the sizes of adapters, and never in the way of others.
    """
    return tensor.detach().cpu().contiguous().view(_WHOLE[tensor.element_size()]).numpy()


def is_finite(tensor: Tensor) -> bool:
    """Say whether a tensor holds neither NaN nor infinity, without a temporary of its size.

    Both lie above every finite number of the same sign when the bits are read as whole numbers.
    """
    limit = _NOT_FINITE.get(tensor.dtype)
    if limit is None:
        return not tensor.is_floating_point() or bool(torch.isfinite(tensor.float()).all())
    signed = bits(tensor)
    above = signed.view(signed.dtype.str.replace("i", "u"))
    half = 1 << (8 * signed.itemsize - 1)
    return signed.size == 0 or bool(signed.max() < limit and above.max() < half + limit)


def _payload(tensors: Mapping[str, Tensor], order: list[str]) -> Iterator[memoryview]:
    return (_memory(tensors[key].cpu().contiguous()) for key in order)


def _memory(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _dtype(info: TensorInfo) -> torch.dtype:
    if info.dtype not in DTYPES:
        raise AdapterFileError(f"tensors of type {info.dtype} cannot be read")
    return DTYPES[info.dtype]
