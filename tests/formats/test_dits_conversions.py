"""Original names and the order of fused rows, against diffusers' conversions of whole checkpoints and of LoRA files.

Those conversions only rename, cut and reorder rows, so a layer's up projection can stand for its weight.
"""

from __future__ import annotations

import re

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as loras
from diffusers.loaders import single_file_utils as checkpoints
from dit_configs import DITS, Dit
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vislora import formats
from vislora.formats.names import FAMILY_NAMES, Found, NameTable

LAYERS = (nn.Linear, nn.Conv2d, nn.Conv3d)
SANA_TABLES = ("final_layer", "blocks.0", "blocks.1")
# model -> its conversion, and the parameters that it wants beside those of layers
CHECKPOINTS = {
    "flux2 dev": ("convert_flux2_transformer_checkpoint_to_diffusers", ()),
    "flux2 klein 4B": ("convert_flux2_transformer_checkpoint_to_diffusers", ()),
    "z-image": ("convert_z_image_transformer_checkpoint_to_diffusers", ()),
    "lumina2": ("convert_lumina2_to_diffusers", ()),
    "wan i2v 14B": ("convert_wan_transformer_to_diffusers", ()),
    "wan vace": ("convert_wan_transformer_to_diffusers", ()),
    "hunyuan-video": ("convert_hunyuan_video_transformer_to_diffusers", ()),
    "sana 1.6B": (
        "convert_sana_transformer_to_diffusers",
        ("pos_embed", "y_embedder.y_embedding", *(f"{name}.scale_shift_table" for name in SANA_TABLES)),
    ),
    "auraflow": ("convert_auraflow_transformer_checkpoint_to_diffusers", ("positional_encoding",)),
    "anima": ("convert_cosmos_transformer_checkpoint_to_diffusers", ()),
    "mochi": ("convert_mochi_transformer_checkpoint_to_diffusers", ("pos_frequencies",)),
    "krea2": ("convert_krea2_transformer_checkpoint_to_diffusers", ()),
    "ltx 2B": ("convert_ltx_transformer_checkpoint_to_diffusers", ()),
}


def table_of(dit: Dit) -> NameTable:
    return FAMILY_NAMES[dit.family].tables["denoiser"]


def original_shapes(dit: Dit) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter under its original name; fused layers have all their rows."""
    shapes = {}
    for name, value in dit.build().named_parameters():
        path, _, kind = name.rpartition(".")
        place = table_of(dit).place(path)
        if place is not None:
            sizes, index = (place.part.sizes, place.part.index) if place.part else ((1,), 0)
            shapes[f"{place.name}.{kind}"] = (value.shape[0] // sizes[index] * sum(sizes), *value.shape[1:])
    return shapes


def halves(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """Make the two halves of a LoRA of rank 2 for a layer's weight: down, up."""
    seeded = torch.Generator().manual_seed(seed)
    ones = [1] * len(shape[2:])
    return torch.randn(2, *shape[1:], generator=seeded), torch.randn(shape[0], 2, *ones, generator=seeded)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_names_and_row_order_agree_with_the_conversion_of_whole_checkpoints(name, tmp_path):
    dit, (convert, extras) = DITS[name], CHECKPOINTS[name]
    layers = {path for path, layer in dit.build().named_modules() if isinstance(layer, LAYERS)}
    file, weights = {}, {extra: torch.zeros(2, 2) for extra in extras}
    for seed, (key, shape) in enumerate(original_shapes(dit).items()):
        weights[key] = torch.zeros(shape[:1])
        if len(shape) > 1:
            down, weights[key] = halves(shape, seed)
            flat = f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}"
            file |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": weights[key]}
    save_file(file, tmp_path / "a.safetensors")
    expected = getattr(checkpoints, convert)(weights)
    read = formats.load(tmp_path / "a.safetensors")
    assert read.family == dit.family
    assert {item.path for item in read.modules} == layers
    for item in read.modules:
        assert torch.equal(item.tensors["up"], expected[f"{item.path}.weight"]), item.path
    if FAMILY_NAMES[dit.family].flat_from == "stored":
        formats.save(read, tmp_path / "b.safetensors", "kohya")
        found = load_file(tmp_path / "b.safetensors")
        assert {key for key in found if not key.endswith(".alpha")} == file.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in file.items())


def rows_of(lead: Found, up: Tensor, name: str) -> Tensor:
    """Return the rows of a fused or reordered layer's up projection that belong to one lead."""
    if lead.swap == "always":
        return torch.cat(up.chunk(2)[::-1])
    start, stop = lead.part.rows(len(up), name) if lead.part else (0, len(up))
    return up[start:stop]


def lora_of(dit: Dit, pattern: str = ".*") -> dict[str, tuple[Tensor, Tensor]]:
    """Return original name -> (down, up) of the linear layers whose original name matches; the inputs are 3."""
    shapes = {key.removesuffix(".weight"): shape for key, shape in original_shapes(dit).items() if len(shape) == 2}
    found = [(name, shape) for name, shape in shapes.items() if re.fullmatch(pattern, name)]
    return {name: halves((shape[0], 3), seed) for seed, (name, shape) in enumerate(found)}


