"""FLUX.1's LoRAs in the forms that only it has, with diffusers' own converters as the judge."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as peer
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.formats.format_helpers import materialise, same_tensors
from vislora import formats
from vislora.algebra.compare import compare
from vislora.formats.adapter_file import AdapterFile

WIDTH = 3072
# original name -> its outputs and inputs in units of the width
DOUBLE = {
    f"{stream}_{name}": shape
    for stream in ("img", "txt")
    for name, shape in {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.0": (4, 1), "mlp.2": (1, 4)}.items()
}
MODULATION = {"img_mod.lin": (6, 1), "txt_mod.lin": (6, 1)}
SINGLE = {"linear1": (7, 1), "linear2": (1, 5)}
TOP = {
    "time_in.in_layer": (WIDTH, 256),
    "vector_in.in_layer": (WIDTH, 768),
    "guidance_in.in_layer": (WIDTH, 256),
    **{f"{name}.out_layer": (WIDTH, WIDTH) for name in ("time_in", "vector_in", "guidance_in")},
    "img_in": (WIDTH, 128),
    "txt_in": (WIDTH, 4096),
    "final_layer.linear": (64, WIDTH),
    "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH),
}


def block_layers(modulations: bool = True) -> Iterator[tuple[str, int, int]]:
    """Yield (original name, outputs, inputs) of every layer in FLUX.1's 19 double and 38 single blocks."""
    for index in range(19):
        for name, (out, inputs) in {**DOUBLE, **(MODULATION if modulations else {})}.items():
            yield f"double_blocks.{index}.{name}", out * WIDTH, inputs * WIDTH
    for index in range(38):
        for name, (out, inputs) in {**SINGLE, **({"modulation.lin": (3, 1)} if modulations else {})}.items():
            yield f"single_blocks.{index}.{name}", out * WIDTH, inputs * WIDTH


def rank_one(layers, ends: tuple[str, str] = ("lora_A.weight", "lora_B.weight")) -> dict[str, Tensor]:
    """Return a down and an up of rank 1 for every (name, outputs, inputs): real widths, and still a small file."""
    seeded = torch.Generator().manual_seed(0)
    tensors = {}
    for name, out, inputs in layers:
        tensors[f"{name}.{ends[0]}"] = torch.randn(1, inputs, generator=seeded)
        tensors[f"{name}.{ends[1]}"] = torch.randn(out, 1, generator=seeded)
    return tensors


def assert_halves(read: AdapterFile, expected: dict[str, Tensor]) -> None:
    """Assert that the denoiser's modules are, up to exact factors, the halves that diffusers' converter gives."""
    halves = {key.removeprefix("transformer."): tensor for key, tensor in expected.items()}
    found = {item.path: item for item in read.modules if item.algo == "lora" and item.component == "denoiser"}
    assert {f"{path}.lora_A.weight" for path in found} == {key for key in halves if "lora_A.weight" in key}
    for path, item in found.items():
        up, down = halves[f"{path}.lora_B.weight"], halves[f"{path}.lora_A.weight"]
        scale = 1.0 if item.alpha is None else item.alpha  # of rank 1
        ours = scale * item.tensors["up"], item.tensors["down"]
        assert ours[0].shape == up.shape
        # a column and a row tell the whole product
        torch.testing.assert_close(ours[0] * ours[1][0, 0], up * down[0, 0])
        torch.testing.assert_close(ours[0][0, 0] * ours[1], up[0, 0] * down)


def test_comfy_to_kohya_and_back_is_bit_for_bit(tmp_path):
    tensors = materialise("kohya_flux_lora_te1_te3_indims.json", tmp_path / "kohya.safetensors", shrink=64)
    formats.save(formats.load(tmp_path / "kohya.safetensors"), tmp_path / "comfy.safetensors", "comfy")
    found = load_file(tmp_path / "comfy.safetensors")
    assert len(found) == len(tensors)
    assert "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.lora_down.weight" in found
    assert "diffusion_model.single_blocks.37.linear1.lora_up.weight" in found
    formats.save(formats.load(tmp_path / "comfy.safetensors"), tmp_path / "back.safetensors", "kohya")
    same_tensors(tmp_path / "back.safetensors", tensors)
    formats.save(formats.load(tmp_path / "back.safetensors"), tmp_path / "again.safetensors", "comfy")
    same_tensors(tmp_path / "again.safetensors", found)


def test_diffusers_reads_our_comfy_file(tmp_path):
    """diffusers knows FLUX.1 under `diffusion_model.` only with kohya's slots; of `lora_A` it would load nothing."""
    tensors = rank_one(block_layers())
    tensors |= {key.replace("lora_A.weight", "alpha"): torch.tensor(0.5) for key in list(tensors) if "lora_A" in key}
    save_file({f"diffusion_model.{key}": tensor for key, tensor in tensors.items()}, tmp_path / "a.safetensors")
    read = formats.load(tmp_path / "a.safetensors")
    formats.save(read, tmp_path / "b.safetensors", "comfy")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = peer._convert_kohya_flux_lora_to_diffusers(load_file(tmp_path / "b.safetensors"))
    assert_halves(read, expected)


