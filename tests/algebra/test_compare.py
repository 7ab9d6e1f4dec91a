from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from tests.formats.format_helpers import module, sd_adapter
from tests.layers import drawn
from vislora.algebra.compare import compare
from vislora.algorithms.base import KINDS
from vislora.errors import AdapterFileError
from vislora.formats import AdapterFile, AdapterModule
from vislora.registry import ALGORITHMS


def test_an_adapter_equals_itself():
    comparison = compare(sd_adapter(), sd_adapter())
    assert comparison.exact
    assert (comparison.largest, comparison.relative) == (0.0, 0.0)
    assert len(comparison.modules) == len(sd_adapter().modules)


def test_differences_are_measured_in_float64():
    other = sd_adapter()
    delta = other.delta("conv_in")
    other.modules[0].alpha *= 1.0 + 2.0**-20
    comparison = compare(sd_adapter(), other)
    assert comparison.relative == pytest.approx(2.0**-20)
    assert comparison.largest == pytest.approx(float(delta.abs().max()) * 2.0**-20)
    assert comparison.ok(1e-6)
    assert not comparison.exact
    assert "denoiser: conv_in: differs by" in comparison.problems(0.0)[0]


def test_missing_and_extra_modules_count_unless_they_do_nothing():
    other = sd_adapter()
    other.modules.pop(0)
    assert compare(sd_adapter(), other).missing == ["denoiser: conv_in"]
    assert compare(other, sd_adapter()).extra == ["denoiser: conv_in"]
    idle = deepcopy(sd_adapter())
    idle.modules[0].tensors["up"].zero_()
    assert compare(idle, other).exact
    assert compare(other, idle).exact


def test_another_shape_is_a_problem():
    other = sd_adapter()
    other.modules[0].tensors["up"] = torch.ones(5, 2, 1, 1)
    assert "became [5, 16, 3, 3]" in compare(sd_adapter(), other).problems(1.0)[0]


def test_two_modules_for_one_layer_are_refused():
    other = sd_adapter()
    other.modules.append(other.modules[0])
    with pytest.raises(AdapterFileError, match="two modules for one layer"):
        compare(other, other)


def test_find_names_what_is_near():
    with pytest.raises(AdapterFileError, match="did you mean 'conv_in'"):
        sd_adapter().delta("conv_inn")


LAYER = torch.nn.Linear(6, 8)
TURNING = [name for name in ALGORITHMS if ALGORITHMS[name].needs_base]


def one(kind: str, seed: int = 0, **more) -> AdapterFile:
    slots = drawn(LAYER, ALGORITHMS[kind], 2, seed=seed) if kind != "set" else {"set_weight": torch.eye(8, 6) + seed}
    return AdapterFile(modules=[AdapterModule(component="denoiser", path="a", algo=kind, tensors=slots, **more)])


@pytest.mark.parametrize("kind", TURNING)
def test_kinds_that_depend_on_the_base_weight(kind):
    base = {("denoiser", "a"): LAYER.weight.detach()}
    assert compare(one(kind), one(kind)).exact
    assert compare(one(kind), one(kind), base).exact
    nothing = AdapterFile(modules=[])
    assert compare(one(kind), nothing).missing == ["denoiser: a"]
    for bases in (None, base):
        comparison = compare(one(kind), one(kind, seed=1), bases)
        assert not comparison.ok(0.01)
        assert not comparison.modules[0].problem
    same = AdapterFile(modules=[module("a", shape=(8, 6))])
    assert "only the base weight can tell apart" in compare(one(kind), same).problems(1.0)[0]
    delta = one(kind).delta("a", LAYER.weight.detach())
    full = AdapterModule(component="denoiser", path="a", algo="full", tensors={"diff": delta})
    assert compare(one(kind), AdapterFile(modules=[full]), base).ok(1e-12)


def test_a_rank_of_another_shape_and_an_idle_rotation():
    idle = AdapterFile(
        modules=[
            AdapterModule(component="denoiser", path="a", algo="oft", tensors={"oft_blocks": torch.zeros(2, 4, 4)})
        ]
    )
    assert compare(idle, AdapterFile(modules=[])).exact
    wide = one("glora")
    wide.modules[0].tensors = drawn(LAYER, ALGORITHMS["glora"], 3)
    assert "became" in compare(one("glora"), wide).problems(1.0)[0]
    assert not compare(one("glora"), wide, {("denoiser", "a"): LAYER.weight.detach()}).modules[0].problem


def test_biases_and_norms_count():
    assert KINDS.isdisjoint(ALGORITHMS["norm"].kinds({}))
    norm = AdapterFile(
        modules=[AdapterModule(component="denoiser", path="n", algo="norm", tensors={"w_norm": torch.ones(4)})]
    )
    biased = deepcopy(norm)
    biased.modules[0].bias = torch.ones(4)
    assert compare(norm, norm).exact
    assert compare(norm, biased).relative == float("inf")
    assert compare(biased, norm).relative == 1.0
    biased.modules[0].bias = torch.zeros(4)
    assert compare(norm, biased).exact


def test_the_axis_of_a_magnitude_counts():
    first, second = (one("lora", magnitude=torch.ones(6), magnitude_axis=axis) for axis in ("in", "out"))
    assert "magnitude (DoRA)" in compare(first, second).problems(1.0)[0]
