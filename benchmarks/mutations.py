"""Damage to adapter files, of every kind that a header, its numbers and a config can have. Torch-free.

A sample is an adapter as it lies on the disk: relative path -> bytes. Every mutation takes a sample and dice, and
returns another sample; those of `HARMLESS` leave what the adapter means as it is.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

Sample = dict[str, bytes]
Entries = dict[str, Any]
NUMBERS = (0, 1, -1, 2, 3, 7, 2**31, 2**32, 2**62, 2**63, 2**64, -(2**63), 10**400, 1.5, float("nan"), float("inf"))
JUNK: tuple[Any, ...] = (
    None, True, "", "8", "text", -1, 0, 10**400, 1e308, float("nan"), float("-inf"), [], [1], {}, {"a": {}}, [[[]]],
    "\ud800", "\0", "a" * 5000,
)  # fmt: skip
PATTERNS = (
    "(a+)+$", "(.*)*", "(.*.*)*x", "a?" * 60 + "a" * 60, "(", "[", "*", "", "(?=x)", r"\1", "x{99999999999}",
    "(((.{9}){9}){9}){9}", "^" * 200, "(|" * 150 + ")" * 150, ".*" * 100 + "!", "(?i)x", "\\", "[^\\",
)  # fmt: skip
DTYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "I64",
    "U8",
    "BOOL",
    "C64",
    "F33",
    "f32",
    "",
    7,
    None,
)
INFINITIES = {"F64": (b"\0" * 6 + b"\xf0\x7f", b"\xff" * 8), "F32": (b"\0\0\x80\xff", b"\xff" * 4)}


def opened(data: bytes) -> tuple[Entries, bytes]:
    """Return the header's entries and the payload of a safetensors file; no entries when it has none."""
    length = int.from_bytes(data[:8], "little")
    try:
        entries = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError):
        return {}, data[8:]
    return (entries if isinstance(entries, dict) else {}), data[8 + length :]


def closed(entries: Any, payload: bytes) -> bytes:
    """Return the file of these entries, whatever they are."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + payload


def _weights(sample: Sample, dice: random.Random) -> str:
    return dice.choice([name for name in sample if name.endswith(".safetensors")])


def raw(change: Callable[[bytearray, random.Random], bytes | bytearray]) -> Callable[[Sample, random.Random], Sample]:
    """Make a mutation of a change of one file's bytes."""

    def mutation(sample: Sample, dice: random.Random) -> Sample:
        name = dice.choice(sorted(sample))
        return {**sample, name: bytes(change(bytearray(sample[name]), dice))}

    return mutation


def headed(change: Callable[[Entries, bytes, random.Random], Any]) -> Callable[[Sample, random.Random], Sample]:
    """Make a mutation of a change of a header's entries; it returns new entries, or (entries, payload)."""

    def mutation(sample: Sample, dice: random.Random) -> Sample:
        name = _weights(sample, dice)
        entries, payload = opened(sample[name])
        if not any(key != "__metadata__" for key in entries):
            return sample
        changed = change(entries, payload, dice)
        new, rest = changed if isinstance(changed, tuple) else (changed, payload)
        return {**sample, name: closed(new, rest)}

    return mutation


def _key(entries: Entries, dice: random.Random) -> str:
    return dice.choice([key for key in entries if key != "__metadata__"])


def _truncated(data: bytearray, dice: random.Random) -> bytes:
    return bytes(data[: dice.randrange(len(data) + 1)])


def _flipped(data: bytearray, dice: random.Random) -> bytearray:
    for _ in range(dice.randrange(1, 9) if data else 0):
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    return data


def _flipped_near_start(data: bytearray, dice: random.Random) -> bytearray:
    for _ in range(dice.randrange(1, 4) if data else 0):
        data[dice.randrange(min(len(data), 1500))] = dice.choice(b'0123456789"{}[],:.\\\xff\x00AZaz_')
    return data


