"""Bases in one file: the same models and images as from the folder that they were made of."""

from __future__ import annotations

import re
import shutil
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from vislora.errors import ModelError
from vislora.formats.names import FAMILY_NAMES
from vislora.jobs.generate import generate
from vislora.jobs.recipes import base_hash
from vislora.models.base import load_family
from vislora.models.sampling import Sampling, Shot, make_images

torch.set_num_threads(1)
CPU = torch.device("cpu")
CLIPS = {"sd": "cond_stage_model", "sdxl": "conditioner.embedders.0"}
OPEN_CLIP = (
    (r"encoder\.layers\.(\d)\.self_attn\.out_proj", r"transformer.resblocks.\1.attn.out_proj"),
    (r"encoder\.layers\.(\d)\.layer_norm(\d)", r"transformer.resblocks.\1.ln_\2"),
    (r"encoder\.layers\.(\d)\.mlp\.fc1", r"transformer.resblocks.\1.mlp.c_fc"),
    (r"encoder\.layers\.(\d)\.mlp\.fc2", r"transformer.resblocks.\1.mlp.c_proj"),
    (r"final_layer_norm", "ln_final"),
    (r"embeddings\.token_embedding", "token_embedding"),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
)
VAE = (  # diffusers' names of an AutoencoderKL -> those of CompVis' latent-diffusion, two levels
    (r"encoder\.down_blocks\.(\d)\.resnets\.(\d)", r"encoder.down.\1.block.\2"),
    (r"encoder\.down_blocks\.(\d)\.downsamplers\.0\.conv", r"encoder.down.\1.downsample.conv"),
    (r"decoder\.up_blocks\.0\.(resnets|upsamplers)", r"decoder.up.1.\1"),
    (r"decoder\.up_blocks\.1\.resnets", r"decoder.up.0.resnets"),
    (r"(decoder\.up\.\d)\.resnets", r"\1.block"),
    (r"(decoder\.up\.\d)\.upsamplers\.0\.conv", r"\1.upsample.conv"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
)


def real_layout(family):
    """Return a pipeline whose UNet has as many blocks of each kind as the released one: original names count them."""
    pipeline = tiny.PIPELINES[family]()
    two = {"layers_per_block": 2, "norm_num_groups": 8}
    if family == "sd":
        widths = {"block_out_channels": (16, 16, 32, 32), "attention_head_dim": 2}
        down, up = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
        made = tiny.unet(down_block_types=down, up_block_types=up, sample_size=16, **two, **widths)
    else:
        made = tiny.sdxl_unet(
            block_out_channels=(16, 16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            cross_attention_dim=16 + 24,
            **two,
        )
        # in a file, diffusers tells the two by their widths
        pipeline.register_modules(text_encoder_2=tiny.clip_text_projected(1, hidden_size=24))
    pipeline.register_modules(unet=made)
    return pipeline


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return family -> (single file, diffusers folder): sd and sdxl are whole, the others denoisers alone."""
    root = tmp_path_factory.mktemp("bases")
    found = {}
    for family in ("sd", "sdxl", "sd3", "z-image", "flux2", "qwen-image"):
        folder = tiny.saved(family)
        if family in CLIPS:
            folder = root / family
            real_layout(family).save_pretrained(folder)
        tensors = denoiser(family, folder)
        if family == "sdxl":
            save_file(tensors, root / "unet.safetensors")
            found["unet"] = root / "unet.safetensors", folder
        if family in CLIPS:
            tensors |= {f"first_stage_model.{name}": tensor for name, tensor in vae(folder).items()}
            tensors |= clip(folder, CLIPS[family])
        if family == "sdxl":
            tensors |= open_clip(folder)
        save_file(tensors, root / f"{family}.safetensors")
        found[family] = root / f"{family}.safetensors", folder
    return found


def weights(folder, part):
    (file,) = (folder / part).glob("*.safetensors")
    return load_file(file)


def denoiser(family, folder):
    """Return the denoiser's weights under their original names, fused where those fuse."""
    table = FAMILY_NAMES[family].tables["denoiser"]
    found = {}
    for key, tensor in weights(folder, "unet" if family in CLIPS else "transformer").items():
        name, _, slot = key.rpartition(".")
        place = table.place(name)
        if place is None and family == "sd3":
            found[f"model.diffusion_model.{slot}"] = {0: tensor}  # a table of places
            continue
        if place is None:  # norms and the token of padding, of Z-Image
            found[re.sub(r"norm_([qk])$", r"\1_norm", name) + f".{slot}" if name else slot] = {0: tensor}
            continue
        two = place.swap == "two rows per input" and len(tensor) == 2 * 16  # the last block of SD3, of width 16
        turned = torch.cat(tensor.chunk(2)[::-1]) if two or place.swap == "always" else tensor
        prefix = "model.diffusion_model." if family.startswith("sd") else ""
        found.setdefault(f"{prefix}{place.name}.{slot}", {})[place.part.index if place.part else 0] = turned
    return {key: torch.cat([parts[index] for index in sorted(parts)]).contiguous() for key, parts in found.items()}


def clip(folder, prefix):
    plain = {name.removeprefix("text_model."): tensor for name, tensor in weights(folder, "text_encoder").items()}
    return {f"{prefix}.transformer.text_model.{name}": tensor for name, tensor in plain.items()}


def open_clip(folder):
    """Return SDXL's second text encoder by the names of open_clip, q, k and v in one."""
    plain = {name.removeprefix("text_model."): tensor for name, tensor in weights(folder, "text_encoder_2").items()}
    found = {"text_projection": plain.pop("text_projection.weight").T.contiguous()}
    for slot in ("weight", "bias"):
        for layer in range(2):
            parts = [plain.pop(f"encoder.layers.{layer}.self_attn.{part}_proj.{slot}") for part in "qkv"]
            found[f"transformer.resblocks.{layer}.attn.in_proj_{slot}"] = torch.cat(parts)
    for name, tensor in plain.items():
        for pattern, original in OPEN_CLIP:
            name = re.sub(pattern, original, name)
        found[name] = tensor
    return {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in found.items()}


def vae(folder):
    found = {}
    for name, tensor in weights(folder, "vae").items():
        for pattern, original in VAE:
            name = re.sub(pattern, original, name)
        is_conv = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name)
        found[name] = tensor[:, :, None, None].contiguous() if is_conv else tensor
    return found


@cache
def loaded(path, parts=None):
    return load_family(path, torch.float32, CPU, parts)


def image(family):
    how = Sampling(2, 2.0, family.traits.resolution, family.traits.resolution)
    return next(make_images(family, [Shot("a red cat", "", 0)], how))[0].tobytes()


@pytest.mark.quick("sd", "flux2", "sd3")
@pytest.mark.parametrize("family", ["sd", "sdxl", "unet", "sd3", "z-image", "flux2", "qwen-image"])
def test_a_file_is_the_folder_that_it_was_made_of(family, files):
    path, folder = files[family]
    mine, theirs = loaded(path, folder), loaded(folder)
    assert mine.card.name == theirs.card.name == {"unet": "sdxl"}.get(family, family)
    assert mine.traits == theirs.traits
    assert mine.components.keys() == theirs.components.keys()
    for component, module in mine.components.items():
        expected = theirs.components[component].state_dict()
        assert module.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in module.state_dict().items()), component
    assert image(mine) == image(theirs)
    assert getattr(mine.pipeline, "watermark", None) is None  # where the package for it is installed


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_what_a_whole_file_holds_is_its_own(family, files, tmp_path):
    """The folder beside a whole checkpoint gives configs: the weights of the file are used, not those of the folder."""
    path, folder = files[family]
    other = shutil.copytree(folder, tmp_path / "other")
    for file in other.glob("*/*.safetensors"):
        file.unlink()
    mine = load_family(path, torch.float32, CPU, other)
    assert image(mine) == image(loaded(folder))