def test_control_loras_of_bfl(tmp_path):
    layers = [*block_layers(), *((name, *shape) for name, shape in TOP.items())]
    tensors = rank_one(layers)
    tensors |= {f"{name}.lora_B.bias": torch.randn(out) for name, out, _ in layers}
    norms = [f"double_blocks.{index}.{stream}_attn.norm" for index in range(19) for stream in ("img", "txt")]
    norms += [f"single_blocks.{index}.norm" for index in range(38)]
    tensors |= {f"{name}.{half}_norm.scale": torch.rand(128) for name in norms for half in ("query", "key")}
    assert len(tensors) == 1094  # as many as in FLUX.1-Depth-dev-lora
    save_file(tensors, tmp_path / "a.safetensors")
    read = formats.load(tmp_path / "a.safetensors")
    assert (read.family, read.source.format, read.extras) == ("flux", "bare", {})
    assert any("128 inputs" in note for note in read.notes)
    final = "final_layer.adaLN_modulation.1"
    doubled = {f"{final}.lora_A.weight": torch.cat(2 * [tensors[f"{final}.lora_A.weight"]])}
    expected = peer._convert_bfl_flux_control_lora_to_diffusers({**tensors, **doubled})
    # diffusers exchanges the halves of the rank here too, which only the output rows need
    expected["transformer.norm_out.linear.lora_A.weight"] = tensors[f"{final}.lora_A.weight"]
    assert_halves(read, expected)
    for item in read.modules:
        if item.algo == "set":
            assert torch.equal(item.tensors["set_weight"], expected[f"transformer.{item.path}.weight"])
        else:
            assert torch.equal(item.bias, expected[f"transformer.{item.path}.lora_B.bias"])
    assert sum(item.algo == "set" for item in read.modules) == 2 * len(norms)


def test_original_names_as_peft_dumps_them(tmp_path):
    tensors = {f"base_model.model.{key}": tensor for key, tensor in rank_one(block_layers()).items()}
    final = [("base_model.model.final_layer.linear", 64, WIDTH)]
    save_file(tensors | rank_one(final), tmp_path / "a.safetensors")
    read = formats.load(tmp_path / "a.safetensors")
    assert (read.family, read.source.format, read.extras) == ("flux", "peft", {})
    assert any("alpha is taken for the rank" in note for note in read.notes)
    expected = peer._convert_fal_kontext_lora_to_diffusers({**tensors, **rank_one(final)})
    assert_halves(read, expected)


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
@pytest.mark.parametrize("blocks", ["double", "single", "double single"])
def test_xlabs(blocks, prefix, tmp_path):
    double = {"qkv_lora1": (3, 1), "qkv_lora2": (3, 1), "proj_lora1": (1, 1), "proj_lora2": (1, 1)}
    kinds = {"double": double, "single": {"qkv_lora": (3, 1), "proj_lora": (1, 5)}}
    layers = [
        (f"{prefix}{kind}_blocks.{index}.processor.{name}", out * 24, inputs * 24)
        for kind in blocks.split()
        for index in (0, 11)
        for name, (out, inputs) in kinds[kind].items()
    ]
    tensors = rank_one(layers, ("down.weight", "up.weight"))
    save_file(tensors, tmp_path / "a.safetensors")
    read = formats.load(tmp_path / "a.safetensors")
    assert (read.family, read.source.format, read.extras) == ("flux", "xlabs", {})
    assert {item.scale for item in read.modules} == {1.0}
    assert_halves(read, peer._convert_xlabs_flux_lora_to_diffusers(dict(tensors)))
    formats.save(read, tmp_path / "b.safetensors", "kohya")
    assert compare(read, formats.load(tmp_path / "b.safetensors")).ok(0.0)


def test_lokr_under_original_names(tmp_path):
    seeded = torch.Generator().manual_seed(0)
    name = "diffusion_model.double_blocks.0.img_mlp.0"
    tensors = {
        f"{name}.lokr_w1": torch.randn(4, 4, generator=seeded),
        f"{name}.lokr_w2_a": torch.randn(24, 2, generator=seeded),
        f"{name}.lokr_w2_b": torch.randn(2, 6, generator=seeded),
        f"{name}.alpha": torch.tensor(1.0),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    read = formats.load(tmp_path / "a.safetensors")
    w1, a, b, alpha = (tensor.double() for tensor in tensors.values())
    assert torch.equal(read.delta("transformer_blocks.0.ff.net.0.proj"), torch.kron(w1, a @ b) * (alpha / 2))


@pytest.mark.parametrize(("rows", "cut"), [(3, True), (4, False)])
def test_lokr_of_fused_layers(rows, cut, tmp_path):
    """Rows of kron(W1, W2) come in runs as long as W2 has rows: where q, k and v begin inside a run, none is cut."""
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    tensors = {f"{name}.lokr_w1": torch.randn(rows, 4), f"{name}.lokr_w2": torch.randn(48 // rows, 4)}
    save_file(tensors, tmp_path / "a.safetensors", {"modelspec.architecture": "flux-1-dev"})
    read = formats.load(tmp_path / "a.safetensors")
    expected = torch.kron(*(tensor.double() for tensor in tensors.values()))
    assert torch.equal(torch.cat([read.delta(item) for item in read.modules]), expected)
    assert [item.path is not None for item in read.modules] == ([True] * 3 if cut else [False])
    formats.save(read, tmp_path / "b.safetensors", "comfy")
    found = load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())


def test_rows_of_single_blocks_stand_in_the_order_of_the_original(tmp_path):
    name = "single_blocks.3.linear1"
    tensors = {f"{name}.lora_A.weight": torch.randn(2, 8), f"{name}.lora_B.weight": torch.randn(7 * 8, 2)}
    save_file(tensors, tmp_path / "a.safetensors")
    read = formats.load(tmp_path / "a.safetensors")
    whole = tensors[f"{name}.lora_B.weight"].double() @ tensors[f"{name}.lora_A.weight"].double()
    members = [f"single_transformer_blocks.3.{end}" for end in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    assert torch.equal(torch.cat([read.delta(path) for path in members]), whole)
