"""LoHa, LoKr, Tucker and full changes as plain LoRA: the identities, the nearest of a rank, whole files and the job."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.formats.format_helpers import fixture, module, sd_adapter
from tests.layers import CASES, drawn
from vislora import formats
from vislora.algebra.compact import compact
from vislora.algebra.compare import compare
from vislora.algebra.low_rank import (
    Limits,
    loha_product,
    lokr_product,
    nearest_product,
    nearest_to_product,
    within_sides,
)
from vislora.algebra.merge import How, Part, merge
from vislora.algebra.resize import resize
from vislora.algebra.to_lora import Conversion, Kept, to_lora
from vislora.cli import main
from vislora.errors import AdapterFileError, ConfigError
from vislora.formats.adapter_file import AdapterFile, AdapterModule
from vislora.jobs.convert import convert
from vislora.registry import ALGORITHMS

QUICK = settings(max_examples=30, deadline=None, derandomize=True, database=None)
SIZE = st.integers(1, 5)
SEED = st.integers(0, 2**31)
QKV = "lora_unet_joint_blocks_0_x_block_attn_qkv"
FULL = pytest.mark.skipif("full" not in ALGORITHMS, reason="full changes are not supported yet")


def numbers(seed: int, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def product(up: torch.Tensor, down: torch.Tensor) -> np.ndarray:
    return up.numpy() @ down.flatten(1).numpy()


def near(found: np.ndarray, wanted: np.ndarray) -> bool:
    return np.linalg.norm(found - wanted) <= 1e-12 * np.linalg.norm(wanted)


@QUICK
@given(out=SIZE, columns=SIZE, r1=SIZE, r2=SIZE, seed=SEED)
def test_an_entrywise_product_of_products_is_one_product(out, columns, r1, r2, seed):
    """(A1 B1) * (A2 B2) of shape (out, columns), the ranks may differ."""
    slots = numbers(seed, hada_w1_a=(out, r1), hada_w1_b=(r1, columns), hada_w2_a=(out, r2), hada_w2_b=(r2, columns))
    a1, b1, a2, b2 = (slots[name].numpy() for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"))
    up, down = loha_product(slots)
    assert up.shape[1] == r1 * r2
    assert near(product(up, down), (a1 @ b1) * (a2 @ b2))
    assert near(product(*within_sides(up, down)), (a1 @ b1) * (a2 @ b2))
    assert within_sides(up, down)[0].shape[1] <= max(r1 * r2 if r1 * r2 <= min(out, columns) else 0, min(out, columns))


@QUICK
@given(shape=st.tuples(SIZE, SIZE, SIZE, SIZE), r1=st.none() | SIZE, r2=st.none() | SIZE, seed=SEED)
def test_a_kronecker_product_is_one_product(shape, r1, r2, seed):
    """kron(W1 (l, m), W2 (k, n)), either factor full or a product."""
    rows, columns, inner_rows, inner_columns = shape
    slots = numbers(seed, lokr_w1=(rows, columns), lokr_w2=(inner_rows, inner_columns))
    if r1:
        slots |= numbers(seed + 1, lokr_w1_a=(rows, r1), lokr_w1_b=(r1, columns))
        slots["lokr_w1"] = slots["lokr_w1_a"] @ slots["lokr_w1_b"]
    if r2:
        slots |= numbers(seed + 2, lokr_w2_a=(inner_rows, r2), lokr_w2_b=(r2, inner_columns))
        slots["lokr_w2"] = slots["lokr_w2_a"] @ slots["lokr_w2_b"]
    wanted = np.kron(slots["lokr_w1"].numpy(), slots["lokr_w2"].numpy())
    given_slots = {
        name: slot for name, slot in slots.items() if not (name == "lokr_w1" and r1) and not (name == "lokr_w2" and r2)
    }
    up, down = lokr_product(given_slots)
    assert up.shape[1] == (r1 or min(rows, columns)) * (r2 or min(inner_rows, inner_columns))
    assert near(product(up, down), wanted)


@QUICK
@given(shape=st.tuples(SIZE, SIZE), rank=SIZE, kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)), seed=SEED)
def test_tucker_cores_are_multiplied_out(shape, rank, kernel, seed):
    out, inputs = shape
    slots = numbers(
        seed,
        hada_t1=(rank, rank, *kernel),
        hada_w1_a=(rank, out),
        hada_w1_b=(rank, inputs),
        hada_t2=(rank, rank, *kernel),
        hada_w2_a=(rank, out),
        hada_w2_b=(rank, inputs),
    )
    wanted = 1.0
    for index in (1, 2):
        core, left, right = (slots[f"hada_{name}"].numpy() for name in (f"t{index}", f"w{index}_a", f"w{index}_b"))
        wanted = wanted * np.einsum("ijxy,ip,jr->prxy", core, left, right)
    up, down = loha_product(slots)
    assert down.shape == (rank * rank, inputs, *kernel)
    assert near(product(up, down), wanted.reshape(out, -1))
    lokr = {"lokr_w1": slots["hada_w1_a"], "lokr_t2": slots["hada_t2"]}
    lokr |= {"lokr_w2_a": slots["hada_w2_a"], "lokr_w2_b": slots["hada_w2_b"]}
    inner = np.einsum("ijxy,ip,jr->prxy", *(slots[f"hada_{name}"].numpy() for name in ("t2", "w2_a", "w2_b")))
    outer = slots["hada_w1_a"].numpy()
    wanted = np.einsum("lm,pqxy->lpmqxy", outer, inner).reshape(rank * out, -1)
    assert near(product(*lokr_product(lokr)), wanted)


def test_the_nearest_product_of_a_rank_is_the_truncated_svd():
    matrix = numbers(0, a=(40, 30))["a"]
    values = torch.linalg.svdvals(matrix)
    up, down = nearest_product(matrix, Limits(7, None))
    assert (up.shape[1], down.shape[0]) == (7, 7)
    assert torch.linalg.vector_norm(matrix - up @ down) == pytest.approx(float(values[7:].norm()), rel=1e-12)
    share = float(values[:9].square().sum() / values.square().sum())
    assert nearest_product(matrix, Limits(None, share - 1e-9))[0].shape[1] == 9
    assert nearest_product(matrix, Limits(None, share + 1e-9))[0].shape[1] == 10
    assert nearest_product(matrix, Limits(4, share))[0].shape[1] == 4
    assert nearest_product(torch.zeros(5, 4, dtype=torch.float64), Limits(None, 0.9))[0].abs().max() == 0


def test_a_large_matrix_is_sketched_and_nearly_as_good():
    slots = numbers(1, left=(300, 260), right=(260, 260))
    left, right = (torch.linalg.qr(slots[name]).Q for name in ("left", "right"))
    matrix = left * torch.linspace(0, -6, 260, dtype=torch.float64).exp() @ right
    best = float(torch.linalg.svdvals(matrix)[16:].norm())
    before = torch.get_rng_state()
    up, down = nearest_product(matrix, Limits(16, None))
    assert torch.equal(torch.get_rng_state(), before)
    assert best <= float(torch.linalg.vector_norm(matrix - up @ down)) * (1 + 1e-12) <= 1.001 * best
    assert torch.equal(nearest_product(matrix, Limits(16, None))[0], up)


def test_the_nearest_of_a_product_needs_no_full_matrix():
    slots = numbers(2, up=(60, 8), down=(8, 50))
    up, down = nearest_to_product(slots["up"], slots["down"], Limits(3))
    values = torch.linalg.svdvals(slots["up"] @ slots["down"])
    apart = torch.linalg.vector_norm(slots["up"] @ slots["down"] - up @ down)
    assert up.shape == (60, 3)
    assert float(apart) == pytest.approx(float(values[3:].norm()), rel=1e-10)


def lycoris_module(case: str, kind: str, rank: int = 2, tucker: bool = False, path: str = "a") -> AdapterModule:
    tensors = drawn(CASES[case].layer(), ALGORITHMS[kind], rank, tucker)
    return AdapterModule(component="denoiser", path=path, algo=kind, tensors=tensors, alpha=3.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("kind", "tucker"), [("loha", False), ("loha", True), ("lokr", False), ("lora", True)])
@pytest.mark.parametrize("case", ["linear", "conv2d", "conv2d-1x1"])
def test_exact_kinds_become_lora(kind, tucker, case, dtype):
    item = lycoris_module(case, kind, tucker=tucker and case != "linear", path="mid_block.resnets.0.conv1")
    item.tensors = {slot: tensor.to(dtype) for slot, tensor in item.tensors.items()}
    adapter = AdapterFile(modules=[item], family="sd")
    made, told = to_lora(adapter)
    if item.tensors.keys() == {"down", "up"}:
        assert told == []
        return
    assert set(made.modules[0].tensors) == {"down", "up"}
    assert [(type(entry), entry.kind, entry.reduced) for entry in told] == [(Conversion, kind, False)]
    assert told[0].error <= 1e-7
    assert compare(adapter, made).ok(2e-7), compare(adapter, made).problems(2e-7)
    core = any(slot.endswith(("t1", "t2", "mid")) for slot in item.tensors)
    if dtype != torch.float32 and not core:
        assert {tensor.dtype for tensor in made.modules[0].tensors.values()} <= {dtype, torch.float32}
        assert compare(adapter, made).ok(1e-15)


def test_convs_that_are_stored_as_matrices_get_their_kernels():
    paths = {"mid_block.resnets.0.conv1": 4, "mid_block.attentions.0.proj_in": 4, "up_blocks.0.x.conv_shortcut": 4}
    wide = {"hada_w1_a": (8, 2), "hada_w1_b": (2, 36), "hada_w2_a": (8, 2), "hada_w2_b": (2, 36)}
    modules = [
        AdapterModule(
            component="denoiser", path=path, algo="loha", tensors={k: v.float() for k, v in numbers(0, **wide).items()}
        )
        for path in (*paths, "mid_block.attentions.0.transformer_blocks.0.attn1.to_k")
    ]
    text = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    keys = module(text, shape=(8, 768))
    axes = {item.path: item.tensors["down"].dim() for item in to_lora(AdapterFile(modules=[*modules, keys]))[0].modules}
    assert [axes[path] for path in paths] == [4, 4, 4]
    assert [axes[item.path] for item in (modules[-1], keys)] == [2, 2]
    axes = {item.path: item.tensors["down"].dim() for item in to_lora(AdapterFile(modules=modules))[0].modules}
    assert axes["mid_block.attentions.0.proj_in"] == 2, "a linear layer in all UNets but SD 1's"


@pytest.mark.parametrize(("family", "axes"), [("sd3", 4), ("pixart", 4), ("auraflow", 2)])
def test_a_patch_embedder_is_a_conv_or_a_linear_layer_by_its_family(family, axes):
    slots = {"hada_w1_a": (8, 2), "hada_w1_b": (2, 16), "hada_w2_a": (8, 2), "hada_w2_b": (2, 16)}
    tensors = {name: value.float() for name, value in numbers(0, **slots).items()}
    loha = AdapterModule(component="denoiser", path="pos_embed.proj", algo="loha", tensors=tensors)
    adapter = AdapterFile(modules=[loha], family=family)
    parts = [Part(name, adapter, lambda module: 0.5) for name in "ab"]
    made = [to_lora(adapter)[0], resize(adapter, Limits(1))[0], merge(parts, How())[0]]
    assert [file.modules[0].tensors["down"].dim() for file in made] == [axes] * 3


@pytest.mark.parametrize("path", ["pos_embed.proj", "mid_block.resnets.0.conv1", "conv_in"])
def test_a_lora_of_matrices_stays_one_whatever_its_layer_is_called(path):
    plain = module(path, rank=2, shape=(8, 36))
    adapter = AdapterFile(modules=[plain], family="auraflow")
    made = [resize(adapter, Limits(1))[0], merge([Part("a", adapter, lambda module: 0.5)], How())[0]]
    assert [file.modules[0].tensors["down"].dim() for file in made] == [2, 2]


def test_the_rank_is_at_most_the_shorter_side():
    made, told = to_lora(AdapterFile(modules=[lycoris_module("linear", "loha", rank=4)]))
    assert told[0].rank == 5
    assert made.modules[0].tensors["down"].shape == (5, 6)
    assert told[0].error < 1e-7


def test_a_rank_reduces_what_is_no_plain_lora_and_says_the_error():
    adapter = AdapterFile(modules=[lycoris_module("linear", "loha", rank=2), module("b", rank=4)])
    made, told = to_lora(adapter, Limits(2))
    loha, plain = made.modules
    assert plain is adapter.modules[1]
    assert loha.rank == 2
    matrix = adapter.modules[0].direction()
    values = torch.linalg.svdvals(matrix)
    assert told[0].reduced
    assert told[0].error == pytest.approx(float(values[2:].norm() / values.norm()), rel=1e-5)
    assert to_lora(adapter, Limits(4))[1][0].reduced is False
    assert to_lora(adapter, Limits(energy=0.999999))[1][0].error <= 1e-3


def test_magnitudes_and_biases_stay_on_top():
    item = lycoris_module("linear", "loha")
    item.magnitude, item.magnitude_axis = torch.rand(5), "out"
    made = to_lora(AdapterFile(modules=[item]))[0].modules[0]
    assert (made.magnitude is item.magnitude, made.magnitude_axis) == (True, "out")


@FULL
def test_full_changes_need_a_rank():
    diff = torch.randn(12, 10, generator=torch.Generator().manual_seed(0))
    modules = [
        AdapterModule(component="denoiser", path=path, algo="full", tensors={"diff": tensor})
        for path, tensor in (("a", diff), ("b", diff[0]), ("c", diff.reshape(12, 5, 2, 1)))
    ]
    adapter = AdapterFile(modules=modules)
    made, told = to_lora(adapter)
    assert made.modules == modules
    assert isinstance(told[0], Kept)
    assert "name a rank, or a share of energy" in told[0].reason
    made, told = to_lora(adapter, Limits(10))
    assert [sorted(item.tensors) for item in made.modules] == [["down", "up"], ["diff"], ["down", "up"]]
    assert made.modules[2].tensors["down"].shape == (10, 5, 2, 1)
    assert max(entry.error for entry in told if isinstance(entry, Conversion)) < 1e-6


def test_a_fused_layer_that_could_not_be_cut_is_cut_as_lora(tmp_path):
    slots = {"lokr_w1": torch.randn(2, 4), "lokr_w2_a": torch.randn(12, 2), "lokr_w2_b": torch.randn(2, 2)}
    save_file({f"{QKV}.{slot}": tensor for slot, tensor in slots.items()}, tmp_path / "a.safetensors")
    whole = formats.load(tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match="convert it to plain LoRA"):
        formats.save(whole, tmp_path / "b.safetensors", "diffusers")
    made, told = to_lora(whole)
    assert [item.path for item in made.modules] == [f"transformer_blocks.0.attn.to_{name}" for name in "qkv"]
    delta = torch.cat([item.direction() for item in made.modules])
    wanted = torch.kron(slots["lokr_w1"].double(), slots["lokr_w2_a"].double() @ slots["lokr_w2_b"].double())
    torch.testing.assert_close(delta, wanted, rtol=0, atol=1e-6)
    assert len(told) == 1
    formats.save(made, tmp_path / "b.safetensors", "diffusers")
    assert compare(made, formats.load(tmp_path / "b.safetensors")).exact


def test_parts_of_a_fused_loha_keep_one_down_and_fuse_again_at_rank_r_squared(tmp_path):
    slots = numbers(0, hada_w1_a=(24, 2), hada_w1_b=(2, 8), hada_w2_a=(24, 2), hada_w2_b=(2, 8))
    save_file({f"{QKV}.{slot}": tensor.float() for slot, tensor in slots.items()}, tmp_path / "a.safetensors")
    for to, place in (("diffusers", "b.safetensors"), ("peft", "c"), ("kohya", "d.safetensors")):
        report = convert(tmp_path / "a.safetensors", tmp_path / place, to, as_="lora", family="sd3")
        assert report.ok, (to, report.lost, report.problems)
    found = load_file(tmp_path / "d.safetensors")
    assert found[f"{QKV}.lora_down.weight"].shape == (4, 8)
    delta = found[f"{QKV}.lora_up.weight"].double() @ found[f"{QKV}.lora_down.weight"].double()
    wanted = (slots["hada_w1_a"] @ slots["hada_w1_b"]) * (slots["hada_w2_a"] @ slots["hada_w2_b"])
    torch.testing.assert_close(delta * found[f"{QKV}.alpha"].double() / 4, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["loha", "lokr", "locon_tucker"])
def test_files_of_lycoris_become_lora_with_the_deltas_that_lycoris_applies(name, tmp_path):
    source = fixture(f"lycoris_tiny/{name}.safetensors")
    truth = load_file(fixture(f"lycoris_tiny/{name}.truth_delta.safetensors"))
    report = convert(source, tmp_path / "a.safetensors", "diffusers", as_="lora", report=tmp_path / "r.json")
    assert report.ok, report.problems
    assert "modules as plain LoRA, exact" in report.verdict
    made = formats.load(tmp_path / "a.safetensors")
    for key, expected in truth.items():
        # a 1 x 1 conv that was a matrix stays one: only SD 1's width of text features would tell
        delta = made.delta(key.removesuffix(".weight")).reshape(expected.shape)
        assert torch.linalg.vector_norm(delta - expected) <= 3e-6 * torch.linalg.vector_norm(delta)
    written = json.loads((tmp_path / "r.json").read_text())
    assert len(written["changed"]) == int(report.changes.split()[0])
    assert max(entry["error"] for entry in written["changed"].values()) < 1e-6


def test_a_rank_that_loses_something_is_said_and_still_proven(tmp_path, capsys):
    source = str(fixture("lycoris_tiny/loha.safetensors"))
    target = str(tmp_path / "a.safetensors")
    assert main(["convert", source, target, "--to", "kohya", "--as", "lora", "--rank", "4"]) == 0
    said = capsys.readouterr()
    assert "max difference 0)" in said.out
    assert "reduced: relative error" in said.out
    assert "largest relative errors of" in said.err
    made = formats.load(target)
    assert {item.rank for item in made.modules} == {4}
    assert made.metadata.get("ss_network_module", "networks.lora") == "networks.lora"
    assert main(["convert", source, target, "--to", "diffusers", "--overwrite"]) == 1
    assert "convert it to plain LoRA (--as lora)" in capsys.readouterr().err


def test_a_rank_without_lora_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="give --as lora too"):
        convert(tmp_path / "a", tmp_path / "b.safetensors", "kohya", rank=3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_unused_ranks_are_dropped_without_any_difference(dtype, tmp_path):
    """kohya's split_qkv: three products of rank 4 on the diagonal of one of rank 12, whose alpha stays 4."""
    up, down = torch.zeros(24, 12, dtype=dtype), torch.randn(12, 8).to(dtype)
    for part in range(3):
        up[8 * part : 8 * part + 8, 4 * part : 4 * part + 4] = torch.randn(8, 4)
    tensors = {f"{QKV}.lora_down.weight": down, f"{QKV}.lora_up.weight": up, f"{QKV}.alpha": torch.tensor(4.0)}
    save_file(tensors, tmp_path / "a.safetensors")
    read = formats.load(tmp_path / "a.safetensors")
    small, told = compact(read)
    assert [(item.before, item.after) for item in told] == [(12, 4)] * 3
    assert compare(read, small).exact
    assert all(torch.equal(a.direction(), b.direction()) for a, b in zip(read.modules, small.modules, strict=True))
    report = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers", compact=True)
    assert report.ok
    assert compare(read, formats.load(tmp_path / "b.safetensors")).exact
    assert convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kohya", family="sd3").ok
    found = load_file(tmp_path / "c.safetensors")
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())


def test_a_module_without_any_effect_keeps_one_rank():
    idle = sd_adapter()
    idle.modules[0].tensors["up"].zero_()
    small, told = compact(idle)
    assert [(item.name, item.after) for item in told] == [("denoiser: conv_in", 1)]
    assert compare(idle, small).exact