def assert_same(dit: Dit, lora: dict[str, tuple[Tensor, Tensor]], theirs: dict[str, Tensor], scale: float) -> None:
    """Compare every module's delta with the one that diffusers' converter makes of the file."""
    paths = set()
    for name, (down, up) in lora.items():
        for lead in table_of(dit).find_dotted(name):
            paths.add(lead.path)
            stem = f"transformer.{lead.path}.lora_"
            delta = theirs[f"{stem}B.weight"].double() @ theirs[f"{stem}A.weight"].double()
            torch.testing.assert_close(rows_of(lead, up, name).double() @ down.double() * scale, delta)
    assert {key.removeprefix("transformer.").partition(".lora_")[0] for key in theirs} == paths


BLOCKS = r"(double_|single_)?blocks\..*|(layers|noise_refiner|context_refiner)\..*"
# model -> (converter, which layers it can convert)
DOTTED = {
    # theirs leaves the halves of the final modulation as they are, unlike the conversion of whole checkpoints
    "flux2 dev": ("_convert_non_diffusers_flux2_lora_to_diffusers", r"(?!final_layer\.adaLN).*"),
    # theirs cuts or reorders the down projections of these too, as if they were weights: the deltas come out wrong
    "hunyuan-video": ("_convert_hunyuan_video_lora_to_diffusers", r"(?!.*self_attn_qkv|final_layer\.adaLN).*"),
    "lumina2": ("_convert_non_diffusers_lumina2_lora_to_diffusers", BLOCKS),
    "wan i2v 14B": ("_convert_non_diffusers_wan_lora_to_diffusers", ".*"),
    "anima": ("_convert_non_diffusers_anima_lora_to_diffusers", ".*"),
    "krea2": ("_convert_non_diffusers_krea2_lora_to_diffusers", ".*"),
    "hidream": ("_convert_non_diffusers_hidream_lora_to_diffusers", ".*"),
    "ltx 2B": ("_convert_non_diffusers_ltxv_lora_to_diffusers", r"transformer_blocks\..*"),
    "qwen-image": ("_convert_non_diffusers_qwen_lora_to_diffusers", ".*"),
}
FLAT = {
    "flux2 dev": (
        "_convert_kohya_flux2_lora_to_diffusers",
        r"(double|single)_blocks.*|img_in|txt_in|time_in.*|final_layer\.linear",
    ),
    "wan i2v 14B": ("_convert_musubi_wan_lora_to_diffusers", r"blocks\..*"),
    "qwen-image": ("_convert_non_diffusers_qwen_lora_to_diffusers", ".*"),
    "z-image": (
        "_convert_non_diffusers_z_image_lora_to_diffusers",
        r".*attention\.qkv|.*attention\.out|.*feed_forward.*",
    ),
}


@pytest.mark.parametrize("name", DOTTED)
def test_dotted_names_agree_with_the_conversion_of_loras(name):
    convert, pattern = DOTTED[name]
    lora = lora_of(DITS[name], pattern)
    assert lora
    file = {f"diffusion_model.{key}.lora_A.weight": down for key, (down, _) in lora.items()}
    file |= {f"diffusion_model.{key}.lora_B.weight": up for key, (_, up) in lora.items()}
    assert_same(DITS[name], lora, getattr(loras, convert)(file), 1.0)


@pytest.mark.parametrize("name", FLAT)
def test_flat_names_agree_with_the_conversion_of_loras(name):
    convert, pattern = FLAT[name]
    lora = lora_of(DITS[name], pattern)
    assert lora
    file = {}
    for key, (down, up) in lora.items():
        flat = f"lora_unet_{key.replace('.', '_')}"
        assert table_of(DITS[name]).find_flat(flat.removeprefix("lora_unet_")) == table_of(DITS[name]).find_dotted(key)
        file |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": torch.tensor(1.0)}
    assert_same(DITS[name], lora, getattr(loras, convert)(file), 0.5)


@pytest.mark.parametrize("name", ["qwen-image", "z-image"])
def test_flat_reference_names_agree_with_the_conversion_of_loras(name):
    """Trainers of these families flatten diffusers' own tree."""
    dit, convert = DITS[name], FLAT[name][0]
    paths = [path for path, layer in dit.build().named_modules() if isinstance(layer, nn.Linear)]
    file = {}
    for path in paths:
        flat = path.replace(".", "_")
        assert [lead.path for lead in table_of(dit).find_flat(flat)] == [path]
        file |= {f"lora_unet_{flat}.lora_{half}.weight": torch.ones(1, 1) for half in ("down", "up")}
    converted = getattr(loras, convert)(file)
    assert {key.removeprefix("transformer.").partition(".lora_")[0] for key in converted} == set(paths)
