from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from tests.formats.format_helpers import sd_adapter
from vislora.algebra.compare import compare
from vislora.errors import AdapterFileError


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
