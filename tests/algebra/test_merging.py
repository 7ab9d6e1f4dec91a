"""Merged adapters: exact sums, methods against PEFT's functions, what is refused; every sum in float64 by numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft.utils.merge_utils import magnitude_prune, ties

from tests.formats.format_helpers import sd_adapter
from vislora.algebra.low_rank import Limits, product_norm
from vislora.algebra.merge import How, Part, _dare, _magnitude, _ties, merge, orthogonal
from vislora.errors import AdapterFileError, AdapterMismatchError
from vislora.formats.adapter_file import AdapterFile, AdapterModule


def numbers(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def lora(seed, rank=3, alpha=1.5, path="a.b", out=7, inside=(6,), dtype=torch.float32, **more):
    tensors = {"down": numbers(seed, rank, *inside, dtype=dtype), "up": numbers(seed + 99, out, rank, dtype=dtype)}
    if len(inside) > 1:
        tensors["up"] = tensors["up"].reshape(out, rank, *[1] * (len(inside) - 1))
    return AdapterModule(component="denoiser", path=path, algo="lora", tensors=tensors, alpha=alpha, **more)


def loha(seed, rank=2, path="a.b", out=7, inside=6):
    sizes = {
        "hada_w1_a": (out, rank),
        "hada_w1_b": (rank, inside),
        "hada_w2_a": (out, rank),
        "hada_w2_b": (rank, inside),
    }
    tensors = {name: numbers(seed + place, *size) for place, (name, size) in enumerate(sizes.items())}
    return AdapterModule(component="denoiser", path=path, algo="loha", tensors=tensors, alpha=1.0)


def full(seed, path="a.b", shape=(7, 6)):
    return AdapterModule(component="denoiser", path=path, algo="full", tensors={"diff": numbers(seed, *shape)})


def part(name, weight, *modules, **more):
    return Part(name, AdapterFile(modules=list(modules), **more), lambda module: weight)


def sums(*items):
    return sum(weight * module.direction().numpy() for weight, module in items)


def near(module, wanted, tolerance=1e-6):
    return np.linalg.norm(module.direction().numpy() - wanted) <= tolerance * np.linalg.norm(wanted)


def test_a_sum_is_exact_whatever_the_ranks_and_scales():
    one, two = lora(0), lora(1, rank=2, alpha=4.0)
    merged, told = merge([part("one", 0.8, one), part("two", -0.5, two)])
    (made,) = merged.modules
    assert made.rank == 5
    assert near(made, sums((0.8, one), (-0.5, two)))
    assert told[0].parts == ("one", "two")
    assert told[0].error <= 1e-6
    assert told[0].wanted == pytest.approx(np.linalg.norm(sums((0.8, one), (-0.5, two))))


def test_equal_factors_keep_the_bits_of_half_precision():
    one, two = lora(0, dtype=torch.float16), lora(1, dtype=torch.float16)
    merged, _ = merge([part("one", 0.7, one), part("two", -0.7, two)])
    (made,) = merged.modules
    assert made.tensors["up"].dtype == torch.float16
    assert torch.equal(made.tensors["up"][:, 3:], -two.tensors["up"])
    assert made.direction().numpy() == pytest.approx(sums((0.7, one), (-0.7, two)), rel=1e-7)  # alpha is float32


@pytest.mark.parametrize("made", [lora, loha, full])
@pytest.mark.parametrize("weight", [1.0, -0.6])
def test_the_asked_precision_is_that_of_an_adapter_alone_too(made, weight):
    """Its rounding is told: nothing is silently less exact."""
    alone = made(4)
    merged, (told,) = merge([part("a", weight, alone)], How(dtype=torch.bfloat16))
    assert {tensor.dtype for tensor in merged.modules[0].tensors.values()} == {torch.bfloat16}
    apart = np.linalg.norm(merged.modules[0].direction().numpy() - sums((weight, alone)))
    assert told.apart > 0
    assert apart == pytest.approx(told.apart, rel=0.2)


def test_convs_loha_and_full_changes_join():
    conv = lora(0, inside=(6, 3, 3)), lora(1, inside=(6, 3, 3), rank=1)
    merged, _ = merge([part("a", 1.0, conv[0]), part("b", 0.5, conv[1])])
    assert merged.modules[0].tensors["down"].shape == (4, 6, 3, 3)
    assert near(merged.modules[0], sums((1.0, conv[0]), (0.5, conv[1])))
    mixed = lora(2), loha(3), full(9)
    merged, _ = merge([part("a", 1.0, mixed[0]), part("b", 0.5, mixed[1])])
    assert (merged.modules[0].algo, merged.modules[0].rank) == ("lora", 7)
    assert near(merged.modules[0], sums((1.0, mixed[0]), (0.5, mixed[1])))
    merged, told = merge([part("a", 1.0, mixed[0]), part("b", 0.5, mixed[1]), part("c", 2.0, mixed[2])])
    assert merged.modules[0].algo == "full"
    assert near(merged.modules[0], sums((1.0, mixed[0]), (0.5, mixed[1]), (2.0, mixed[2])))
    assert told[0].error <= 1e-6


@pytest.mark.parametrize("made", [lora, loha, full])
@pytest.mark.parametrize("weight", [1.0, 0.3, -2.0])
def test_one_adapter_alone_counts_what_it_is_told_to(made, weight):
    alone = made(4)
    merged, told = merge([part("a", weight, alone)])
    assert merged.modules[0].algo == alone.algo
    assert near(merged.modules[0], sums((weight, alone)), 1e-7)
    assert told[0].error == 0.0


def test_weights_differ_by_module_and_zero_leaves_out():
    a = AdapterFile(modules=[lora(0, path="x"), lora(1, path="y")])
    b = AdapterFile(modules=[lora(2, path="y"), lora(3, path="z")])
    by_path = Part("a", a, lambda module: {"x": 0.0, "y": 2.0}[module.path])
    merged, _ = merge([by_path, Part("b", b, lambda module: 1.0)])
    found = {module.path: module for module in merged.modules}
    assert set(found) == {"y", "z"}
    assert near(found["y"], sums((2.0, a.modules[1]), (1.0, b.modules[0])))
    with pytest.raises(AdapterFileError, match="nothing to merge"):
        merge([part("a", 0.0, lora(0))])


def test_biases_and_norms_are_added_up():
    bias = numbers(5, 7)
    one = lora(0, bias=bias, bias_rule="added")
    norm = [
        AdapterModule(component="denoiser", path="n", algo="norm", tensors={"w_norm": numbers(k, 7)}) for k in (6, 7)
    ]
    only = AdapterModule(component="denoiser", path="o", algo="full", tensors={}, bias=bias)
    merged, _ = merge([part("a", 2.0, one, norm[0], only), part("b", 0.5, lora(1), norm[1], only)])
    found = {module.path: module for module in merged.modules}
    assert torch.allclose(found["a.b"].bias_delta(), 2.0 * bias.double())
    assert found["n"].algo == "norm"
    assert near(found["n"], sums((2.0, norm[0]), (0.5, norm[1])))
    assert torch.allclose(found["o"].bias_delta(), 2.5 * bias.double())


def test_limits_give_the_nearest_of_a_rank():
    one, two = lora(0), lora(1)
    wanted = sums((1.0, one), (1.0, two))
    merged, told = merge([part("a", 1.0, one), part("b", 1.0, two)], How(limits=Limits(rank=2)))
    left = np.linalg.svd(wanted, compute_uv=False)[2:]
    assert merged.modules[0].rank == 2
    assert told[0].apart == pytest.approx(np.linalg.norm(left), rel=1e-5)


def test_orthogonal_rows_are_orthogonal_near_and_in_any_order():
    downs = [numbers(0, 3, 20, dtype=torch.float64), numbers(1, 2, 20, dtype=torch.float64)]
    made = orthogonal(downs)
    assert (made[0] @ made[1].T).abs().max() <= 1e-12
    again = orthogonal(downs[::-1])
    assert all(torch.allclose(one, other, atol=1e-12) for one, other in zip(made, again[::-1], strict=True))
    apart = torch.linalg.qr(torch.cat(downs).T).Q.T.split([3, 2])
    same = orthogonal(list(apart))
    assert all(torch.allclose(one, other, atol=1e-12) for one, other in zip(apart, same, strict=True))
    shared = orthogonal([downs[0], downs[0]])
    assert torch.isfinite(torch.cat(shared)).all()


def test_an_orthogonal_merge_lets_inputs_of_one_adapter_excite_it_alone():
    one, two = lora(0, inside=(20,)), lora(1, inside=(20,))
    merged, told = merge([part("a", 1.0, one), part("b", 1.0, two)], How("orthogonal"))
    rows = merged.modules[0].tensors["down"].double()
    assert (rows[:3] @ rows[3:].T).abs().max() <= 1e-6 * rows.norm() ** 2
    assert 0.0 < told[0].error < 1.0


def test_sparse_methods_are_those_of_peft():
    changes = [numbers(seed, 11, 13) for seed in range(3)]
    weights, how = [1.0, 0.5, -0.7], How(density=0.3)
    theirs = ties(changes, torch.tensor(weights), 0.3, "total")
    assert torch.allclose(_ties(changes, weights, how, ""), theirs, atol=1e-6)
    theirs = magnitude_prune(changes, torch.tensor(weights), 0.3)
    assert torch.allclose(_magnitude(changes, weights, how, ""), theirs, atol=1e-6)


def test_dare_keeps_a_share_and_the_mean():
    change = torch.ones(200, 200)
    made = _dare([change], [1.0], How(density=0.25, seed=3), "layer")
    assert set(made.unique().tolist()) == {0.0, 4.0}
    assert float(made.mean()) == pytest.approx(1.0, abs=0.03)
    assert torch.equal(made, _dare([change], [1.0], How(density=0.25, seed=3), "layer"))
    assert not torch.equal(made, _dare([change], [1.0], How(density=0.25, seed=4), "layer"))


@pytest.mark.parametrize("method", ["ties", "dare", "magnitude"])
def test_sparse_methods_want_limits_and_give_the_nearest(method):
    parts = [part("a", 1.0, lora(0)), part("b", 1.0, lora(1))]
    with pytest.raises(AdapterFileError, match="rank or energy"):
        merge(parts, How(method))
    merged, told = merge(parts, How(method, limits=Limits(rank=3)))
    assert merged.modules[0].rank == 3
    assert 0.0 < told[0].error < 2.0


def test_what_cannot_be_added_up_is_refused():
    dora = lora(0, magnitude=numbers(3, 7).abs(), magnitude_axis="out")
    alone, _ = merge([part("a", 1.0, dora)])
    assert torch.equal(alone.modules[0].magnitude, dora.magnitude)
    for parts in ([part("a", 0.5, dora)], [part("a", 1.0, dora), part("b", 1.0, lora(1))]):
        with pytest.raises(AdapterFileError, match="magnitude"):
            merge(parts)
    with pytest.raises(AdapterMismatchError, match="several model families"):
        merge([part("a", 1.0, lora(0), family="sd"), part("b", 1.0, lora(1), family="sdxl")])
    with pytest.raises(AdapterMismatchError, match="another shape"):
        merge([part("a", 1.0, lora(0)), part("b", 1.0, lora(1, out=8))])
    with pytest.raises(AdapterFileError, match="belong to no module"):
        merge([part("a", 1.0, lora(0)), part("b", 1.0, lora(1), extras={"odd": numbers(0, 2)})])
    bundle = [part(name, 1.0, lora(0), embeddings={"cat": {"emb": numbers(seed, 2)}}) for seed, name in enumerate("ab")]
    with pytest.raises(AdapterFileError, match="embedding 'cat'"):
        merge(bundle)


def test_whole_adapters_of_a_real_tree():
    one, two = sd_adapter(), sd_adapter()
    merged, told = merge([Part("a", one, lambda m: 0.5), Part("b", two, lambda m: 0.5)])
    assert max(item.error for item in told) <= 1e-6
    for mine, theirs in zip(merged.modules, one.modules, strict=True):
        assert near(mine, theirs.direction().numpy())


def test_norms_of_products():
    up, down = numbers(0, 30, 4, dtype=torch.float64), numbers(1, 4, 20, dtype=torch.float64)
    assert product_norm(up, down) == pytest.approx(float((up @ down).norm()))
