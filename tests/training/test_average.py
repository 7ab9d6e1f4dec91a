"""The average over steps: what is in it, and that it is there only for a while."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vislora.training.average import Average


def test_it_is_the_sum_by_its_definition():
    values = torch.tensor([3.0, -1.0, 4.0, 1.5, -9.0], dtype=torch.float64)
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    average, expected = Average([parameter], 0.3), 0.0
    for step, value in enumerate(values, 1):
        parameter.data.fill_(value)
        average.update(step)
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * float(value)
    assert average.tensors[0].item() == pytest.approx(expected)
    assert decay == 0.3  # the limit was reached


def test_it_is_in_place_for_a_while_and_errors_end_that():
    parameter = nn.Parameter(torch.ones(2))
    average = Average([parameter], 0.9)
    parameter.data.fill_(5.0)
    with average.in_place():
        assert parameter.tolist() == [1.0, 1.0]
    with pytest.raises(KeyError), average.in_place():
        raise KeyError
    assert parameter.tolist() == [5.0, 5.0]
    assert average.tensors[0].tolist() == [1.0, 1.0]


def test_it_goes_on_from_what_was_saved():
    parameter = nn.Parameter(torch.ones(2))
    average = Average([parameter], 0.9)
    average.restore([torch.tensor([2.0, 3.0])])
    assert average.tensors[0].tolist() == [2.0, 3.0]
    with pytest.raises(ValueError):
        average.restore([])