def _cut(data: bytearray, dice: random.Random) -> bytearray:
    start = dice.randrange(len(data) + 1)
    del data[start : start + dice.randrange(1, 40)]
    return data


def _stuffed(data: bytearray, dice: random.Random) -> bytearray:
    start = dice.randrange(len(data) + 1)
    data[start:start] = dice.randbytes(dice.randrange(1, 40))
    return data


def _length(data: bytearray, dice: random.Random) -> bytearray:
    data[:8] = (
        dice.choice((0, 1, 2, 7, 2**31, 2**63, 2**64 - 1, len(data), len(data) - 8, dice.randrange(4096)))
    ).to_bytes(8, "little")
    return data


def _offsets(entries: Entries, payload: bytes, dice: random.Random) -> Entries:
    key, other = _key(entries, dice), _key(entries, dice)
    offsets = [dice.choice(NUMBERS) if dice.random() < 0.5 else dice.randrange(len(payload) + 1) for _ in range(2)]
    return {
        **entries,
        key: {**entries[key], "data_offsets": dice.choice((offsets, entries[other].get("data_offsets")))},
    }


def _shape(entries: Entries, payload: bytes, dice: random.Random) -> Entries:
    key = _key(entries, dice)
    old = entries[key].get("shape")
    shape = list(old) if isinstance(old, list) else []
    if shape and dice.random() < 0.7:
        shape[dice.randrange(len(shape))] = dice.choice(NUMBERS)
    else:
        choices: tuple[Any, ...] = ([], [0], [1] * 200, [2**40, 0, 2**40], "4", None, [shape], [*shape, 1], shape[::-1])
        shape = dice.choice(choices)
    return {**entries, key: {**entries[key], "shape": shape}}


def _grown(entries: Entries, payload: bytes, dice: random.Random) -> Entries:
    key = _key(entries, dice)
    side = dice.choice((2**20, 2**34, 2**61))
    return {**entries, key: {"dtype": "U8", "shape": [side], "data_offsets": [0, side]}}


def _swapped(entries: Entries, payload: bytes, dice: random.Random) -> Entries:
    one, two = _key(entries, dice), _key(entries, dice)
    return {**entries, one: entries[two], two: entries[one]}


def _transposed(entries: Entries, payload: bytes, dice: random.Random) -> Entries:
    return {
        key: {**entry, "shape": list(reversed(entry["shape"]))}
        if isinstance(entry, dict) and isinstance(entry.get("shape"), list) and dice.random() < 0.3
        else entry
        for key, entry in entries.items()
    }


def _dtype(entries: Entries, payload: bytes, dice: random.Random) -> Entries:
    key = _key(entries, dice)
    return {**entries, key: {**entries[key], "dtype": dice.choice(DTYPES)}}


def _reread(entries: Entries, payload: bytes, dice: random.Random) -> Entries:
    """Give all tensors another type of the same width."""
    other = {"F32": dice.choice(("I32", "U32")), "F16": dice.choice(("BF16", "I16")), "F64": "I64"}
    return {
        key: {**entry, "dtype": other.get(entry.get("dtype"), entry.get("dtype"))} if key != "__metadata__" else entry
        for key, entry in entries.items()
    }


def _twice(entries: Entries, payload: bytes, dice: random.Random) -> bytes:
    key = _key(entries, dice)
    again = json.dumps({key: entries[dice.choice([key, _key(entries, dice)])]})[1:]
    return (json.dumps(entries)[:-1] + "," + again).encode("utf-8", "surrogatepass")


def _dropped(entries: Entries, payload: bytes, dice: random.Random) -> tuple[Entries, bytes]:
    """Leave out a tensor and its bytes."""
    return _without(entries, payload, {_key(entries, dice)})


