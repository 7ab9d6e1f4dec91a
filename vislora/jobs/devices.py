"""Which device and precision a job runs with when it is left to us."""

from __future__ import annotations

import torch

from vislora.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """Return the device; `auto` is a GPU when there is one. Raises `ConfigError` when the one asked for is missing."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in present.items() if there)
    if not present[name]:
        there = ", ".join(kind for kind, is_there in present.items() if is_there)
        raise ConfigError(f"device: {name} is not available here; available: {there}")
    return torch.device(name)


def free_bytes(device: torch.device) -> int | None:
    """Return how many bytes are free on a GPU, those that torch holds in reserve among them; None where nobody says."""
    if device.type != "cuda":
        return None
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserve


def pick_precision(name: str, device: torch.device) -> str:
    """Return fp32, bf16 or fp16; `auto` (and `no`) is fp32 on a CPU, `auto` is bf16 elsewhere."""
    if name == "auto":
        return "fp32" if device.type == "cpu" else "bf16"
    return "fp32" if name == "no" else name
