"""OneTrainer writes one adapter in five forms; all of them must mean the same."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vislora import formats
from vislora.errors import AdapterFileError

CLIP = "text_model.encoder.layers.0.self_attn.q_proj"
T5 = "encoder.block.0.layer.0.SelfAttention.q"
RANK, WIDTH, SCALE = 2, 8, 0.5
# family -> a fused layer's original name, its members, a plain layer's original name and path, OneTrainer's prefix
# of T5, modelspec's name
MODELS = {
    "sd3": (
        "joint_blocks.0.x_block.attn.qkv",
        [f"transformer_blocks.0.attn.to_{name}" for name in "qkv"],
        ("joint_blocks.0.context_block.mlp.fc1", "transformer_blocks.0.ff_context.net.0.proj"),
        "lora_te3",
        "stable-diffusion-3-medium",
    ),
    "flux": (
        "double_blocks.0.img_attn.qkv",
        [f"transformer_blocks.0.attn.to_{name}" for name in "qkv"],
        ("double_blocks.0.txt_mlp.0", "transformer_blocks.0.ff_context.net.0.proj"),
        "lora_te2",
        "flux-1-dev",
    ),
}


def halves(name: str, out: int) -> tuple[Tensor, Tensor]:
    seeded = torch.Generator().manual_seed(len(name))
    return torch.randn(RANK, WIDTH, generator=seeded), torch.randn(out, RANK, generator=seeded)


def layers(family: str, split: bool) -> dict[str, tuple[str, Tensor, Tensor]]:
    """Return (component, down, up) per layer name; `split`: diffusers' names, with q, k and v apart."""
    fused, members, (original, path), *_ = MODELS[family]
    down, up = halves(fused, 3 * WIDTH)
    found = {path if split else original: ("denoiser", *halves(original, 2 * WIDTH))}
    found |= {CLIP: ("clip", *halves(CLIP, WIDTH)), T5: ("t5", *halves(T5, WIDTH))}
    if not split:
        return {fused: ("denoiser", down, up), **found}
    rows = dict(zip(members, up.chunk(3), strict=True))
    return {name: ("denoiser", down.clone(), part.clone()) for name, part in rows.items()} | found


def written(family: str, form: str) -> dict[str, Tensor]:
    t5 = MODELS[family][3]
    prefixes = {
        "DIFFUSERS": ("transformer.", "text_encoder.", f"text_encoder_{t5[-1]}."),
        "KOHYA": ("lora_unet_", "lora_te1_", f"{t5}_"),
        "ORIGINAL": ("", "text_encoders.clip_l.transformer.", "text_encoders.t5xxl.transformer."),
        "COMFY": ("diffusion_model.", "text_encoders.clip_l.transformer.", "text_encoders.t5xxl.transformer."),
        "LEGACY": ("lora_transformer_", "lora_te1_", f"{t5}_"),
    }[form]
    down_end, up_end = ("down", "up") if form in ("KOHYA", "LEGACY") else ("A", "B")
    tensors = {}
    for name, (kind, down, up) in layers(family, form in ("DIFFUSERS", "LEGACY")).items():
        flat = name.replace(".", "_") if form in ("KOHYA", "LEGACY") else name
        key = prefixes[("denoiser", "clip", "t5").index(kind)] + flat
        tensors[f"{key}.lora_{down_end}.weight"] = down
        tensors[f"{key}.lora_{up_end}.weight"] = SCALE * up if form == "DIFFUSERS" else up
        if form != "DIFFUSERS":
            tensors[f"{key}.alpha"] = torch.tensor(SCALE * RANK)
    return tensors


@pytest.mark.parametrize("form", ["DIFFUSERS", "KOHYA", "ORIGINAL", "COMFY", "LEGACY"])
@pytest.mark.parametrize("family", MODELS)
def test_the_five_forms_of_an_adapter_mean_the_same(family, form, tmp_path):
    save_file(written(family, form), tmp_path / "a.safetensors", {"modelspec.architecture": MODELS[family][4]})
    read = formats.load(tmp_path / "a.safetensors")
    assert (read.family, read.extras, len(read.modules)) == (family, {}, 6)
    found = {(item.component, item.path): read.delta(item) for item in read.modules}
    components = {"denoiser": "denoiser", "clip": "te:clip_l", "t5": "te:t5"}
    expected = {
        (components[kind], name): SCALE * (up.double() @ down.double())
        for name, (kind, down, up) in layers(family, split=True).items()
    }
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], delta) for key, delta in expected.items())


@pytest.mark.parametrize("family", MODELS)
def test_dora_per_input_of_the_legacy_form(family, tmp_path):
    """Its q, k and v have a magnitude each, on the input axis; fused they would need one together."""
    tensors = {key: tensor for key, tensor in written(family, "LEGACY").items() if "transformer" in key}
    names = {key.partition(".")[0] for key in tensors}
    tensors |= {f"{name}.dora_scale": torch.rand(1, WIDTH) + 0.5 for name in names}
    save_file(tensors, tmp_path / "a.safetensors", {"modelspec.architecture": MODELS[family][4]})
    read = formats.load(tmp_path / "a.safetensors")
    assert {(item.magnitude_axis, tuple(item.magnitude.shape)) for item in read.modules} == {("in", (1, WIDTH))}
    base = torch.randn(WIDTH, WIDTH)
    item = read.find("transformer_blocks.0.attn.to_q")
    whole = base.double() + SCALE * (item.tensors["up"].double() @ item.tensors["down"].double())
    expected = whole * (item.magnitude.double() / whole.norm(dim=0, keepdim=True)) - base.double()
    torch.testing.assert_close(read.delta(item, base), expected)
    with pytest.raises(AdapterFileError, match="all its parts need a magnitude"):
        formats.save(read, tmp_path / "b.safetensors", "kohya")


def test_the_second_text_encoder_is_told_by_its_layers(tmp_path):
    """`lora_te2_` is CLIP-G in SDXL and SD3, and T5 in OneTrainer's files for FLUX.1."""
    for name, component in ((CLIP, "te:clip_g"), (T5, "te:t5")):
        down, up = halves(name, WIDTH)
        flat = f"lora_te2_{name.replace('.', '_')}"
        save_file({f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}, tmp_path / "a.safetensors")
        assert [item.component for item in formats.load(tmp_path / "a.safetensors").modules] == [component]


def test_stable_cascade_is_named(tmp_path):
    save_file({"lora_prior_unet_down_blocks_0_1.lora_down.weight": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match="Stable Cascade, a model that vislora does not support"):
        formats.load(tmp_path / "a.safetensors")
