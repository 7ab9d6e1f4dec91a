"""Fused and reordered layers, read and written again: every exact row of the table of conversions, difference 0."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.formats.fused_layers import IN, KINDS, LAYERS, Layer, slots, whole_numbers
from vislora import formats
from vislora.algebra.compare import compare
from vislora.errors import AdapterFileError
from vislora.formats.adapter_file import AdapterFile
from vislora.formats.detect import parse_file
from vislora.jobs.convert import convert
from vislora.jobs.inspect import inspect

QKV = next(layer for layer in LAYERS.values() if layer.shares)
ANY_LAYER = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
ANY_KIND = pytest.mark.parametrize("kind", KINDS)
# these two do not tell how wide a layer is, so not whether this one is the last of its blocks
BLIND = ("bias", "oft", "oft, rescaled", "ia3", "ia3, on input")


def file_of(layer: Layer, kind: str, path) -> dict[str, Tensor]:
    tensors = {f"{layer.flat}.{end}": tensor for end, tensor in slots(kind, layer.outputs).items()}
    save_file(tensors, path)
    return tensors


def skip_blind(layer: Layer, kind: str) -> None:
    if kind in BLIND and "context_block_adaLN" in layer.flat:
        pytest.skip("stays whole: nothing tells whether its halves change places")


@ANY_LAYER
@ANY_KIND
def test_every_row_of_the_change_is_that_of_the_whole_layer(layer, kind, tmp_path):
    """Read the module as it is, under the name of a layer that is not fused, and take its rows."""
    skip_blind(layer, kind)
    file_of(layer, kind, tmp_path / "a.safetensors")
    plain = slots(kind, layer.outputs)
    save_file({f"lora_unet_context_embedder.{end}": item for end, item in plain.items()}, tmp_path / "b.safetensors")
    read, whole = (formats.load(tmp_path / name) for name in ("a.safetensors", "b.safetensors"))
    base = whole_numbers(layer.outputs, IN, seed=9)
    expected, bias = whole.delta(whole.modules[0], base), whole.modules[0].bias_delta()
    assert [item.path for item in read.modules] == list(layer.paths)
    for item, rows in zip(read.modules, layer.rows, strict=True):
        assert item.uncut == ""
        assert torch.equal(read.delta(item, base[rows]), expected[rows])
        assert bias is None if item.bias is None else torch.equal(item.bias_delta(), bias[rows])
        if layer.shares and kind not in ("ia3, on input",):
            assert (item.target.start, item.target.length) == (int(rows[0]), len(rows))


@ANY_LAYER
@ANY_KIND
def test_parts_are_joined_again_bit_for_bit(layer, kind, tmp_path):
    skip_blind(layer, kind)
    tensors = file_of(layer, kind, tmp_path / "a.safetensors")
    report = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya", family=layer.family)
    assert report.ok, (report.lost, report.problems)
    same(tmp_path / "b.safetensors", tensors)


def same(path, tensors: dict[str, Tensor]) -> None:
    """Assert that these tensors are in a file, and nothing else but an alpha that says what was meant."""
    found = load_file(path)
    assert all(key.endswith(".alpha") for key in found.keys() - tensors.keys())
    gone = {key for key in tensors.keys() - found.keys() if not (key.endswith(".alpha") and tensors[key] == 0)}
    assert not gone
    kept = {key: tensor for key, tensor in tensors.items() if key in found}
    assert all(torch.equal(found[key], tensor) and found[key].dtype == tensor.dtype for key, tensor in kept.items())


@pytest.mark.parametrize("through", ["diffusers", "peft"])
@pytest.mark.parametrize("kind", ["lora", "lora, zero rows", "lora, bias", "dora", "loha", "lokr, product"])
@ANY_LAYER
def test_there_and_back_through_a_format_of_parts(layer, kind, through, tmp_path):
    tensors = file_of(layer, kind, tmp_path / "a.safetensors")
    there = tmp_path / ("b.safetensors" if through == "diffusers" else "b")
    report = convert(tmp_path / "a.safetensors", there, through, family=layer.family)
    if report.lost:
        advice = "convert it to plain LoRA (--as lora)"
        reasons = {
            "diffusers": f"for which diffusers files have no slot; {advice}",
            "peft": f"no decompose_factor of PEFT splits as they are; {advice}",
        }
        assert reasons[through] in report.lost[0]
        assert kind in ("loha", "lokr, product")
        return
    assert report.ok, report.problems
    read = formats.load(there)
    assert sorted(item.path for item in read.modules) == sorted(layer.paths)
    formats.save(AdapterFile(modules=read.modules, family=layer.family), tmp_path / "c.safetensors", "kohya")
    same(tmp_path / "c.safetensors", tensors)


@pytest.mark.parametrize("kind", ["lora", "full", "loha", "lokr, product", "glora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_what_it_is(kind, dtype, tmp_path):
    tensors = {
        f"{QKV.flat}.{end}": tensor.to(dtype) if tensor.dim() else tensor
        for end, tensor in slots(kind, QKV.outputs).items()
    }
    save_file(tensors, tmp_path / "a.safetensors")
    formats.save(formats.load(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", "kohya")
    same(tmp_path / "b.safetensors", tensors)


@pytest.mark.parametrize(("kind", "conv"), [("tucker", False), ("loha", True)])
def test_tucker_cores_are_shared_by_all_parts(kind, conv, tmp_path):
    out, draw = QKV.outputs, whole_numbers
    every = {
        "tucker": {
            "lora_down.weight": draw(2, IN, 1, 1),
            "lora_mid.weight": draw(2, 2, 3, 3),
            "lora_up.weight": draw(out, 2, 1, 1),
        },
        "loha": {
            **{f"hada_t{i}": draw(2, 2, 3, 3, seed=i) for i in (1, 2)},
            **{f"hada_w{i}_a": draw(2, out, seed=i) for i in (1, 2)},
            **{f"hada_w{i}_b": draw(2, IN, seed=i) for i in (1, 2)},
        },
    }
    tensors = {f"{QKV.flat}.{end}": tensor for end, tensor in every[kind].items()}
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({f"lora_unet_context_embedder.{end}": item for end, item in every[kind].items()}, tmp_path / "w")
    read, whole = formats.load(tmp_path / "a.safetensors"), formats.load(tmp_path / "w")
    deltas = [read.delta(item) for item in read.modules]
    assert torch.equal(torch.cat(deltas), whole.delta(whole.modules[0]))
    formats.save(read, tmp_path / "b.safetensors", "kohya")
    same(tmp_path / "b.safetensors", tensors)


def damaged(**more: Tensor) -> dict[str, Tensor]:
    return {**slots("lora", QKV.outputs), **more}


LORA_ADVICE = r"convert it to plain LoRA \(--as lora\)"
KEPT_ADVICE = "a format of the original names holds it as it is"
WHOLE = {
    "lokr": (
        {"lokr_w1": whole_numbers(2, 2), "lokr_w2_a": whole_numbers(18, 2), "lokr_w2_b": whole_numbers(2, 4)},
        f"come in blocks of 18, and 0 to 12 are no whole blocks; {LORA_ADVICE}",
    ),
    "oft blocks": (
        {"oft_blocks": whole_numbers(2, 18, 18) / 64, "alpha": torch.tensor(0.0)},
        f"come in blocks of 18, .*; {KEPT_ADVICE}",
    ),
    "oft constraint": (
        {"oft_blocks": whole_numbers(9, 4, 4) / 64, "alpha": torch.tensor(0.25)},
        rf"its constraint \(alpha 0.25\) bounds the rotation of all rows together; {KEPT_ADVICE}",
    ),
    "boft": (
        {"oft_blocks": whole_numbers(2, 2, 18, 18) / 64, "alpha": torch.tensor(0.0)},
        f"a butterfly .* mixes rows from everywhere in the layer; {KEPT_ADVICE}",
    ),
    "dora per input": (
        {**slots("lora", 36), "dora_scale": whole_numbers(1, IN)},
        rf"its magnitude \(DoRA\) is per input, .*; {KEPT_ADVICE}",
    ),
    "sparse rest": (
        {
            **slots("lora", 36),
            "bias_indices": torch.tensor([[0, 13], [1, 2]]),
            "bias_values": torch.ones(2),
            "bias_size": torch.tensor([36, IN]),
        },
        f"its sparse rest .* is not cut; {KEPT_ADVICE}",
    ),
}


@pytest.mark.parametrize("case", WHOLE)
def test_what_cannot_be_cut_stays_whole_and_comes_back_bit_for_bit(case, tmp_path):
    tensors = {f"{QKV.flat}.{end}": tensor for end, tensor in WHOLE[case][0].items()}
    save_file(tensors, tmp_path / "a.safetensors")
    parsed = parse_file(tmp_path / "a.safetensors")
    assert parsed.family == QKV.family
    assert "none of whose" not in inspect(tmp_path / "a.safetensors").what
    read = formats.load(tmp_path / "a.safetensors")
    assert [(item.path, item.raw_name, item.target) for item in read.modules] == [(None, QKV.flat, None)]
    assert read.notes == [f"'{QKV.flat}' fuses or reorders layers and stays whole: {read.modules[0].uncut}"]
    report = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya")
    assert report.ok, (report.lost, report.problems)
    same(tmp_path / "b.safetensors", tensors)
    with pytest.raises(AdapterFileError, match="1 modules of whole layers, of which diffusers .*: .*" + WHOLE[case][1]):
        formats.save(read, tmp_path / "c.safetensors", "diffusers")
    assert compare(read, formats.load(tmp_path / "b.safetensors")).exact


def test_a_part_cannot_be_written_beside_its_whole(tmp_path):
    tensors = {f"{QKV.flat}.{end}": tensor for end, tensor in WHOLE["lokr"][0].items()}
    save_file(tensors, tmp_path / "a.safetensors")
    read = formats.load(tmp_path / "a.safetensors")
    file_of(QKV, "lora", tmp_path / "b.safetensors")
    read.modules.append(formats.load(tmp_path / "b.safetensors").modules[1])
    with pytest.raises(AdapterFileError, match="several modules would be written as"):
        formats.save(read, tmp_path / "c.safetensors", "kohya")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"diff_b": torch.ones(35)}, r"its bias \[35\] does not fit its 36 output rows"),
        ({"dora_scale": torch.ones(40, 1)}, r"its magnitude \[40, 1\] does not fit its 36 output rows"),
    ],
)
def test_what_lies_on_top_has_the_layers_rows(more, message, tmp_path):
    save_file({f"{QKV.flat}.{end}": item for end, item in damaged(**more).items()}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match=message):
        formats.load(tmp_path / "a.safetensors")


def test_damaged_slots_are_told_by_their_names(tmp_path):
    broken = {"lokr_w1": torch.ones(6), "lokr_w2": torch.ones(6)}
    save_file({f"{QKV.flat}.{end}": item for end, item in broken.items()}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match="these shapes fit no layer"):
        formats.load(tmp_path / "a.safetensors")


def test_cutting_needs_no_torch():
    script = "import sys, vislora.formats.cutting; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
