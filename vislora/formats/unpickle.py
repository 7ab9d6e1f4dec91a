"""Write the tensors of a pickle (torch.save) into a .safetensors file. A program of its own, which nothing imports:

    python -I -S unpickle.py SOURCE DESTINATION ROLE

A pickle is a program that calls whatever it names. Here it finds only the names in `KNOWN`, and these make plain
tuples: nothing of torch is imported, no named function is called. After set-up the process can open no file, import
nothing, start nothing (an audit hook, and the system's limits where it has them). Standard library only.
It ends with 0, or with 1 and one line that says why.

Spec: torch/serialization.py - a zip with data.pkl, byteorder and data/N; before 1.6 magic number, protocol, system,
object and keys as five pickles, then the raw storages.
"""

from __future__ import annotations

import array
import codecs
import itertools
import json
import math
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, BinaryIO, NamedTuple, NoReturn

BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8, "BOOL": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1,
}  # fmt: skip
STORAGES = {
    "Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16", "Long": "I64", "Int": "I32", "Short": "I16",
    "Char": "I8", "Byte": "U8", "Bool": "BOOL", "ComplexFloat": "C64", "Untyped": "U8",
}  # fmt: skip
DTYPES = {
    "float64": "F64", "double": "F64", "float32": "F32", "float": "F32", "float16": "F16", "half": "F16",
    "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "complex64": "C64", "bool": "BOOL",
    "int64": "I64", "long": "I64", "int32": "I32", "int": "I32", "int16": "I16", "short": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8",
}  # fmt: skip
WORDS: dict[int, Any] = {1: "B", 2: "H", 4: "I", 8: "Q"}
# what programs put around a state dict: these names are left out of its keys
WRAPPERS = ("state_dict", "networks", "network", "model", "module", "weights", "params")
MAGIC, PROTOCOL, MIB = 0x1950A86A20F9469CFC6C, 1001, 1 << 20
EMBEDDING = "<embed>"  # cloneofsimo's mark of an embedding in the metadata
MOST_NODES, MOST_LEVELS, MOST_AXES, LONGEST = 500_000, 16, 32, 2000


class Refused(Exception):
    """The file is damaged, or wants what no file of tensors needs."""


class Kind(NamedTuple):
    """A class of torch storages, or a torch dtype: nothing but the name that safetensors has for it."""

    dtype: str


class Storage(NamedTuple):
    """A run of numbers in the file. `length`: in numbers of `dtype`."""

    key: str
    dtype: str
    length: int


class Tensor(NamedTuple):
    """Where a tensor's numbers are in its storage. `length`, `offset`, `strides`: in numbers of `dtype`."""

    storage: Storage
    dtype: str
    length: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Call(NamedTuple):
    """What stands for a function or class of torch: a function of this file, whose attributes cannot be set."""

    make: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        """Make what the function or class would."""
        return self.make(*args)


class Table(dict):
    """An OrderedDict. The attributes that a state dict has beside its items (`_metadata`) are passed over."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Take no attributes."""


def _size(thing: Storage | Tensor) -> int:
    return thing.length * BYTES[thing.dtype]


def _naturals(*values: Any) -> bool:
    return all(type(value) is int and 0 <= value < 2**63 for value in values)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any, dtype: str = "") -> Tensor:
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise Refused("a tensor is put together from other things than a storage, a shape and strides")
    if not _naturals(offset, *shape, *strides) or len(shape) != len(strides) or len(shape) > MOST_AXES:
        raise Refused("a tensor's shape, strides or offset is damaged")
    dtype = dtype or storage.dtype
    tensor = Tensor(storage, dtype, math.prod(shape), offset, shape, strides)
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if tensor.length and last >= _size(storage) // BYTES[dtype]:
        raise Refused(f"a tensor of shape {list(shape)[:8]} reaches beyond its storage")
    return tensor


def _tensor_v3(storage: Any, offset: Any, shape: Any, strides: Any, _: Any, __: Any, dtype: Any, *___: Any) -> Tensor:
    if not isinstance(dtype, Kind):
        raise Refused("a tensor's dtype is damaged")
    return _tensor(storage, offset, shape, strides, dtype=dtype.dtype)


