"""What every algorithm of the registry must do, on every kind of layer."""

from __future__ import annotations

import pickle

import pytest
import torch

from tests.layers import CASES, drawn, fresh, goes_on
from vislora.algorithms.base import KINDS, Algorithm, LayerSpec, apply_weight, fits
from vislora.errors import ConfigError
from vislora.registry import ALGORITHMS, TRAINED

EVERY = pytest.mark.parametrize(
    ("algorithm", "case", "tucker"),
    [
        pytest.param(ALGORITHMS[name], case, tucker, id=f"{name}-{label}{'-tucker' * tucker}")
        for name in ALGORITHMS
        for label, case in CASES.items()
        if goes_on(ALGORITHMS[name], case)
        for tucker in ((False, True) if "conv" in label else (False,))
    ],
)
NAMES = pytest.mark.parametrize("name", ALGORITHMS)


@EVERY
def test_a_fresh_adapter_leaves_the_output_bit_equal(algorithm: Algorithm, case, tucker):
    layer, x = case.layer(), case.input()
    slots = fresh(layer, algorithm, tucker=tucker)
    out = layer(x)
    assert torch.equal(algorithm.forward(x, out, slots, 0.7, layer, 0.0), out)
    assert algorithm.delta(slots, 0.7, layer.weight).abs().max() == 0.0


@EVERY
def test_forward_equals_the_layer_with_the_changed_weight(algorithm: Algorithm, case, tucker):
    layer, x = case.layer(torch.float64), case.input(torch.float64)
    slots = drawn(layer, algorithm, tucker=tucker)
    changed = layer.weight + algorithm.delta(slots, 0.7, layer.weight).reshape(layer.weight.shape)
    merged = apply_weight(layer, x, changed, getattr(layer, "bias", None))
    stacked = algorithm.forward(x, layer(x), slots, 0.7, layer, 0.0)
    assert not torch.allclose(merged, layer(x), atol=1e-3)
    torch.testing.assert_close(stacked, merged, rtol=0.0, atol=1e-12)


@EVERY
def test_delta_is_linear_in_the_scale_and_has_the_shape_of_the_weight(algorithm: Algorithm, case, tucker):
    layer = case.layer()
    slots = drawn(layer, algorithm, tucker=tucker)
    delta = algorithm.delta(slots, 1.0, layer.weight)
    assert fits(algorithm.shape(slots), tuple(layer.weight.shape), algorithm.flat)
    assert algorithm.needs_base or delta.shape == algorithm.shape(slots)
    flat = algorithm.flat and delta.dim() == 2
    assert delta.shape == (layer.weight.flatten(1) if flat else layer.weight).shape
    assert delta.dtype == torch.float32
    torch.testing.assert_close(algorithm.delta(slots, -2.5, layer.weight), -2.5 * delta)
    exact = {name: slot.double() if slot.is_floating_point() else slot for name, slot in slots.items()}
    assert algorithm.delta(exact, 1.0, layer.weight.double()).dtype == torch.float64
    if algorithm.needs_base:
        with pytest.raises(ValueError, match="base weight"):
            algorithm.delta(slots, 1.0, None)


@EVERY
def test_slots_tell_rank_kind_and_algorithm(algorithm: Algorithm, case, tucker):
    layer = case.layer()
    slots = fresh(layer, algorithm, rank=2, tucker=tucker)
    spec = LayerSpec.of(layer)
    assert algorithm.rank(slots) == 2 or algorithm.own_rule(slots) is not None
    assert spec.kind in algorithm.kinds(slots) <= KINDS
    assert slots.keys() <= algorithm.slots
    assert [name for name in ALGORITHMS if ALGORITHMS[name].matches(frozenset(slots))] == [algorithm.name]
    for missing in slots.keys() - algorithm.constants:
        assert not algorithm.matches(frozenset(slots) - {missing}) or missing in ("mid", "lokr_t2")


@EVERY
def test_gradients_of_slots_and_input(algorithm: Algorithm, case, tucker):
    layer, x = case.layer(torch.float64), case.input(torch.float64)
    slots = drawn(layer, algorithm, 2, tucker)
    learned = [name for name in slots if name not in algorithm.constants]
    floats = x.is_floating_point()

    def run(x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        changed = {**slots, **dict(zip(learned, tensors, strict=True))}
        return algorithm.forward(x, layer(x), changed, 0.7, layer, 0.0)

    x = x.requires_grad_() if floats else x
    assert torch.autograd.gradcheck(run, (x, *(slots[name].requires_grad_() for name in learned)), fast_mode=True)


@EVERY
def test_a_seed_gives_the_same_slots_and_leaves_the_global_generator_alone(algorithm: Algorithm, case, tucker):
    layer = case.layer()
    before = torch.get_rng_state()
    first, again, other = (fresh(layer, algorithm, tucker=tucker, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    if any(slot.any() for slot in first.values()):
        assert not all(torch.equal(first[name], other[name]) for name in first)


@NAMES
def test_a_layer_that_does_not_fit_is_refused_in_words(name):
    refused = [case for case in CASES.values() if not goes_on(ALGORITHMS[name], case)]
    for case in refused:
        with pytest.raises(ConfigError, match=f"algorithm '{name}' "):
            fresh(case.layer(), ALGORITHMS[name])
    assert bool(refused) == (name not in ("lora", "loha", "lokr", "full"))
    assert (len(refused) < len(CASES)) == (name in TRAINED)


@EVERY
def test_constants_are_single_numbers_that_stay_where_they_are(algorithm: Algorithm, case, tucker):
    slots = fresh(case.layer(), algorithm, tucker=tucker)
    moved = algorithm.moved(slots, torch.device("meta"), torch.float16)
    for name, slot in slots.items():
        if name in algorithm.constants:
            assert slot.numel() == 1
            assert moved[name] is slot
        else:
            assert (moved[name].device.type, moved[name].dtype) == ("meta", torch.float16)


@NAMES
def test_an_algorithm_is_called_as_it_is_registered(name):
    assert ALGORITHMS[name].name == name
    assert pickle.loads(pickle.dumps(ALGORITHMS[name])) == ALGORITHMS[name]
    assert not ALGORITHMS[name].matches(frozenset())
    assert not ALGORITHMS[name].matches(frozenset({"something", "else"}))
    assert not ALGORITHMS[name].matches(ALGORITHMS[name].slots | {"something"})