def test_a_run_on_a_file_says_so_and_is_repeated(files, tmp_path):
    path, folder = files["sd"]
    how = {"base": str(path), "base_parts": str(folder), "steps": 1, "device": "cpu"}
    made = generate(prompt=("a red cat",), output=tmp_path / "one", **how)[0]
    assert (made.recipe.base, made.recipe.base_parts) == (str(path), str(folder))
    again = generate(like=made.path, output=tmp_path / "two", device="cpu")[0]
    assert again.image.tobytes() == made.image.tobytes()


def test_the_hash_of_a_file_is_of_its_contents(files, tmp_path):
    path, folder = files["sd"]
    copied = shutil.copy(path, tmp_path / "renamed.safetensors")
    assert base_hash(str(path)) == base_hash(str(copied)) != base_hash(str(path), str(folder))
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    (tmp_path / "changed.safetensors").write_bytes(changed)
    assert base_hash(str(tmp_path / "changed.safetensors")) != base_hash(str(path))


def fails(path, parts=None):
    with pytest.raises(ModelError) as caught:
        load_family(path, torch.float32, CPU, parts)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_what_is_missing_is_told(files, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "holds the denoiser alone: for text encoders and VAE, name the diffusers folder" in fails(
        files["z-image"][0]
    )
    assert "holds no configs" in fails(files["sd"][0])
    assert "is of family 'z-image', but --base-parts" in fails(files["z-image"][0], files["sd"][1])
    assert "--base-parts is for a base in one file" in fails(files["sd"][1], files["sd"][1])


def test_files_that_are_no_base_are_told(files, tmp_path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(files["sd"][0].read_bytes()[:-100])
    assert "cut" in fails(cut, files["sd"][1])
    pickle = tmp_path / "model.ckpt"
    pickle.write_bytes(b"\x80\x02}q\x00.")
    assert "pickles are not read" in fails(pickle, files["sd"][1])
    adapter = tmp_path / "ink.safetensors"
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(2, 2)}, adapter)
    assert "is an adapter: use it with --adapter" in fails(adapter, files["sd"][1])
    stranger = tmp_path / "stranger.safetensors"
    save_file({"model.diffusion_model.strange.weight": torch.zeros(2, 2)}, stranger)
    assert "no family has these layers" in fails(stranger, files["sd"][1])