def _parameter(tensor: Any, *_: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise Refused("a tensor is made of something else than a tensor")
    return tensor


def _from_type(make: Any, _: Any, args: Any, *__: Any) -> Tensor:
    return _parameter(make(*args) if isinstance(make, Call) and isinstance(args, tuple) else None)


def _nothing(*_: Any) -> None:  # stands for what may be named and nobody needs: a device, a class of tensors
    return None


KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): Call(Table),
    ("torch._utils", "_rebuild_tensor"): Call(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): Call(_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): Call(_tensor_v3),
    ("torch._utils", "_rebuild_parameter"): Call(_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): Call(_parameter),
    ("torch._tensor", "_rebuild_from_type_v2"): Call(_from_type),
    ("torch.nn.parameter", "Parameter"): Call(_nothing),
    ("torch", "Tensor"): Call(_nothing),
    ("torch", "Size"): Call(tuple),
    ("torch", "device"): Call(_nothing),
    ("torch.serialization", "_get_layout"): Call(_nothing),
    **{("torch", f"{name}Storage"): Kind(dtype) for name, dtype in STORAGES.items()},
    ("torch.storage", "UntypedStorage"): Kind("U8"),
    **{("torch", name): Kind(dtype) for name, dtype in DTYPES.items()},
}


class Reader(pickle.Unpickler):
    """An unpickler to which the names of `KNOWN` are all there is. `storages`: those that were named, by key."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name. Raises `Refused` for any other."""
        if (module, name) not in KNOWN:
            raise Refused(f"it names '{module[:80]}.{name[:80]}', which no file of tensors needs")
        return KNOWN[module, name]

    def persistent_load(self, pid: Any) -> Storage:
        """Return a storage: ('storage', class, key, device, length), before torch 1.6 with a None at the end."""
        if not isinstance(pid, tuple) or pid[:1] != ("storage",) or len(pid) != 5 + (pid[5:] == (None,)):
            raise Refused("it refers to something that is no storage")
        kind, key, length = pid[1], pid[2], pid[4]
        if not isinstance(kind, Kind) or not isinstance(key, str) or not _naturals(length):
            raise Refused("a storage is damaged")
        storage = Storage(key, kind.dtype, length)
        if self.storages.setdefault(key, storage) != storage:
            raise Refused(f"storage '{key[:80]}' is described in two ways")
        return storage


class ZipFile:
    """torch's files since 1.6. Everything in them is stored as it is: whatever is compressed is refused."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._archive = zipfile.ZipFile(file)
        infos = self._archive.infolist()
        self._infos = {info.filename: info for info in infos}
        if any(info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size for info in infos):
            raise Refused("it is compressed, which torch's files never are")
        if len(self._infos) < len(infos) or sum(info.file_size for info in infos) > size:
            raise Refused("its parts overlap or are named twice")
        found = [name for name in self._infos if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(found) != 1:
            raise Refused("a zip file without data.pkl, not one of torch's")
        self._root = found[0].removesuffix("data.pkl")
        if f"{self._root}constants.pkl" in self._infos:
            raise Refused("a TorchScript program, not a file of tensors")
        reader = Reader(self._archive.open(found[0]))  # type: ignore[arg-type]
        self.content, self.storages = reader.load(), reader.storages
        self.swapped = b"big" in [self._archive.read(name) for name in self._infos if name == f"{self._root}byteorder"]

    def read(self, storage: Storage) -> bytes:
        """Return the bytes of a whole storage."""
        info = self._infos.get(f"{self._root}data/{storage.key}")
        if info is None or info.file_size != _size(storage):
            raise Refused(f"storage '{storage.key[:80]}' is missing or has another size")
        return self._archive.read(info)


class OldFile:
    """torch's files before 1.6."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        if Reader(file).load() != MAGIC or Reader(file).load() != PROTOCOL:
            raise Refused("a pickle that torch did not write")
        self.swapped = Reader(file).load().get("little_endian") is False
        reader = Reader(file)
        self.content, self.storages = reader.load(), reader.storages
        keys = Reader(file).load()
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or {*keys} != {*self.storages}:
            raise Refused("its list of storages is damaged")
        self._file, self._places = file, dict(_places(file, size, [self.storages[key] for key in keys]))

    def read(self, storage: Storage) -> bytes:
        """Return the bytes of a whole storage."""
        self._file.seek(self._places[storage.key])
        return self._file.read(_size(storage))