def _without(entries: Entries, payload: bytes, gone: set[str]) -> tuple[Entries, bytes]:
    kept, parts, start = {}, [], 0
    for key, entry in entries.items():
        if key in gone:
            continue
        if key == "__metadata__":
            kept[key] = entry
            continue
        data = payload[slice(*entry["data_offsets"])]
        kept[key] = {**entry, "data_offsets": [start, start + len(data)]}
        parts.append(data)
        start += len(data)
    return kept, b"".join(parts)


def _reordered(entries: Entries, payload: bytes, dice: random.Random) -> tuple[Entries, bytes]:
    keys = list(entries)
    dice.shuffle(keys)
    return _without({key: entries[key] for key in keys}, payload, set())


def _renamed(entries: Entries, payload: bytes, dice: random.Random) -> Entries:
    key = _key(entries, dice)
    place = dice.randrange(len(key) + 1)
    junk = dice.choice(("0", ".", "_", "..", "\0", "é", "\ud800", "\n", "9" * 400, "a" * 3000, ".lora_A", "/../", ""))
    name = dice.choice((key[:place] + junk + key[place + dice.randrange(3) :], junk, key.replace("lora", "hada")))
    return {dice.choice((name, name, name[::-1])) if item == key else item: value for item, value in entries.items()}


def _copied_under(entries: Entries, payload: bytes, dice: random.Random) -> tuple[Entries, bytes]:
    """Repeat some tensors under the names of another format or module."""
    old, new = dice.choice(
        (("lora_unet_", "unet."), ("unet.", "lora_unet_"), ("unet.", "base_model.model."), ("0", "1"), ("down", "up"))
    )
    more = {key.replace(old, new): entry for key, entry in entries.items() if old in key and dice.random() < 0.5}
    size = len(payload)
    added, parts = {}, []
    for key, entry in more.items():
        data = payload[slice(*entry["data_offsets"])]
        added[key] = {**entry, "data_offsets": [size, size + len(data)]}
        size += len(data)
        parts.append(data if dice.random() < 0.7 else dice.randbytes(len(data)))
    return {**entries, **added}, payload + b"".join(parts)


def _not_finite(entries: Entries, payload: bytes, dice: random.Random) -> tuple[Entries, bytes]:
    entry = entries[_key(entries, dice)]
    start, end = entry["data_offsets"]
    choice = dice.choice(INFINITIES.get(entry["dtype"], (b"\xff\x7f", b"\0\x7c", b"\xff")))
    place = dice.randrange(start, end, len(choice)) if end > start else start
    return entries, payload[:place] + choice + payload[place + len(choice) :]


def _noise(entries: Entries, payload: bytes, dice: random.Random) -> tuple[Entries, bytes]:
    return entries, dice.randbytes(len(payload))


def _scalar(entries: Entries, payload: bytes, dice: random.Random) -> tuple[Entries, bytes]:
    """Give an alpha, or a new one, an odd value."""
    found = [key for key in entries if key.endswith(".alpha")]
    key = dice.choice(found) if found else _key(entries, dice).rsplit(".lora", 1)[0] + ".alpha"
    number = struct.pack("<f", dice.choice((0.0, -1.0, 1e-45, 3e38, float("inf"), float("nan"))))
    kept, rest = _without(entries, payload, {key})
    kept[key] = {"dtype": "F32", "shape": dice.choice(([], [1], [1, 1])), "data_offsets": [len(rest), len(rest) + 4]}
    return kept, rest + number


def _entry(entries: Entries, payload: bytes, dice: random.Random) -> Entries:
    key = _key(entries, dice)
    fields = dict(entries[key])
    fields[dice.choice([*fields, "more"])] = dice.choice(JUNK)
    fields.pop(dice.choice(["", *fields]), None)
    return {**entries, key: dice.choice((fields, fields, *JUNK))}


def _nested(entries: Entries, payload: bytes, dice: random.Random) -> bytes:
    deep = dice.choice((b'{"a":', b"[")) * dice.choice((100, 900, 3000, 100_000))
    return dice.choice((deep, json.dumps(entries)[:-1].encode() + b',"x":' + deep))


