from __future__ import annotations

import json
import math
import signal
import threading

import pytest
import torch

from vislora.errors import ConfigError, VisloraError
from vislora.training import checkpoints
from vislora.training.checkpoints import load_checkpoint, save_checkpoint
from vislora.training.interrupt import stop_on_signal
from vislora.training.optim import ParameterGroup, make_optimizer, rate_factor, set_rate


def equal(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and one == other


def round_trip(state, tmp_path):
    return load_checkpoint(save_checkpoint(tmp_path / "c", 1, state, keep=1))


def test_nested_state_comes_back_as_it_was(tmp_path):
    shared = torch.randn(3, 2)
    state = {
        "tensors": [torch.arange(3), torch.tensor(1.5, dtype=torch.float64), torch.zeros(0, 2), torch.ones(2).bool()],
        "half": (torch.randn(2).bfloat16(), torch.randn(2).half()),
        "views": {"a": shared.t(), "b": shared[:1], "c": shared},
        0: {"0": 1, 1: "x", "deep": {2: [None, True, -1.5, math.inf]}},
        "a.b": torch.ones(1),
        "a": {"b": torch.zeros(1)},
        "empty": [{}, [], ()],
        "__tensor__": "a name like ours",
    }
    assert equal(round_trip(state, tmp_path), state)


@pytest.mark.parametrize("name", ["adamw", "adam", "adafactor", "sgd"])
def test_optimizers_go_on_bit_for_bit(name, tmp_path):
    def fresh():
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 4)
        return layer, make_optimizer(name, [ParameterGroup(layer.parameters(), 1e-2)], 0.01)

    def step(layer, optimizer, seed):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
        layer(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    layer, optimizer = fresh()
    step(layer, optimizer, 1)
    state = {"layer": layer.state_dict(), "optimizer": optimizer.state_dict()}
    back = round_trip(state, tmp_path)
    assert equal(back["optimizer"], state["optimizer"])
    other, other_optimizer = fresh()
    other.load_state_dict(back["layer"])
    other_optimizer.load_state_dict(back["optimizer"])
    for seed in (2, 3):
        step(layer, optimizer, seed)
        step(other, other_optimizer, seed)
    assert equal(other.state_dict(), layer.state_dict())
    assert other_optimizer.param_groups[0]["peak"] == 1e-2


def test_the_newest_is_the_highest_number_and_old_ones_go(tmp_path):
    for step in (9, 999_999, 1_000_000):
        save_checkpoint(tmp_path, step, {"step": step}, keep=2)
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["step-999999", "step-1000000"]
    save_checkpoint(tmp_path, 1_000_000, {"step": "again"}, keep=2)
    assert load_checkpoint(tmp_path / "step-1000000") == {"step": "again"}
    assert len(list(tmp_path.iterdir())) == 2
    assert checkpoints.checkpoints(tmp_path / "nowhere") == []


@pytest.mark.parametrize("text", ["", "{", "5", "[1", '{"__dict__": 3}', '{"x": 1}', '{"__tensor__": "gone"}', "\x80"])
def test_damage_is_told(text, tmp_path):
    path = save_checkpoint(tmp_path, 1, {"a": torch.ones(1)}, keep=1)
    (path / "state.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(VisloraError, match="step-000001 is damaged"):
        load_checkpoint(path)


def test_a_disk_that_fills_up_while_safetensors_writes(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    save_checkpoint(tmp_path, 1, {"a": torch.ones(1)}, keep=2)

    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(VisloraError, match="no space left on the disk"):
        save_checkpoint(tmp_path, 2, {"a": torch.ones(1)}, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_other_errors_of_safetensors_are_not_hidden(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def odd(*_):
        raise SafetensorError("something else")

    monkeypatch.setattr(checkpoints, "save_file", odd)
    with pytest.raises(SafetensorError, match="something else"):
        save_checkpoint(tmp_path, 2, {"a": torch.ones(1)}, keep=2)


def test_nothing_is_pickled(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"a": [torch.ones(1)]}, keep=1)
    assert sorted(item.name for item in path.iterdir()) == ["state.json", "state.safetensors"]
    json.loads((path / "state.json").read_text())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_the_second_ends(number):
    before = signal.getsignal(number)
    with stop_on_signal() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_signals_are_left_alone_outside_the_main_thread():
    before, seen = signal.getsignal(signal.SIGINT), []

    def work():
        with stop_on_signal() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


def test_rates():
    assert [rate_factor(step, 4, "constant", 0) for step in range(4)] == [1.0] * 4
    assert [rate_factor(step, 4, "linear", 0) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    cosine = [rate_factor(step, 4, "cosine", 0) for step in range(4)]
    assert cosine == pytest.approx([1.0, 0.5 + 0.5 * math.sqrt(0.5), 0.5, 0.5 - 0.5 * math.sqrt(0.5)])
    warm = [rate_factor(step, 6, "linear", 2) for step in range(6)]
    assert warm == pytest.approx([1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25])
    assert all(0 < rate_factor(step, 3, "cosine", 10) <= 1 for step in range(3))


def test_every_group_keeps_its_own_peak():
    groups = [ParameterGroup([torch.nn.Parameter(torch.zeros(1))], rate) for rate in (1.0, 0.5)]
    optimizer = make_optimizer("sgd", groups, 0.0)
    for factor in (0.5, 0.25):
        assert set_rate(optimizer, factor) == factor
        assert [group["lr"] for group in optimizer.param_groups] == [factor, factor / 2]


def test_unknown_optimizers_name_the_nearest_or_the_extra():
    with pytest.raises(ConfigError, match="did you mean 'adamw'"):
        make_optimizer("adanw", [], 0.0)