def _places(file: BinaryIO, size: int, storages: list[Storage]) -> Iterator[tuple[str, int]]:
    for storage in storages:
        if int.from_bytes(file.read(8), "little") != storage.length:
            raise Refused(f"storage '{storage.key[:80]}' is missing or has another size")
        yield storage.key, file.tell()
        if file.seek(_size(storage), os.SEEK_CUR) > size:
            raise Refused("the file is truncated")


def flatten(content: Any, role: str) -> tuple[dict[str, Tensor | float], dict[str, str]]:
    """Return the tensors by key, and what else there is as text: `{"state_dict": {"a.b": t}}` -> `{"a.b": t}`.

    `role`: what a bare list [up, down, up, down, ...] is for, and whether all tensors are embeddings. A number at a key
    that ends in `.alpha` counts as a tensor.
    """
    found, others = {}, {}
    for key, value in _leaves(_named(content, role), "", 0, itertools.count()):
        if key in found or key in others or key == "__metadata__":
            raise Refused(f"the name '{key[:200]}' stands for two things")
        if isinstance(value, Tensor) or (type(value) in (int, float) and key.endswith(".alpha")):
            found[key] = value
        else:
            others[key] = str(value)[:LONGEST] if isinstance(value, (str, int, float)) else type(value).__name__
    marks = dict.fromkeys(found, EMBEDDING) if role == "embeddings" else {}
    return found, {**others, **marks}


def _named(content: Any, role: str) -> Any:
    pairs = isinstance(content, list) and len(content) % 2 == 0 and all(isinstance(item, Tensor) for item in content)
    if not pairs:
        return content
    return {f"{role}:{index // 2}:{('up', 'down')[index % 2]}": item for index, item in enumerate(content)}


def _leaves(value: Any, prefix: str, level: int, nodes: Iterator[int]) -> Iterator[tuple[str, Any]]:
    if level > MOST_LEVELS or next(nodes) > MOST_NODES:
        raise Refused("it nests too deeply, or holds too many things")
    if isinstance(value, dict):
        items: Any = value.items()
    elif isinstance(value, (list, tuple)) and not isinstance(value, (Tensor, Storage, Kind, Call)):
        items = enumerate(value)
    else:
        yield prefix, value
        return
    for name, item in items:
        if type(name) not in (str, int) or len(str(name)) > LONGEST:
            raise Refused("a name in it is neither text nor a number, or very long")
        unwrapped = not prefix and name in WRAPPERS and isinstance(item, dict)
        key = "" if unwrapped else f"{prefix}.{name}" if prefix else str(name)
        yield from _leaves(item, key, level + 1, nodes)


def pieces(tensor: Tensor, data: memoryview, swapped: bool) -> Iterator[bytes | memoryview]:
    """Yield the numbers of a tensor in row-major, little-endian order. `data`: its whole storage."""
    width = BYTES[tensor.dtype]
    for piece in _runs(tensor, data, width):
        if not swapped or width == 1:
            yield piece
            continue
        numbers = array.array("I" if tensor.dtype == "C64" else WORDS[width], bytes(piece))
        numbers.byteswap()
        yield numbers.tobytes()


