"""The two hashes that A1111 and kohya's tools know a LoRA by.

Spec: sd-scripts library/train_util.py, precalculate_safetensors_hashes. Both are over a file with the tensors and only
the `ss_` metadata in it, so that a user's notes do not change them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

HASHES = {"sshs_model_hash": 64, "sshs_legacy_hash": 8}
"""Their names in the metadata -> their lengths, hexadecimal."""
LEGACY_START, LEGACY_END = 0x100000, 0x110000


def of_training(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata that the hashes cover."""
    return {key: value for key, value in metadata.items() if key.startswith("ss_")}


def training_hashes(header: bytes, payload: Iterable[memoryview]) -> dict[str, str]:
    """Return both hashes of a file: the model's over its tensors, the legacy one over 64 KiB from its first MiB on.

    `header`: of a file with the metadata of `of_training` only. `payload`: the tensors' bytes in the file's order.
    """
    model, start = hashlib.sha256(), bytearray(header)
    for data in payload:
        model.update(data)
        start += data[: max(LEGACY_END - len(start), 0)]
    legacy = hashlib.sha256(start[LEGACY_START:LEGACY_END]).hexdigest()
    return dict(zip(HASHES, (model.hexdigest(), legacy[:8]), strict=True))
