"""The two hashes that A1111 and kohya's tools know a LoRA by.

Spec: sd-scripts library/train_util.py, precalculate_safetensors_hashes. Both are over a file with the tensors and only
the `ss_` metadata in it, so that a user's notes do not change them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import safetensors.torch
from torch import Tensor

LEGACY_START, LEGACY_LENGTH = 0x100000, 0x10000


def training_hashes(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Return `sshs_model_hash` and `sshs_legacy_hash` for a file of these tensors."""
    kept = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    data = safetensors.torch.save(tensors, kept)
    start = 8 + int.from_bytes(data[:8], "little")
    legacy = hashlib.sha256(data[LEGACY_START : LEGACY_START + LEGACY_LENGTH]).hexdigest()[:8]
    return {"sshs_model_hash": hashlib.sha256(memoryview(data)[start:]).hexdigest(), "sshs_legacy_hash": legacy}