def _runs(tensor: Tensor, data: memoryview, width: int) -> Iterator[bytes | memoryview]:
    axes = [axis for axis in zip(tensor.shape, tensor.strides, strict=True) if axis[0] != 1]
    dense = [math.prod(size for size, _ in axes[index + 1 :]) for index in range(len(axes))]
    if tensor.length == 0 or [stride for _, stride in axes] == dense:
        yield data[tensor.offset * width : (tensor.offset + tensor.length) * width]
        return
    numbers = data[: len(data) // width * width].cast(WORDS[width])
    *outer, (length, stride) = axes
    for index in itertools.product(*(range(count) for count, _ in outer)):
        start = tensor.offset + sum(place * step for place, (_, step) in zip(index, outer, strict=True))
        if stride:
            yield numbers[start : start + (length - 1) * stride + 1 : stride].tobytes()
        else:
            yield numbers[start : start + 1].tobytes() * length


def write(file: BinaryIO, found: Mapping[str, Tensor | float], metadata: Mapping[str, str], source: Any) -> None:
    """Write a safetensors file, the tensors in their order. `source`: a `ZipFile` or an `OldFile`."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, value in found.items():
        dtype, shape, size = (value.dtype, value.shape, _size(value)) if isinstance(value, Tensor) else ("F64", (), 8)
        start, end = end, end + size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    key, data = None, memoryview(b"")
    for value in found.values():
        if not isinstance(value, Tensor):
            file.write(struct.pack("<d", value))
            continue
        if value.storage.key != key:
            key, data = value.storage.key, memoryview(source.read(value.storage))
        for piece in pieces(value, data, source.swapped):
            file.write(piece)
    file.flush()


def confine(size: int) -> None:
    """Give up all that is not needed any more: files, imports, processes, sockets, and memory and time without end."""
    for name in ("cp437", "utf-8", "ascii"):
        codecs.lookup(name)  # what zipfile and json would import later

    def refuse(event: str, _: tuple[Any, ...]) -> None:
        if event != "array.__new__":
            raise Refused(f"it tried to do this: {event[:80]}")

    limits = {"RLIMIT_AS": 1024 * MIB + 3 * size, "RLIMIT_CPU": 20 + size // (20 * MIB)}
    limits |= {"RLIMIT_FSIZE": most_bytes(size) + 128 * MIB, "RLIMIT_NOFILE": 0, "RLIMIT_NPROC": 0, "RLIMIT_CORE": 0}
    with suppress(ImportError):  # Windows has none
        import resource

        for name, limit in limits.items():
            with suppress(AttributeError, ValueError, OSError):  # a system without this one, or with a lower one
                resource.setrlimit(getattr(resource, name), (limit, limit))
    sys.addaudithook(refuse)


def most_bytes(size: int) -> int:
    """Return how many bytes the tensors of a file of `size` bytes may take: tensors may share a storage."""
    return 64 * MIB + 8 * size


def convert(source: BinaryIO, destination: BinaryIO, role: str, size: int) -> None:
    """Write the tensors of `source` to `destination`. Raises `Refused`, or whatever a damaged pickle leads to."""
    zipped = source.read(2) == b"PK"
    source.seek(0)
    opened = ZipFile(source, size) if zipped else OldFile(source, size)
    found, metadata = flatten(opened.content, role)
    needed = sum(_size(value) for value in found.values() if isinstance(value, Tensor))
    if needed > most_bytes(size):
        raise Refused(f"its tensors would take {needed:,} bytes, the file has {size:,}")
    write(destination, found, metadata, opened)


def main(source: str, destination: str, role: str) -> NoReturn:
    """Convert, and end the process."""
    with open(source, "rb") as read, open(destination, "wb") as written:
        size = os.fstat(read.fileno()).st_size
        confine(size)
        said = ""
        try:
            convert(read, written, role, size)
        except Refused as error:
            said = str(error)
        except MemoryError:
            said = "it takes more memory than such a file needs"
        except OSError as error:
            said = f"its tensors cannot be read or written down: {error.strerror or error}"
        except BaseException as error:
            said = f"it is truncated or damaged ({type(error).__name__}: {str(error)[:200]})"
        os.write(1, "".join(letter if letter.isprintable() else "?" for letter in said).encode("utf-8"))
        os._exit(1 if said else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
