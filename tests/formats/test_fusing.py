"""Parts of one stored layer become that layer: exactly, or not at all and with the reason."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.formats.format_helpers import module
from tests.formats.fused_layers import IN, LAYERS, UNIT, slots, whole_numbers
from vislora import formats
from vislora.algebra.compare import compare
from vislora.algorithms.dora import decomposed
from vislora.errors import AdapterFileError
from vislora.formats.adapter_file import AdapterFile, AdapterModule
from vislora.formats.fusing import fuse, why_unfusable
from vislora.formats.writing import unwritable
from vislora.jobs.convert import convert

QKV = next(layer for layer in LAYERS.values() if layer.shares == (1, 1, 1))
FUSED = pytest.mark.parametrize("layer", [item for item in LAYERS.values() if item.shares], ids=lambda item: item.flat)


def read(layer, kind: str, tmp_path) -> AdapterFile:
    tensors = {f"{layer.flat}.{end}": tensor for end, tensor in slots(kind, layer.outputs).items()}
    save_file(tensors, tmp_path / "read.safetensors")
    # a single layer of a toy's width does not tell the family
    return replace(formats.load(tmp_path / "read.safetensors"), family=layer.family)


def part(index: int, algo: str = "lora", **tensors: torch.Tensor) -> AdapterModule:
    more = {name: tensors.pop(name) for name in ("magnitude", "bias") if name in tensors}
    item = AdapterModule(component="denoiser", path=QKV.paths[index], algo=algo, tensors=tensors, alpha=2.0)
    item.magnitude, item.bias = more.get("magnitude"), more.get("bias")
    item.magnitude_axis = "out" if item.magnitude is not None else None
    return item


def lora(index: int, rank: int = 2, **more: torch.Tensor) -> AdapterModule:
    seed = 10 * index + rank
    return part(index, down=whole_numbers(rank, IN, seed=seed), up=whole_numbers(UNIT, rank, seed=seed), **more)


def refused(modules: list[AdapterModule], tmp_path, message: str) -> None:
    """Assert that kohya refuses these modules, all of them and by this reason, and that nothing raises before."""
    adapter = AdapterFile(modules=modules, family=QKV.family)
    losses = unwritable(adapter, "kohya")
    assert [loss.names for loss in losses] == [tuple(item.name for item in modules)]
    with pytest.raises(AdapterFileError, match=message):
        formats.save(adapter, tmp_path / "a.safetensors", "kohya")


@FUSED
@pytest.mark.parametrize("missing", [0, 1, -1])
@pytest.mark.parametrize(
    "kind", ["lora", "lora, bias", "full", "full, bias", "loha", "lokr, product", "oft", "oft, rescaled", "ia3"]
)
def test_a_missing_member_is_rows_that_change_nothing(layer, kind, missing, tmp_path):
    adapter = read(layer, kind, tmp_path)
    gone = adapter.modules.pop(missing)
    formats.save(adapter, tmp_path / "a.safetensors", "kohya")
    again = formats.load(tmp_path / "a.safetensors")
    assert len(again.modules) == len(layer.paths)
    base = whole_numbers(layer.outputs, IN, seed=7)
    for item, rows in zip(again.modules, layer.rows, strict=True):
        delta = again.delta(item, base[rows])
        if item.path == gone.path:
            assert not delta.any()
            assert item.bias is None or not item.bias.any()
        else:
            before = adapter.find(item.path)
            assert torch.equal(delta, adapter.delta(before, base[rows]))
            assert before.bias is None or torch.equal(before.bias_delta(), item.bias_delta())


@pytest.mark.parametrize("kind", ["glora", "ia3, on input", "dora"])
def test_a_missing_member_that_no_rows_can_stand_for_is_refused(kind, tmp_path):
    adapter = read(QKV, kind, tmp_path)
    adapter.modules.pop(1)
    message = r"need a magnitude .*; a format of the parts' own names \(diffusers, peft\) keeps them apart"
    refused(adapter.modules, tmp_path, message if kind == "dora" else "a part is missing, and with kind .* no rows")


def test_full_changes_that_were_trained_apart_are_stacked(tmp_path):
    diffs = [whole_numbers(UNIT, IN, seed=seed) for seed in range(2)]
    modules = [part(0, "full", diff=diffs[0].half()), part(2, "full", diff=diffs[1], bias=torch.ones(UNIT))]
    formats.save(AdapterFile(modules=modules, family=QKV.family), tmp_path / "a.safetensors", "kohya")
    found = load_file(tmp_path / "a.safetensors")
    assert torch.equal(found[f"{QKV.flat}.diff"], torch.cat([diffs[0], torch.zeros(UNIT, IN), diffs[1]]))
    assert torch.equal(found[f"{QKV.flat}.diff_b"], torch.cat([torch.zeros(2 * UNIT), torch.ones(UNIT)]))


def test_a_bias_alone_stands_beside_a_full_change(tmp_path):
    modules = [part(0, "full", bias=torch.ones(UNIT)), part(1, "full", diff=whole_numbers(UNIT, IN))]
    adapter = AdapterFile(modules=modules, family=QKV.family)
    formats.save(adapter, tmp_path / "a.safetensors", "kohya")
    comparison = compare(adapter, formats.load(tmp_path / "a.safetensors"))
    assert comparison.exact, comparison.problems(0.0)


@pytest.mark.parametrize("ranks", [(2, 3, 4), (1, None, 5), (None, None, 3), (2, 2, 2)])
@pytest.mark.parametrize("bias", [False, True])
def test_products_of_any_ranks_become_block_diagonal(ranks, bias, tmp_path):
    modules = [
        lora(index, rank, **({"bias": whole_numbers(UNIT, seed=rank)} if bias and index != 1 else {}))
        for index, rank in enumerate(ranks)
        if rank
    ]
    adapter = AdapterFile(modules=modules, family=QKV.family)
    formats.save(adapter, tmp_path / "a.safetensors", "kohya")
    found = load_file(tmp_path / "a.safetensors")
    assert found[f"{QKV.flat}.lora_up.weight"].shape == (3 * UNIT, sum(rank or 0 for rank in ranks))
    comparison = compare(adapter, formats.load(tmp_path / "a.safetensors"))
    # alpha / rank differs from module to module, so one of the scales goes into `up`
    assert comparison.ok(1e-7), comparison.problems(1e-7)


def test_dora_of_parts_that_were_trained_apart_is_that_of_every_row(tmp_path):
    modules = [lora(index, 2 + index, magnitude=torch.rand(UNIT)) for index in range(3)]
    for item in modules:
        item.alpha = float(item.rank)
    adapter = AdapterFile(modules=modules, family=QKV.family)
    formats.save(adapter, tmp_path / "a.safetensors", "kohya")
    found = load_file(tmp_path / "a.safetensors")
    base = whole_numbers(3 * UNIT, IN, seed=5).double()
    product = found[f"{QKV.flat}.lora_up.weight"].double() @ found[f"{QKV.flat}.lora_down.weight"].double()
    whole = decomposed(base, product, found[f"{QKV.flat}.dora_scale"].double(), "out")
    parts = [adapter.delta(item, rows) for item, rows in zip(modules, base.chunk(3), strict=True)]
    assert torch.equal(torch.cat(parts), whole)


def test_members_of_different_kinds_are_refused(tmp_path):
    loha = read(QKV, "loha", tmp_path).modules[1]
    refused([lora(0), loha], tmp_path, r"several kinds \(loha, lora\); convert it to plain LoRA \(--as lora\)")
    full = part(2, "full", diff=torch.ones(UNIT, IN))
    refused([lora(0), full], tmp_path, r"several kinds \(full, lora\); a format of the parts' own names")


@pytest.mark.parametrize("kind", ["loha", "lokr, product"])
def test_products_that_share_nothing_are_refused_and_can_be_lora(kind, tmp_path):
    adapter = read(QKV, kind, tmp_path)
    other = "hada_w1_b" if kind == "loha" else "lokr_w2_a"
    adapter.modules[1].tensors[other] = adapter.modules[1].tensors[other] + 1
    refused(adapter.modules, tmp_path, r"do not share .*; convert it to plain LoRA \(--as lora\)")
    if kind == "loha":
        formats.save(adapter, tmp_path / "p", "peft")
        assert not convert(tmp_path / "p", tmp_path / "k.safetensors", "kohya", family=QKV.family).written
        report = convert(tmp_path / "p", tmp_path / "k.safetensors", "kohya", family=QKV.family, as_="lora")
        assert report.ok, (report.lost, report.problems)
        assert "3 modules as plain LoRA, exact" in report.verdict


def test_allow_loss_leaves_out_what_cannot_be_fused(tmp_path):
    adapter = read(QKV, "glora", tmp_path)
    adapter.modules.pop(1)
    adapter.modules.append(module("context_embedder", shape=(6, 4)))
    losses = unwritable(adapter, "kohya")
    assert [len(loss.names) for loss in losses] == [2]


def test_inputs_and_rows_of_the_members_have_to_agree(tmp_path):
    narrow = part(1, down=torch.ones(2, IN - 1), up=torch.ones(UNIT, 2))
    refused([lora(0), narrow], tmp_path, "inputs of several shapes")
    short = part(1, down=torch.ones(2, IN), up=torch.ones(UNIT - 1, 2))
    refused([lora(0), short], tmp_path, r"rows in the proportions 1:1:1, they have \[11, 12\]")


def test_members_of_unequal_shares():
    modules = [lora(0), None, lora(2), lora(0)]
    modules[3].tensors["up"] = whole_numbers(4 * UNIT, 2)
    fused = fuse("linear1", modules, (1, 1, 1, 4))
    assert fused.tensors["up"].shape == (7 * UNIT, 6)
    assert "proportions 1:1:1:4" in why_unfusable([*modules[:3], lora(1)], (1, 1, 1, 4))


@FUSED
def test_shared_memory_of_parts_is_written_once_for_each(layer, tmp_path):
    adapter = read(layer, "lora", tmp_path)
    assert len({item.tensors["down"].data_ptr() for item in adapter.modules}) == 1
    formats.save(adapter, tmp_path / "b.safetensors", "diffusers")
    downs = [tensor for key, tensor in load_file(tmp_path / "b.safetensors").items() if "lora_A" in key]
    assert len(downs) == len(layer.paths)
    assert all(torch.equal(tensor, downs[0]) for tensor in downs)
