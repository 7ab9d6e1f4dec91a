"""Merging into bases and extracting from them: folders and single files, against diffusers and our own runtime."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import vislora
from tests import tiny
from tests.jobs.test_pipelines import adapter, fresh, state
from vislora import formats
from vislora.errors import AdapterMismatchError, ConfigError, ModelError
from vislora.formats.adapter_file import AdapterFile
from vislora.formats.checkpoints import open_checkpoint
from vislora.formats.names import FAMILY_NAMES
from vislora.models.base import components_of

FOLDERS = {"sd": ("unet", "text_encoder"), "flux": ("transformer", "text_encoder", "text_encoder_2")}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for family in FOLDERS:
        _, components = components_of(tiny.PIPELINES[family]())
        for seed, letter in enumerate("ab"):
            formats.save(adapter(components, family, seed), folder / f"{family}-{letter}.safetensors", "kohya")
    return folder


def weights(folder, part):
    (file,) = (folder / part).glob("*.safetensors")
    return load_file(file)


def single_file(folder, path, family, part):
    """Write the denoiser of a diffusers folder under its original names, fused where those fuse."""
    table = FAMILY_NAMES[family].tables["denoiser"]
    prefix = "model.diffusion_model." if family == "sd" else ""
    found = {}
    for key, tensor in weights(folder, part).items():
        name, _, slot = key.rpartition(".")
        place = table.place(name)
        if place is None or place.swap != "never":
            continue
        share = place.part.index if place.part else 0
        found.setdefault(f"{prefix}{place.name}.{slot}", {})[share] = tensor
    tensors = {key: torch.cat([parts[index] for index in sorted(parts)]).contiguous() for key, parts in found.items()}
    if family == "sd":
        tensors |= {
            f"cond_stage_model.transformer.{key}": value for key, value in weights(folder, "text_encoder").items()
        }
    save_file(tensors, path)
    return path


@pytest.mark.quick("flux")
@pytest.mark.parametrize("family", FOLDERS)
def test_a_merged_folder_is_the_runtime_and_touches_nothing_else(family, adapters, tmp_path):
    base, output = tiny.saved(family), tmp_path / "merged"
    pair = [f"{adapters}/{family}-a.safetensors:0.7", f"{adapters}/{family}-b.safetensors:-0.4"]
    report = vislora.merge(pair, output, base=base)
    assert report["tensors"] > 10
    pipe = fresh(family)
    before = state(pipe)
    for name, strength in (("a", 0.7), ("b", -0.4)):
        vislora.load(pipe, adapters / f"{family}-{name}.safetensors", strength)
    for folder in FOLDERS[family]:
        old, new = weights(base, folder), weights(output, folder)
        assert old.keys() == new.keys()
    merged = type(pipe).from_pretrained(output)
    changed = 0
    for name, value in state(merged).items():
        if torch.equal(value, before[name]):
            continue
        changed += 1
        component, path = name.split(".", 1)
        wanted = before[name].double() + by_hand(adapters, family, component, path.rpartition(".")[0])
        assert (value.double() - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    assert changed == report["tensors"]
    others = [file for file in base.rglob("*") if file.is_file() and file.suffix != ".safetensors"]
    assert all((output / file.relative_to(base)).read_bytes() == file.read_bytes() for file in others)
    note = json.loads((output / "vislora-merge.json").read_text())
    assert [row["strengths"] for row in note["adapters"]] == [[0.7], [-0.4]]


def by_hand(adapters, family, component, path):
    total = 0.0
    for name, strength in (("a", 0.7), ("b", -0.4)):
        file = formats.load(adapters / f"{family}-{name}.safetensors")
        for module in file.modules:
            if module.component == component and module.path in (path, f"text_model.{path}"):
                total = total + strength * module.direction()
    return total


def test_a_merged_folder_is_what_diffusers_fuses(adapters, tmp_path):
    vislora.convert(adapters / "sd-a.safetensors", tmp_path / "a.safetensors", "diffusers")
    pipe = fresh("sd")
    pipe.load_lora_weights(tmp_path / "a.safetensors")
    pipe.fuse_lora(lora_scale=0.7)
    pipe.unload_lora_weights()
    vislora.merge([f"{tmp_path}/a.safetensors:0.7"], tmp_path / "merged", base=tiny.saved("sd"))
    merged = type(pipe).from_pretrained(tmp_path / "merged", safety_checker=None, requires_safety_checker=False)
    theirs = state(pipe)
    for name, value in state(merged).items():
        assert torch.allclose(value, theirs[name], atol=1e-6)


@pytest.mark.parametrize(("family", "part"), [("sd", "unet"), ("flux", "transformer")])
def test_single_files_are_merged_as_folders_are(family, part, adapters, tmp_path):
    only = "denoiser" if family == "flux" else ""
    table = {"adapter": f"{adapters}/{family}-a.safetensors", "strength": 0.7}
    if only:
        table["components"] = {"te": 0}
    file = single_file(tiny.saved(family), tmp_path / "base.safetensors", family, part)
    checkpoint = open_checkpoint(file)
    assert (checkpoint.is_file, checkpoint.family) == (True, family)
    kept = {name for component, name, _ in checkpoint.layers if component == "denoiser"}
    stacked = FAMILY_NAMES[family].tables["denoiser"]
    table["layers"] = {
        module.path: float(stacked.place(module.path).name in kept)
        for module in formats.load(table["adapter"]).modules
        if module.component == "denoiser"
    }
    vislora.merge([], tmp_path / "folder", stack=[table], base=tiny.saved(family))
    vislora.merge([], tmp_path / "merged.safetensors", stack=[table], base=file)
    wanted = load_file(single_file(tmp_path / "folder", tmp_path / "wanted.safetensors", family, part))
    found = load_file(tmp_path / "merged.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in found)
    assert not all(torch.equal(found[key], value) for key, value in load_file(file).items())
    assert (tmp_path / "merged.safetensors.vislora-merge.json").is_file()


def test_rows_of_an_open_clip_layer(tmp_path):
    width = 8
    generator = torch.Generator().manual_seed(0)
    names = {
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        "mlp.c_fc.weight": (16, width),
    }
    prefix = "conditioner.embedders.1.model.transformer.resblocks.0."
    tensors = {prefix + name: torch.randn(shape, generator=generator) for name, shape in names.items()}
    unet = single_file(tiny.saved("sd"), tmp_path / "unet.safetensors", "sd", "unet")
    save_file({**load_file(unet), **tensors}, tmp_path / "base.safetensors")
    layers = open_checkpoint(tmp_path / "base.safetensors").layers
    (k,) = layers["te:clip_g", "text_model.encoder.layers.0.self_attn.k_proj", "weight"]
    assert (k.rows, k.shape) == ((width, 2 * width), (width, width))
    assert ("te:clip_g", "text_model.encoder.layers.0.mlp.fc1", "weight") in layers


def test_half_precision_is_rounded_once(adapters, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny.saved("sd"), base)
    (file,) = (base / "unet").glob("*.safetensors")
    save_file({key: tensor.half() for key, tensor in load_file(file).items()}, file)
    vislora.merge(
        [f"{adapters}/sd-a.safetensors:0.7", f"{adapters}/sd-b.safetensors:-0.4"], tmp_path / "out", base=base
    )
    old, new = weights(base, "unet"), weights(tmp_path / "out", "unet")
    for key in (name for name in new if name.endswith(".weight")):
        wanted = old[key].double() + by_hand(adapters, "sd", "denoiser", key.removesuffix(".weight"))
        assert torch.equal(new[key], wanted.half())


def test_dora_is_made_from_the_weight_of_the_base(adapters, tmp_path):
    source = formats.load(adapters / "sd-a.safetensors")
    generator = torch.Generator().manual_seed(0)
    for module in source.modules:
        module.magnitude = torch.rand(module.shape[0], generator=generator) + 0.5
        module.magnitude_axis = "out"
    formats.save(source, tmp_path / "dora.safetensors", "kohya")
    vislora.merge([f"{tmp_path}/dora.safetensors:0.5"], tmp_path / "out", base=tiny.saved("sd"))
    old, new = weights(tiny.saved("sd"), "unet"), weights(tmp_path / "out", "unet")
    for module in source.modules:
        if module.component == "denoiser":
            weight = old[f"{module.path}.weight"]
            wanted = weight.double() + 0.5 * AdapterFile(modules=[]).delta(module, weight)
            assert torch.allclose(new[f"{module.path}.weight"].double(), wanted, atol=1e-6)


def test_what_cannot_be_merged_into_a_base(adapters, tmp_path):
    sd, flux = adapters / "sd-a.safetensors", adapters / "flux-a.safetensors"
    with pytest.raises(AdapterMismatchError, match="is for 'flux'"):
        vislora.merge([str(flux)], tmp_path / "out", base=tiny.saved("sd"))
    with pytest.raises(ConfigError, match="the sum, whole"):
        vislora.merge([str(sd)], tmp_path / "out", base=tiny.saved("sd"), rank=4)
    with pytest.raises(ConfigError, match="is, or is in, the base"):
        vislora.merge([str(sd)], tiny.saved("sd") / "out", base=tiny.saved("sd"))
    with pytest.raises(ModelError, match="does not exist"):
        vislora.merge([str(sd)], tmp_path / "out", base=tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"no model_index\.json"):
        vislora.merge([str(sd)], tmp_path / "out", base=adapters)
    smaller = tmp_path / "smaller"
    shutil.copytree(tiny.saved("sd"), smaller)
    (file,) = (smaller / "unet").glob("*.safetensors")
    save_file({key: value for key, value in load_file(file).items() if "mid_block" not in key}, file)
    with pytest.raises(AdapterMismatchError, match=r"mid_block.*is not in the base"):
        vislora.merge([str(sd)], tmp_path / "out", base=smaller)
    for file in (smaller / "unet").glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    with pytest.raises(ModelError, match="has pickles"):
        vislora.merge([str(sd)], tmp_path / "out", base=smaller)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("single", [False, True])
def test_what_was_merged_is_extracted(single, adapters, tmp_path):
    source, base, output = adapters / "sd-a.safetensors", tiny.saved("sd"), tmp_path / "tuned"
    if single:
        base, output = single_file(base, tmp_path / "base.safetensors", "sd", "unet"), tmp_path / "tuned.safetensors"
    vislora.merge([f"{source}:0.5"], output, base=base)
    report = vislora.extract(output, base, tmp_path / "made.safetensors", rank=2, precision="fp32", to="kohya")
    assert report.error <= 1e-4
    made = {(module.component, module.path): module for module in formats.load(tmp_path / "made.safetensors").modules}
    for module in formats.load(source).modules:
        wanted = 0.5 * module.direction()
        found = made.pop((module.component, module.path)).direction()
        assert (found.reshape(wanted.shape) - wanted).norm() <= 1e-3 * wanted.norm()
    assert not made


def test_a_fused_file_is_extracted_in_its_parts(adapters, tmp_path):
    file = single_file(tiny.saved("flux"), tmp_path / "base.safetensors", "flux", "transformer")
    tensors = load_file(file)
    key = "double_blocks.0.img_attn.qkv.weight"
    change = torch.randn(tensors[key].shape[0], 1) @ torch.randn(1, tensors[key].shape[1])
    save_file({**tensors, key: tensors[key] + change}, tmp_path / "tuned.safetensors")
    vislora.extract(
        tmp_path / "tuned.safetensors", file, tmp_path / "made.safetensors", rank=1, precision="fp32", to="diffusers"
    )
    modules = formats.load(tmp_path / "made.safetensors").modules
    found = {module.path: module.direction() for module in modules}
    assert len(found) == 3
    found = torch.cat([found[f"transformer_blocks.0.attn.to_{part}"] for part in "qkv"])
    assert (found - change).norm() <= 1e-4 * change.norm()


def tuned(tmp_path, change):
    folder = tmp_path / "tuned"
    shutil.copytree(tiny.saved("sd"), folder)
    (file,) = (folder / "unet").glob("*.safetensors")
    save_file({key: change(key, tensor) for key, tensor in load_file(file).items()}, file)
    return folder


def test_a_whole_fine_tune_says_what_is_lost(tmp_path):
    generator = torch.Generator().manual_seed(0)
    folder = tuned(tmp_path, lambda key, tensor: tensor + 0.01 * torch.randn(tensor.shape, generator=generator))
    report = vislora.extract(folder, tiny.saved("sd"), tmp_path / "small.safetensors", rank=2, precision="fp32")
    assert 0.1 < report.error < 1.0
    assert report.left
    layer = report.layers[0]
    path = layer.name.removeprefix("denoiser: ")
    old, new = weights(tiny.saved("sd"), "unet"), weights(folder, "unet")
    change = (new[f"{path}.weight"] - old[f"{path}.weight"]).flatten(1)
    left = torch.linalg.svdvals(change)[2:].norm()
    assert layer.apart == pytest.approx(float(left), rel=1e-3)
    whole = vislora.extract(
        folder, tiny.saved("sd"), tmp_path / "whole.safetensors", energy=1.0, precision="fp32", exact=True
    )
    assert whole.error <= 1e-5
    made = formats.load(tmp_path / "whole.safetensors")
    norm = made.find("up_blocks.0.resnets.0.norm1")
    assert torch.allclose(
        norm.direction().float(), new["up_blocks.0.resnets.0.norm1.weight"] - old["up_blocks.0.resnets.0.norm1.weight"]
    )


def test_norms_and_biases_alone(tmp_path):
    folder = tuned(tmp_path, lambda key, tensor: tensor + 0.1 if tensor.dim() == 1 else tensor)
    with pytest.raises(ConfigError, match="did change, --exact keeps norms and biases"):
        vislora.extract(folder, tiny.saved("sd"), tmp_path / "x.safetensors", rank=2)
    report = vislora.extract(folder, tiny.saved("sd"), tmp_path / "x.safetensors", rank=2, precision="fp32", exact=True)
    assert len(report.whole) == sum(tensor.dim() == 1 for tensor in weights(folder, "unet").values())
    assert report.verdict.startswith(f"{len(report.whole)} norms and biases whole; proven")
    norm = formats.load(tmp_path / "x.safetensors").find("conv_norm_out")
    assert (norm.direction() - 0.1).abs().max() < 1e-6


def test_models_that_do_not_belong_together(tmp_path):
    with pytest.raises(ConfigError, match="nothing to extract"):
        vislora.extract(tiny.saved("sd"), tiny.saved("sd"), tmp_path / "x.safetensors", rank=2)
    with pytest.raises(AdapterMismatchError, match="is a 'flux'"):
        vislora.extract(tiny.saved("flux"), tiny.saved("sd"), tmp_path / "x.safetensors", rank=2)
    wider = tuned(tmp_path, lambda key, tensor: torch.cat([tensor, tensor]) if key == "conv_in.weight" else tensor)
    with pytest.raises(AdapterMismatchError, match="conv_in"):
        vislora.extract(wider, tiny.saved("sd"), tmp_path / "x.safetensors", rank=2)
    with pytest.raises(ConfigError, match="no 'te:clip_g'"):
        vislora.extract(wider, tiny.saved("sd"), tmp_path / "x.safetensors", rank=2, components=("te:clip_g",))
    with pytest.raises(ConfigError, match="say how small"):
        vislora.extract(wider, tiny.saved("sd"), tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()
