"""Odd files of many kinds: other programs' orders, keys and alphas; biases; damage; what `inspect` says."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.formats.format_helpers import module, same_tensors
from vislora import formats
from vislora.algebra.compare import compare
from vislora.errors import AdapterFileError
from vislora.formats import AdapterFile, AdapterModule
from vislora.jobs.inspect import as_text, inspect

LINEAR = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "mid_block.resnets.0.conv1"
FLAT = {path: f"lora_unet_{path.replace('.', '_')}" for path in (LINEAR, CONV)}


def numbers(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed + sum(size)))


def read(tmp_path, tensors: dict[str, Tensor], path: str = LINEAR, flat: str | None = None) -> AdapterFile:
    """Load a file with these slots of one module, named as kohya does."""
    name = flat or FLAT[path]
    save_file({f"{name}.{slot}": tensor.contiguous() for slot, tensor in tensors.items()}, tmp_path / "a.safetensors")
    return formats.load(tmp_path / "a.safetensors")


def lora(out: int = 8, width: int = 6) -> dict[str, Tensor]:
    return {
        "lora_down.weight": numbers(3, width),
        "lora_up.weight": numbers(out, 3),
        "alpha": torch.tensor(1.5),
    }


@pytest.mark.parametrize(("out", "width", "rank"), [(8, 6, 3), (8, 8, 3), (8, 4, 6)])
@pytest.mark.parametrize("conv", [False, True])
def test_glora_in_either_order_of_slots(out, width, rank, conv, tmp_path):
    ones, kernel = ((1, 1), (3, 3)) if conv else ((), ())
    a1, a2 = numbers(width, rank, *ones), numbers(rank, width, *ones)
    b1, b2 = numbers(out, rank, *ones), numbers(rank, width, *kernel)
    base = numbers(out, width, *kernel).double()
    today = {"a1.weight": a1, "a2.weight": a2, "b1.weight": b1, "b2.weight": b2, "alpha": torch.tensor(2.0)}
    older = {**today, "a1.weight": a2, "a2.weight": a1, "b1.weight": b2, "b2.weight": b1}
    path = CONV if conv else LINEAR
    mixer = a1.double().flatten(1) @ a2.double().flatten(1)
    expected = torch.einsum("oi...,ij->oj...", base, mixer)
    expected = 2.0 / rank * (expected + torch.einsum("or,ri...->oi...", b1.double().flatten(1), b2.double()))
    adapter, other = read(tmp_path, today, path), read(tmp_path, older, path)
    torch.testing.assert_close(adapter.delta(path, base), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(other.delta(path, base), expected, rtol=0, atol=1e-10)
    assert "older order" in other.notes[0]
    assert adapter.notes == []
    assert compare(adapter, other).exact
    assert compare(adapter, other, {("denoiser", path): base}).exact


def test_glora_whose_order_no_shape_tells_is_read_in_today_s_and_said(tmp_path):
    slots = {f"{name}.weight": numbers(4, 4, seed=seed) for seed, name in enumerate(("a1", "a2", "b1", "b2"))}
    adapter = read(tmp_path, slots)
    base = numbers(4, 4).double()
    a1, a2, b1, b2 = (slot.double() for slot in slots.values())
    torch.testing.assert_close(adapter.delta(LINEAR, base), base @ a1 @ a2 + b1 @ b2, rtol=0, atol=1e-12)
    assert "in either order" in adapter.notes[0]


def test_glora_with_a_core(tmp_path):
    sizes = {"a1": (6, 2, 1, 1), "a2": (2, 6, 1, 1), "b1": (8, 2, 1, 1), "b2": (2, 6, 1, 1), "bm": (2, 2, 3, 3)}
    slots = {name: numbers(*size) for name, size in sizes.items()}
    adapter = read(tmp_path, {f"{name}.weight": slot for name, slot in slots.items()}, CONV)
    base = torch.zeros(8, 6, 3, 3, dtype=torch.float64)
    b1, b2, bm = (slots[name].double() for name in ("b1", "b2", "bm"))
    expected = torch.einsum("mnhw,om,ni->oihw", bm, b1[:, :, 0, 0], b2[:, :, 0, 0])
    torch.testing.assert_close(adapter.delta(CONV, base), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("limit", [0.01, 10.0])
def test_the_oft_of_sd_scripts_under_its_own_prefix(limit, tmp_path):
    blocks, base = numbers(2, 4, 4), numbers(8, 6).double()
    flat = FLAT[LINEAR].replace("lora_unet_", "oft_unet_")
    adapter = read(tmp_path, {"oft_blocks": blocks, "alpha": torch.tensor(limit)}, flat=flat)
    skew = blocks.double() - blocks.double().mT
    norm = skew.norm()
    skew = skew * (norm.clamp(max=limit * 8) / norm)
    turn = (torch.eye(4) + skew) @ (torch.eye(4) - skew).inverse()
    expected = torch.einsum("knm,knp->kmp", turn, base.reshape(2, 4, 6)).reshape(8, 6) - base
    torch.testing.assert_close(adapter.delta(LINEAR, base), expected, rtol=0, atol=1e-7)
    with pytest.raises(AdapterFileError, match="depends on the base weight"):
        adapter.delta(LINEAR)
    with pytest.raises(AdapterFileError, match=r"its delta is \[8, -1\] .*, the weight \[6, 8\]"):
        adapter.delta(LINEAR, base.T)
    with pytest.raises(AdapterFileError, match="such an OFT of sd-scripts does nothing"):
        read(tmp_path, {"oft_blocks": blocks, "alpha": torch.tensor(0.0)}, flat=flat)


def test_the_oft_of_a_fused_layer_is_kept_and_named(tmp_path):
    slots = {f"oft_blocks.{index}": numbers(2, 4, 4) for index in range(3)}
    adapter = read(tmp_path, {**slots, "alpha": torch.tensor(0.01)})
    assert adapter.modules[0].unsupported == "of kind oft of several blocks"
    assert len(adapter.modules[0].tensors) == 3


def test_the_rotations_are_orthogonal_and_leave_lengths(tmp_path):
    base = numbers(8, 6).double()
    oft = read(tmp_path, {"oft_blocks": numbers(2, 4, 4)})
    boft = read(tmp_path, {"oft_blocks": numbers(3, 4, 2, 2)})
    for adapter in (oft, boft):
        turned = base + adapter.delta(LINEAR, base)
        torch.testing.assert_close(turned.norm(dim=0), base.norm(dim=0), rtol=1e-12, atol=0)
        assert not torch.allclose(turned, base, atol=0.1)
    assert boft.modules[0].algo == "boft"


@pytest.mark.parametrize(
    ("key", "size", "axis"),
    [("magnitude", (8,), "out"), ("dora_scale", (8, 1), "out"), ("dora_scale", (1, 8), "in")],
)
def test_the_key_and_the_shape_of_a_magnitude_tell_its_axis(key, size, axis, tmp_path):
    magnitude = numbers(8).abs() + 0.5
    adapter = read(tmp_path, {**lora(8, 8), key: magnitude.reshape(size)})
    base = numbers(8, 8).double()
    moved = base + 0.5 * lora()["lora_up.weight"].double() @ lora(8, 8)["lora_down.weight"].double()
    shape, dim = ((8, 1), 1) if axis == "out" else ((1, 8), 0)
    expected = magnitude.double().reshape(shape) * moved / moved.norm(dim=dim, keepdim=True) - base
    torch.testing.assert_close(adapter.delta(LINEAR, base), expected, rtol=0, atol=1e-12)


def test_peft_s_magnitude_of_a_square_conv_is_per_output_and_dora_scale_per_input(tmp_path):
    slots = {"lora_A.weight": numbers(2, 4, 3, 3), "lora_B.weight": numbers(4, 2, 1, 1)}
    magnitude = numbers(1, 4, 1, 1).abs()
    save_file(
        {f"unet.{CONV}.{slot}": tensor for slot, tensor in {**slots, "lora_magnitude_vector": magnitude}.items()},
        tmp_path / "peft.safetensors",
    )
    assert formats.load(tmp_path / "peft.safetensors").modules[0].magnitude_axis == "out"
    kohya = {"lora_down.weight": slots["lora_A.weight"], "lora_up.weight": slots["lora_B.weight"]}
    assert read(tmp_path, {**kohya, "dora_scale": magnitude}, CONV).modules[0].magnitude_axis == "in"


@pytest.mark.parametrize("alpha", [9999999999.0, float("inf")])
def test_the_huge_alpha_of_two_full_factors_is_ignored_and_elsewhere_refused(alpha, tmp_path):
    full = {"lokr_w1": numbers(2, 2), "lokr_w2": numbers(4, 3), "alpha": torch.tensor(alpha)}
    adapter = read(tmp_path, full)
    expected = torch.kron(full["lokr_w1"].double(), full["lokr_w2"].double())
    assert torch.equal(adapter.delta(LINEAR), expected)
    formats.save(adapter, tmp_path / "b.safetensors", "kohya")
    assert torch.equal(formats.load(tmp_path / "b.safetensors").delta(LINEAR), expected)
    formats.save(adapter, tmp_path / "c", "peft")
    assert torch.equal(formats.load(tmp_path / "c").delta(LINEAR), expected)
    if alpha == float("inf"):
        with pytest.raises(AdapterFileError, match="alpha is inf"):
            read(tmp_path, {**lora(), "alpha": torch.tensor(alpha)})


@pytest.mark.parametrize("conv", [False, True])
def test_the_sparse_rest_of_an_extraction_is_added_to_the_weight(conv, tmp_path):
    ones, kernel = ((1, 1), (3, 3)) if conv else ((), ())
    slots = {"lora_down.weight": numbers(3, 6, *kernel), "lora_up.weight": numbers(8, 3, *ones)}
    slots["alpha"] = torch.tensor([3.0])
    columns = 54 if conv else 6
    slots["bias_indices"] = torch.tensor([[0, 3, 7], [5, 0, columns - 1]], dtype=torch.int16)
    slots["bias_values"] = torch.tensor([1.5, -2.0, 4.0], dtype=torch.float16)
    slots["bias_size"] = torch.tensor([8, columns], dtype=torch.int16)
    path = CONV if conv else LINEAR
    adapter = read(tmp_path, slots, path)
    expected = slots["lora_up.weight"].double().flatten(1) @ slots["lora_down.weight"].double().flatten(1)
    expected[0, 5] += 1.5
    expected[3, 0] -= 2.0
    expected[7, columns - 1] += 4.0
    torch.testing.assert_close(adapter.delta(path).flatten(1), expected, rtol=0, atol=1e-12)
    formats.save(adapter, tmp_path / "b.safetensors", "kohya")
    kept = load_file(tmp_path / "a.safetensors")
    same_tensors(tmp_path / "b.safetensors", {**kept, f"{FLAT[path]}.alpha": torch.tensor(3.0)})
    with pytest.raises(AdapterFileError, match="bias_indices and bias_size and bias_values, for which diffusers files"):
        formats.save(adapter, tmp_path / "c.safetensors", "diffusers")


def test_a_sparse_rest_of_another_shape_is_refused_and_large_indices_are_read(tmp_path):
    slots = {**lora(), "bias_values": torch.ones(1), "bias_size": torch.tensor([8, 5])}
    adapter = read(tmp_path, {**slots, "bias_indices": torch.tensor([[1], [1]])})
    with pytest.raises(AdapterFileError, match="its sparse rest is of 8 x 5, its delta of 8 x 6"):
        adapter.delta(LINEAR)
    adapter = read(tmp_path, {**slots, "bias_size": torch.tensor([8, 6]), "bias_indices": torch.tensor([[1], [6]])})
    with pytest.raises(AdapterFileError, match="its sparse rest"):
        adapter.delta(LINEAR)
    wide = {"lora_down.weight": torch.zeros(1, 40000), "lora_up.weight": torch.ones(2, 1)}
    wide["bias_indices"] = torch.tensor([[1], [39999]]).to(torch.int16)  # -25537
    wide["bias_size"] = torch.tensor([2, 40000]).to(torch.int16)
    assert read(tmp_path, {**wide, "bias_values": torch.ones(1)}).delta(LINEAR).nonzero().tolist() == [[1, 39999]]


def test_biases_are_added_as_they_are_or_times_the_scale(tmp_path):
    bias = numbers(8)
    added = read(tmp_path, {**lora(), "diff_b": bias})
    assert torch.equal(added.bias_delta(LINEAR), bias.double())
    assert added.modules[0].scale == 0.5
    formats.save(added, tmp_path / "b.safetensors", "diffusers")
    assert torch.equal(load_file(tmp_path / "b.safetensors")[f"unet.{LINEAR}.lora_B.bias"], 2.0 * bias)
    scaled = formats.load(tmp_path / "b.safetensors")
    assert torch.equal(scaled.bias_delta(LINEAR), bias.double())
    assert compare(added, scaled).exact
    formats.save(scaled, tmp_path / "c.safetensors", "kohya")
    same_tensors(tmp_path / "c.safetensors", load_file(tmp_path / "a.safetensors"))
    assert read(tmp_path, lora()).bias_delta(LINEAR) is None


def test_two_biases_of_one_module_are_refused(tmp_path):
    with pytest.raises(AdapterFileError, match=r"two tensors for one thing: '.*diff_b' and '.*lora_B\.bias'"):
        read(tmp_path, {**lora(), "diff_b": numbers(8), "lora_B.bias": numbers(8)})


def test_a_bias_alone_changes_no_weight(tmp_path):
    adapter = read(tmp_path, {"diff_b": numbers(8)})
    assert torch.equal(adapter.delta(LINEAR, numbers(8, 6)), torch.zeros(8, 6, dtype=torch.float64))
    assert torch.equal(adapter.bias_delta(LINEAR), numbers(8).double())
    formats.save(adapter, tmp_path / "b.safetensors", "kohya")
    same_tensors(tmp_path / "b.safetensors", load_file(tmp_path / "a.safetensors"))
    assert compare(adapter, formats.load(tmp_path / "b.safetensors")).exact
    assert not compare(adapter, read(tmp_path, {"diff_b": numbers(8, seed=1)})).exact


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_biases_and_whole_changes_are_fused_and_cut_by_rows(kind, tmp_path):
    block = "transformer_blocks.0.attn"
    modules = []
    for letter in "qkv":
        bias = numbers(24, seed=ord(letter)) if letter != "k" else None
        made = module(f"{block}.to_{letter}", shape=(24, 24), alpha=4.0, bias=bias)
        if kind == "full":
            made = AdapterModule(
                component="denoiser", path=made.path, algo="full", tensors={"diff": numbers(24, 24)}, bias=bias
            )
        modules.append(made)
    adapter = AdapterFile(modules=modules, family="sd3")
    formats.save(adapter, tmp_path / "a.safetensors", "kohya")
    stored = load_file(tmp_path / "a.safetensors")
    name = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    assert stored[f"{name}.diff_b"].shape == (72,)
    assert (f"{name}.diff" in stored) == (kind == "full")
    comparison = compare(adapter, formats.load(tmp_path / "a.safetensors"))
    assert comparison.exact, comparison.problems(0.0)


DAMAGED = {
    "magnitude": ({**lora(), "dora_scale": torch.ones(5, 1)}, r"its magnitude \[5, 1\] does not fit"),
    "bias": ({**lora(), "diff_b": torch.ones(5)}, r"its bias \[5\] does not fit"),
    "sparse": (
        {**lora(), "bias_indices": torch.ones(2, 3), "bias_values": torch.ones(4), "bias_size": torch.ones(2)},
        "the sparse rest is not one of a matrix",
    ),
    "half sparse": ({**lora(), "bias_values": torch.ones(4)}, "lacks bias_indices and bias_size"),
    "glora": ({f"{name}.weight": torch.ones(4, 3) for name in ("a1", "a2", "b1", "b2")}, "a rank and a layer"),
    "half glora": ({"a1.weight": torch.ones(4, 3)}, "lacks a2 and b1 and b2"),
    "oft": ({"oft_blocks": torch.ones(2, 4, 3)}, "blocks are not square"),
    "boft": ({"oft_blocks": torch.ones(2, 3, 4, 4)}, "no power of two"),
    "rescale": ({"oft_blocks": torch.ones(2, 4, 4), "rescale": torch.ones(7, 1)}, "its rescale does not fit"),
    "constraint": ({"oft_blocks": torch.ones(2, 4, 4), "alpha": torch.ones(2)}, "alpha should be one number"),
    "peft's oft": ({"oft_R.weight": torch.ones(2, 5)}, "the upper triangle of no square block"),
    "ia3": ({"weight": torch.ones(2, 5), "on_input": torch.tensor(0)}, "more than one axis"),
    "half ia3": ({"weight": torch.ones(5)}, "lacks on_input"),
    "norm": ({"w_norm": torch.ones(5, 1)}, "should have one axis"),
    "whole numbers": ({"diff": torch.ones(4, 4, dtype=torch.int64)}, "I64, not a floating type"),
    "loha": (
        {"hada_w1_a": torch.ones(4, 2), "hada_w1_b": torch.ones(2, 4), "hada_w2_a": torch.ones(5, 2)}
        | {"hada_w2_b": torch.ones(2, 4)},
        "two products have different shapes",
    ),
}


@pytest.mark.parametrize("label", DAMAGED)
def test_damage_of_every_kind_is_named(label, tmp_path):
    tensors, message = DAMAGED[label]
    with pytest.raises(AdapterFileError, match=message):
        read(tmp_path, tensors)


SHOWN = {
    "lora + dora per output + bias": ({**lora(), "dora_scale": torch.ones(8, 1), "diff_b": torch.ones(8)}, "3", "1.5"),
    "full": ({"diff": torch.ones(4, 4)}, None, None),
    "norm + bias": ({"w_norm": torch.ones(4), "b_norm": torch.ones(4)}, None, None),
    "glora": ({f"{name}.weight": torch.ones(4, 4) for name in ("a1", "a2", "b1", "b2")}, "4", "rank"),
    "oft": ({"oft_blocks": torch.ones(2, 4, 4), "alpha": torch.tensor(0.1)}, None, None),
    "boft": ({"oft_blocks": torch.ones(2, 2, 4, 4)}, None, None),
    "ia3": ({"weight": torch.ones(4), "on_input": torch.tensor(0)}, None, None),
    "lokr": ({"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(2, 2), "alpha": torch.tensor(1e10)}, None, "ignored"),
    "bias": ({"diff_b": torch.ones(4)}, None, None),
}


@pytest.mark.parametrize("kind", SHOWN)
def test_inspect_says_kind_rank_and_alpha(kind, tmp_path):
    tensors, rank, alpha = SHOWN[kind]
    read(tmp_path, tensors)
    summary = inspect(tmp_path / "a.safetensors")
    assert summary.problems == []
    assert summary.kinds == {kind: 1}
    assert list(summary.ranks) == ([] if rank is None else [rank])
    assert list(summary.alphas) == ([] if alpha is None else [alpha])
    assert f"kinds       {kind}: 1" in as_text(summary)
