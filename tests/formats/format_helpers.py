"""Adapters to test with: key listings made by other programs, filled with seeded numbers, and adapters made here."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vislora.algorithms.base import InitOptions, LayerSpec
from vislora.formats import AdapterFile, AdapterModule
from vislora.registry import ALGORITHMS, FORMATS

torch.set_num_threads(1)
REPOSITORY = Path(__file__).resolve().parents[2]
UNET_PATHS = (
    "conv_in",
    "time_embedding.linear_1",
    "down_blocks.0.attentions.0.proj_in",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
    "mid_block.resnets.0.conv1",
    "up_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj",
)
_ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
# what the keys of each format look like: every registered format needs some, and no other format may claim them
EXAMPLE_KEYS = {
    "kohya": (
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight",
        "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha",
        "lycoris_mid_block_attentions_0_proj_in.hada_w1_a",
    ),
    "diffusers": (
        f"unet.{_ATTENTION}.to_q.lora_A.weight",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_B.weight",
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
    ),
    "diffusers-old": (
        f"{_ATTENTION}.processor.to_q_lora.down.weight",
        f"unet.{_ATTENTION}.processor.to_out_lora.up.weight",
        "text_encoder.text_model.encoder.layers.0.self_attn.to_v_lora.up.weight",
    ),
    "diffusers-mid": (
        f"{_ATTENTION}.to_q.lora.down.weight",
        "unet.mid_block.resnets.0.conv1.lora.up.weight",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.up.weight",
    ),
    "peft": (
        f"base_model.model.{_ATTENTION}.to_q.lora_A.weight",
        "unet.base_model.model.mid_block.attentions.0.proj_in.lora_B.weight",
    ),
    "comfy": (
        "diffusion_model.input_blocks.4.1.proj_in.lora_A.weight",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.lora_up.weight",
    ),
    "xlabs": ("double_blocks.0.processor.qkv_lora1.down.weight", "single_blocks.0.processor.proj_lora.up.weight"),
    "bare": ("double_blocks.0.img_attn.qkv.lora_A.weight", "joint_blocks.0.x_block.attn.proj.lora_up.weight"),
    "cloneofsimo": ("unet:0:up", "unet:143:down", "text_encoder:47:up"),
}
CLIP_PATHS = ("text_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.1.mlp.fc1")
WRITABLE = [name for name in FORMATS if FORMATS[name].writable]


def fixture(name: str) -> Path:
    """Return the path of a fixture that other programs made, or skip the test."""
    folder = Path(os.environ.get("VISLORA_FIXTURES", REPOSITORY.parent / "shared" / "fixtures"))
    path = folder / name
    if not path.exists():
        pytest.skip(f"needs {name} in {folder} (or set VISLORA_FIXTURES)")
    return path


def materialise(name: str, path: Path, shrink: int = 16, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Fill a key listing with seeded numbers, its widths divided by `shrink`; write it to `path` and return it."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for key, shape in json.loads(fixture(name).read_text())["keys"].items():
        size = [side if side <= 8 else max(side // shrink, 1) for side in shape]
        alpha = torch.tensor(4.0 if "attn" in key else 2.0)
        tensors[key] = torch.randn(size, generator=generator).to(dtype) if shape else alpha.to(dtype)
    save_file(tensors, path)
    return tensors


def listed_shapes(name: str) -> dict[str, list[int]]:
    """Return key -> shape of a key listing, at the widths of the real model."""
    shapes: dict[str, list[int]] = json.loads(fixture(name).read_text())["keys"]
    return shapes


def header_only(shapes: Mapping[str, Sequence[int]], path: Path, metadata: Mapping[str, str] | None = None) -> Path:
    """Write a safetensors file of real size that takes no room: its data is a hole of zeros, in half precision."""
    entries: dict[str, object] = {"__metadata__": dict(metadata or {})}
    end = 0
    for key, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        entries[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def same_tensors(path: Path, expected: dict[str, Tensor]) -> None:
    """Assert that a file holds these tensors, bit for bit."""
    found = load_file(path)
    assert found.keys() == expected.keys()
    different = [k for k, t in expected.items() if found[k].dtype != t.dtype or not torch.equal(found[k], t)]
    assert not different


def module(path: str, component: str = "denoiser", rank: int = 4, alpha: float | None = 2.0, **more) -> AdapterModule:
    """Make a LoRA module with random numbers in both halves; `more`: shape, kind, tucker, dtype, rule."""
    shape = more.pop("shape", (24, 16))
    kind = more.pop("kind", "conv" if len(shape) > 2 else "linear")
    seeded = torch.Generator().manual_seed(sum(map(ord, path)) + rank)
    options = InitOptions(rank, tucker=more.pop("tucker", False), generator=seeded)
    slots = ALGORITHMS["lora"].init(LayerSpec(kind, shape), options)
    dtype = more.pop("dtype", torch.float32)
    tensors = {name: torch.randn(slot.shape, generator=seeded).to(dtype) for name, slot in slots.items()}
    return AdapterModule(component=component, path=path, algo="lora", tensors=tensors, alpha=alpha, **more)


def sd_adapter(text: bool = True, **more) -> AdapterFile:
    """Make an adapter for SD with convs, linears and, if `text`, a text encoder; ranks and alphas differ by module."""
    modules = []
    for index, path in enumerate(UNET_PATHS):
        conv = path.startswith("conv") or ".conv" in path or path.endswith("proj_in")
        shape = (24, 16, 3, 3) if conv and "proj" not in path else (24, 16, 1, 1) if conv else (24, 16)
        modules.append(module(path, rank=2 + index % 3, alpha=1.0 + index, shape=shape, **more))
    clip = [module(path, "te:clip_l", rank=3, alpha=0.5 + index) for index, path in enumerate(CLIP_PATHS)]
    return AdapterFile(modules=modules + (clip if text else []), family="sd", metadata={"note": "kept"})
