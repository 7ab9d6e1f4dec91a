"""vislora: LoRA adapters for Stable Diffusion and vision models - train, generate, convert.

Names are imported on first use (PEP 562): `import vislora` imports no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "load": "vislora.jobs.pipelines:load",
    "load_embedding": "vislora.jobs.pipelines:load_embedding",
    "set_strengths": "vislora.jobs.pipelines:set_strengths",
    "set_composition": "vislora.jobs.pipelines:set_composition",
    "prompt_shares": "vislora.jobs.importance:prompt_shares",
    "eject": "vislora.jobs.pipelines:eject",
    "reserve": "vislora.jobs.pipelines:reserve",
    "unreserve": "vislora.jobs.pipelines:unreserve",
    "explain": "vislora.jobs.pipelines:explain",
    "adapt": "vislora.jobs.modules:adapt",
    "save_adapter": "vislora.jobs.modules:save_adapter",
    "Strength": "vislora.inject.strength:Strength",
    "Stack": "vislora.jobs.stacks:Stack",
    "train": "vislora.jobs.train:train",
    "generate": "vislora.jobs.generate:generate",
    "convert": "vislora.jobs.convert:convert",
    "merge": "vislora.jobs.merge:merge_adapters",
    "resize": "vislora.jobs.resize:resize_adapter",
    "extract": "vislora.jobs.extract:extract",
    "Library": "vislora.jobs.residents:Library",
    "inspect": "vislora.jobs.inspect:inspect",
}
_SUBPACKAGES = ("algorithms", "formats", "inject", "models")
__all__ = ["__version__", *_PUBLIC, *_SUBPACKAGES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        module, attribute = _PUBLIC[name].split(":")
        return getattr(importlib.import_module(module), attribute)
    if name in _SUBPACKAGES:
        return importlib.import_module(f"vislora.{name}")
    raise AttributeError(f"module 'vislora' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
