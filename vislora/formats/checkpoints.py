"""Base models on the disk, tensor by tensor: diffusers folders, and single files by their original names. Torch-free.

    unet/diffusion_pytorch_model.safetensors  mid_block.attentions.0.proj_in.weight  -> denoiser, the reference name
    sd_xl_base_1.0.safetensors  model.diffusion_model.middle_block.1.proj_in.weight  -> denoiser, the original name
    .. conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight     -> te:clip_g, rows of q, k and v

Specs: diffusers' folders; the checkpoints of Stable Diffusion 1.x, 2.x, XL and 3 (Stability AI), FLUX.1 (Black Forest
Labs), ComfyUI's with text encoders; open_clip's names of a text transformer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vislora.errors import ModelError, listed
from vislora.formats.comfy import ENCODERS
from vislora.formats.header import Header, TensorInfo, read_header
from vislora.formats.names import FAMILY_NAMES, FOLDERS, canonical, choose
from vislora.formats.names.hints import family_of

DENOISER_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
TEXT_PREFIXES = {
    "cond_stage_model.transformer.": "te:clip_l",
    "cond_stage_model.model.": "te:clip_l",  # SD 2: another CLIP in the place of SD 1's
    "conditioner.embedders.0.transformer.": "te:clip_l",
    "conditioner.embedders.0.model.": "te:clip_g",  # the refiner of SDXL has this one alone
    "conditioner.embedders.1.model.": "te:clip_g",
    **{f"text_encoders.{name}.transformer.": component for component, name in ENCODERS.items()},
}
OPEN_CLIP = (
    (r"transformer\.resblocks\.(\d+)\.attn\.out_proj", r"text_model.encoder.layers.\1.self_attn.out_proj"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_fc", r"text_model.encoder.layers.\1.mlp.fc1"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_proj", r"text_model.encoder.layers.\1.mlp.fc2"),
    (r"transformer\.resblocks\.(\d+)\.ln_([12])", r"text_model.encoder.layers.\1.layer_norm\2"),
    (r"ln_final", r"text_model.final_layer_norm"),
    (r"token_embedding", r"text_model.embeddings.token_embedding"),
)
IN_PROJ = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")
SLOTS = ("weight", "bias")


@dataclass(frozen=True)
class Stored:
    """A tensor of a base. rows: those of it that are the layer's, None: all."""

    file: Path
    key: str
    info: TensorInfo
    rows: tuple[int, int] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the layer's own tensor."""
        if self.rows is None:
            return self.info.shape
        return self.rows[1] - self.rows[0], *self.info.shape[1:]


Layer = tuple[str, str, str]
"""Component, name of the layer, and `weight` or `bias`."""


@dataclass
class Checkpoint:
    """A base on the disk. is_file: it is one file, whose denoiser has its original names.

    layers: where each tensor of a layer is; several places where a folder has it in several files (of other precision).
    """

    path: Path
    is_file: bool
    family: str | None
    layers: dict[Layer, list[Stored]] = field(default_factory=dict)

    def components(self) -> list[str]:
        """Return the components, the denoiser first."""
        return sorted({component for component, _, _ in self.layers}, key=lambda name: (name != "denoiser", name))


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the headers of a base: a diffusers folder, or a .safetensors file. Raises `ModelError`."""
    if not path.exists():
        raise ModelError(f"base {path} does not exist: give a diffusers folder or a .safetensors file")
    if path.is_dir():
        found = dict(_of_folder(path))
    elif path.suffix == ".safetensors":
        found = dict(_of_file(path, read_header(path)))
    else:
        raise ModelError(f"base {path} is no .safetensors file: save it as one, pickles are not read")
    if not any(component == "denoiser" for component, _, _ in found):
        raise ModelError(f"base {path} has no layers of a UNet or transformer that any family knows")
    checkpoint = Checkpoint(path, not path.is_dir(), None, found)
    checkpoint.family = _family(checkpoint)
    return checkpoint


def _of_folder(path: Path) -> Iterator[tuple[Layer, list[Stored]]]:
    if not (path / "model_index.json").is_file():
        raise ModelError(f"base {path} has no model_index.json: give the folder of a diffusers pipeline")
    merged: dict[Layer, list[Stored]] = {}
    for folder in sorted(item for item in path.iterdir() if item.is_dir() and item.name in FOLDERS):
        for file in _weights(folder):
            for key, info in read_header(file).tensors.items():
                name, _, slot = key.rpartition(".")
                layer = _component(folder.name, name), canonical(name), slot
                merged.setdefault(layer, []).append(Stored(file, key, info))
    yield from ((layer, places) for layer, places in merged.items() if layer[2] in SLOTS)


def _weights(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files and (list(folder.glob("*.bin")) or list(folder.glob("*.pt"))):
        raise ModelError(f"{folder} has pickles and no .safetensors file: save the base with safe_serialization")
    return files


def _component(folder: str, name: str) -> str:
    """Return the component of a layer: FLUX has T5 in the folder where SDXL has CLIP-G."""
    component = FOLDERS[folder]
    is_t5 = component.startswith("te:") and name.startswith(
        ("encoder.block.", "shared", "encoder.final", "encoder.embed")
    )
    return "te:t5" if is_t5 else component


def _of_file(path: Path, header: Header) -> Iterator[tuple[Layer, list[Stored]]]:
    prefix = next((item for item in DENOISER_PREFIXES if any(key.startswith(item) for key in header.tensors)), "")
    for key, info in header.tensors.items():
        text = next((item for item in TEXT_PREFIXES if key.startswith(item)), None)
        if text is not None:
            for name, slot, rows in _text_layers(key.removeprefix(text), info):
                yield (TEXT_PREFIXES[text], name, slot), [Stored(path, key, info, rows)]
        elif key.startswith(prefix):
            name, _, slot = key.removeprefix(prefix).rpartition(".")
            if slot in SLOTS:
                yield ("denoiser", name, slot), [Stored(path, key, info)]


def _text_layers(key: str, info: TensorInfo) -> Iterator[tuple[str, str, tuple[int, int] | None]]:
    """Yield (path, slot, rows) of the layers that one tensor of a text encoder holds."""
    fused = IN_PROJ.fullmatch(key)
    if fused:
        width = info.shape[0] // 3
        for place, part in enumerate(("q_proj", "k_proj", "v_proj")):
            path = f"text_model.encoder.layers.{fused[1]}.self_attn.{part}"
            yield path, fused[2], (place * width, (place + 1) * width)
        return
    name, _, slot = key.rpartition(".")
    if slot not in SLOTS:
        return
    for pattern, path in OPEN_CLIP:
        if re.fullmatch(pattern, name):
            yield re.sub(pattern, path, name), slot, None
            return
    yield canonical(name), slot, None


def _family(checkpoint: Checkpoint) -> str | None:
    names = {
        name: places[0].shape[1] if len(places[0].shape) > 1 else None
        for (component, name, slot), places in checkpoint.layers.items()
        if component == "denoiser" and slot == "weight"
    }
    others = set(checkpoint.components()) - {"denoiser"}
    if not checkpoint.is_file:
        return family_of(names, {}, others)
    family, _ = choose(names, flat=False, components=others)
    known = FAMILY_NAMES[family].tables["denoiser"] if family else None
    if known is None or not any(known.find_dotted(name) for name in names):
        raise ModelError(
            listed(f"base {checkpoint.path}: no family has these layers; first ones:", list(names)[:3])
            + "\ngive the diffusers folder of the model instead"
        )
    return family
