"""Smaller adapters: the truncated SVD of each change, ranks by each limit, what stays, and errors as they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.algebra.test_merging import full, loha, lora, numbers
from vislora.algebra.low_rank import Limits
from vislora.algebra.resize import Left, resize
from vislora.formats.adapter_file import AdapterFile, AdapterModule


def tucker(seed, rank=4):
    tensors = {"down": numbers(seed, rank, 6, 1, 1), "mid": numbers(seed + 1, rank, rank, 3, 3)}
    tensors["up"] = numbers(seed + 2, 7, rank, 1, 1)
    return AdapterModule(component="denoiser", path="t", algo="lora", tensors=tensors, alpha=2.0)


def matrix(module):
    return module.direction().flatten(1).numpy()


@pytest.mark.parametrize(
    "module",
    [lora(0, rank=5), lora(1, rank=5, inside=(6, 3, 3)), loha(2), full(3), full(4, shape=(7, 6, 3, 3)), tucker(5)],
    ids=["lora", "conv", "loha", "full", "full conv", "tucker"],
)
def test_the_nearest_of_a_rank(module):
    made, (told,) = resize(AdapterFile(modules=[module]), Limits(rank=2))
    wanted = matrix(module)
    left, values, right = np.linalg.svd(wanted, full_matrices=False)
    best = (left[:, :2] * values[:2]) @ right[:2]
    assert made.modules[0].rank == 2
    assert np.linalg.norm(matrix(made.modules[0]) - best) <= 1e-6 * np.linalg.norm(best)
    assert made.modules[0].direction().shape == module.direction().shape
    assert told.error == pytest.approx(np.linalg.norm(values[2:]) / np.linalg.norm(values), rel=1e-5)


def test_the_scale_stays_and_so_do_modules_within_the_limits():
    adapter = AdapterFile(modules=[lora(0, rank=2, path="a"), lora(1, rank=6, alpha=3.0, path="b")])
    made, told = resize(adapter, Limits(rank=4))
    assert made.modules[0] is adapter.modules[0]
    assert told[0].error == 0.0
    assert (made.modules[1].rank, made.modules[1].alpha, made.modules[1].scale) == (4, 2.0, 0.5)


def test_each_limit_chooses_the_rank():
    left, right = (torch.linalg.qr(numbers(seed, 7, 5).double()).Q for seed in (0, 1))
    values = torch.tensor([10.0, 5.0, 2.0, 1.0, 0.5]).double()
    diff = {"diff": (left * values) @ right.T}
    adapter = AdapterFile(modules=[AdapterModule(component="denoiser", path="a", algo="full", tensors=diff)])
    ranks = [resize(adapter, limits)[1][0].after for limits in (Limits(ratio=4), Limits(ratio=5.001), Limits(ratio=1))]
    assert ranks == [2, 3, 1]
    assert resize(adapter, Limits(energy=100 / 130.25 - 1e-9))[1][0].after == 1
    assert resize(adapter, Limits(energy=0.999))[1][0].after == 5
    assert resize(adapter, Limits(rank=2, ratio=100, energy=1.0))[1][0].after == 2


def test_precision_is_kept_or_chosen_and_its_rounding_counts():
    adapter = AdapterFile(modules=[lora(0, rank=5, dtype=torch.float16)])
    made, (told,) = resize(adapter, Limits(rank=4))
    assert made.modules[0].tensors["up"].dtype == torch.float16
    wide, (exact,) = resize(adapter, Limits(rank=4), torch.float32)
    assert wide.modules[0].tensors["up"].dtype == torch.float32
    assert exact.error < told.error
    wanted = np.linalg.norm(matrix(made.modules[0]) - matrix(adapter.modules[0]))
    assert told.apart == pytest.approx(wanted, rel=1e-4)


def test_magnitudes_and_biases_stay_on_top_and_others_stay_as_they_are():
    magnitude, bias = numbers(2, 7).abs(), numbers(3, 7)
    dora = lora(0, rank=5, magnitude=magnitude, magnitude_axis="out", bias=bias)
    norm = AdapterModule(component="denoiser", path="n", algo="norm", tensors={"w_norm": numbers(4, 7)})
    made, told = resize(AdapterFile(modules=[dora, norm]), Limits(rank=2))
    assert torch.equal(made.modules[0].magnitude, magnitude)
    assert torch.equal(made.modules[0].bias, bias)
    assert made.modules[1] is norm
    assert told[1] == Left("denoiser: n", "of kind norm")