def _metadata(entries: Entries, payload: bytes, dice: random.Random) -> Entries:
    old = entries.get("__metadata__")
    metadata: Any = dict(old) if isinstance(old, dict) else {}
    names = [*metadata, "lora_adapter_metadata", "ss_base_model_version", "vislora.base", "sshs_model_hash"]
    for _ in range(dice.randrange(1, 3)):
        metadata[dice.choice(names)] = dice.choice((*JUNK, "[" * 5000, "{", "[]", '"a"', "{}"))
    return {**entries, "__metadata__": dice.choice((metadata, metadata, metadata, *JUNK))}


def _configured(sample: Sample, dice: random.Random) -> Sample:
    """Put nonsense into adapter_config.json, or into diffusers' counterpart in the metadata."""
    configs = [name for name in sample if name.endswith(".json")]
    if configs:
        name = dice.choice(configs)
        try:
            config = json.loads(sample[name])
        except (ValueError, RecursionError):
            return sample
        config = _nonsense(config if isinstance(config, dict) else {}, "", dice)
        return {**sample, name: json.dumps(config).encode("utf-8", "surrogatepass")}
    name = _weights(sample, dice)
    entries, payload = opened(sample[name])
    metadata = entries.get("__metadata__")
    metadata = dict(metadata) if isinstance(metadata, dict) else {}
    try:
        packed = json.loads(metadata.get("lora_adapter_metadata") or "{}")
    except (TypeError, ValueError, RecursionError):
        packed = {}
    packed = _nonsense(packed if isinstance(packed, dict) else {}, "unet.", dice)
    metadata["lora_adapter_metadata"] = json.dumps(packed)
    return {**sample, name: closed({**entries, "__metadata__": metadata}, payload)}


def _nonsense(config: Entries, prefix: str, dice: random.Random) -> Entries:
    names = ("r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "peft_type")
    found = dict(config)
    for _ in range(dice.randrange(1, 4)):
        patterns = {dice.choice(PATTERNS): dice.choice((*JUNK, 4, 8, 2.5)) for _ in range(dice.randrange(1, 4))}
        value = dice.choice((patterns, dice.choice(JUNK)))
        found[prefix + dice.choice((*names, "rank_pattern", "alpha_pattern"))] = value
    return found


MUTATIONS: dict[str, Callable[[Sample, random.Random], Sample]] = {
    "truncated": raw(_truncated),
    "bits flipped": raw(_flipped),
    "header bytes changed": raw(_flipped_near_start),
    "bytes cut out": raw(_cut),
    "bytes put in": raw(_stuffed),
    "header length": raw(_length),
    "offsets": headed(_offsets),
    "shape": headed(_shape),
    "huge tensor": headed(_grown),
    "entries swapped": headed(_swapped),
    "shapes reversed": headed(_transposed),
    "dtype": headed(_dtype),
    "dtypes of the same width": headed(_reread),
    "duplicate key": headed(_twice),
    "key left out": headed(_dropped),
    "key renamed": headed(_renamed),
    "second namespace": headed(_copied_under),
    "not finite": headed(_not_finite),
    "random payload": headed(_noise),
    "alpha": headed(_scalar),
    "damaged entry": headed(_entry),
    "deep nesting": headed(_nested),
    "metadata": headed(_metadata),
    "config": _configured,
    "order of payload": headed(_reordered),
}
HARMLESS = frozenset({"order of payload"})


def mutated(sample: Sample, dice: random.Random) -> tuple[str, Sample]:
    """Return the name of a mutation and its result; one in four is followed by a second one, `a + b`."""
    name = dice.choice(list(MUTATIONS))
    result = MUTATIONS[name](sample, dice)
    if dice.random() < 0.25:
        second = dice.choice(list(MUTATIONS))
        try:
            return f"{name} + {second}", MUTATIONS[second](result, dice)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            return name, result  # too damaged to be damaged further
    return name, result
