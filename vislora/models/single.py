"""Bases in one file: Stable Diffusion checkpoints as they are shared, and denoisers alone, whose rest a folder has.

    sd_xl_base_1.0.safetensors                                denoiser, text encoders and VAE: everything but configs
    flux1-dev.safetensors  +  a diffusers folder of FLUX.1    the denoiser alone; the rest, and configs, of the folder

The header tells the family (`formats.checkpoints`); diffusers converts the weights (`from_single_file`).
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch

from vislora.errors import ModelError
from vislora.formats.checkpoints import Checkpoint, open_checkpoint
from vislora.formats.header import read_header
from vislora.models.base import Card, Family, absent_parts, is_offline, read_index
from vislora.registry import FAMILIES

ADAPTERS = (".lora_", ".lora_down.", ".lora_A.", ".hada_w1_", ".lokr_w")
UNUSED: dict[str, Any] = {
    "safety_checker": None,
    "feature_extractor": None,
    "image_encoder": None,
    "requires_safety_checker": False,
    "add_watermarker": False,
}
"""What pipelines of some families have, and no adapter has a use for."""

PARTS = "name the diffusers folder of a base of its family with --base-parts"


def load_file(path: Path, parts: Path | None, dtype: torch.dtype, device: torch.device) -> Family:
    """Load the base in the file `path`; `parts`: a diffusers folder with its configs, and with what the file has not.

    Raises `ModelError` for a file that is no base of a known family, or a folder of another or with too little.
    """
    _require_base(path)
    checkpoint = open_checkpoint(path)
    name = checkpoint.family or ""
    if name not in FAMILIES:
        raise ModelError(f"base {path} looks like '{name}', which cannot be trained here; known: {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    kind = family.card.pipelines[0] if parts is None else _kind(family.card, path, parts)
    if any(component.startswith("te:") for component in checkpoint.components()):
        pipeline = _whole(family.card, checkpoint, kind, parts, dtype)
    else:
        pipeline = _denoiser(family.card, path, kind, parts, dtype)
    pipeline = pipeline.to(device)
    loaded: Family = family(pipeline, family.describe(parts or path, pipeline))
    return loaded


def _require_base(path: Path) -> None:
    if path.suffix != ".safetensors":
        raise ModelError(f"base {path} is no .safetensors file and no folder: save it as one, pickles are not read")
    if any(mark in key for key in read_header(path).tensors for mark in ADAPTERS):
        raise ModelError(f"base {path} is an adapter: use it with --adapter, on the base that it was trained on")


def _kind(card: Card, path: Path, parts: Path) -> str:
    """Return the pipeline's class that a folder says. Raises `ModelError` for one of another family."""
    kind = str(read_index(parts)["_class_name"])
    if kind not in card.pipelines:
        raise ModelError(f"base {path} is of family '{card.name}', but --base-parts {parts} is a {kind}")
    return kind


def _whole(card: Card, checkpoint: Checkpoint, kind: str, parts: Path | None, dtype: torch.dtype) -> Any:
    """Load a checkpoint that has text encoders; one that it has not comes from the folder, or is left out."""
    import diffusers

    path = checkpoint.path
    if parts is None and is_offline():
        raise ModelError(f"base {path} holds no configs, and without a network none can be fetched: {PARTS}")
    there = checkpoint.components()
    lost = [attribute for component, attribute in card.attributes.items() if component not in there]
    given: dict[str, Any] = dict.fromkeys([*lost, *(name.replace("text_encoder", "tokenizer") for name in lost)])
    if parts is not None and lost:
        kept = {name: value for name, value in read_index(parts).items() if isinstance(value, list)}
        others = dict.fromkeys(name for name in kept if name not in given)
        rest = getattr(diffusers, kind).from_pretrained(parts, dtype=dtype, **others)
        given = {name: getattr(rest, name) for name in given}
    loader, config = getattr(diffusers, kind), None if parts is None else str(parts)
    return loader.from_single_file(str(path), config=config, torch_dtype=dtype, **_unused(loader), **given)


def _denoiser(card: Card, path: Path, kind: str, parts: Path | None, dtype: torch.dtype) -> Any:
    """Load a denoiser into the pipeline that a folder has the rest of."""
    import diffusers

    if parts is None:
        raise ModelError(f"base {path} holds the denoiser alone: for text encoders and VAE, {PARTS}")
    attribute = card.attributes["denoiser"]
    made = getattr(diffusers, card.denoiser).from_single_file(
        str(path), config=str(parts), subfolder=attribute, torch_dtype=dtype
    )
    loader = getattr(diffusers, kind)
    return loader.from_pretrained(parts, dtype=dtype, **{**absent_parts(parts), **_unused(loader), attribute: made})


def _unused(loader: Any) -> dict[str, Any]:
    known = inspect.signature(loader.__init__).parameters
    return {name: value for name, value in UNUSED.items() if name in known}
