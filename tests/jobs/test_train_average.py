"""`loop.ema`: the run gives the average over its steps, at every place that gives an adapter."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.jobs.train_helpers import config, trained
from vislora.jobs import train as job
from vislora.records import Progress
from vislora.training.checkpoints import checkpoints, load_checkpoint


def numbers(tensors):
    """Return the numbers of each tensor, whatever its shape."""
    return {tensor.numpy().tobytes() for tensor in tensors}


def in_file(path):
    return numbers(tensor for name, tensor in load_file(path).items() if "alpha" not in name)


def test_what_is_saved_is_the_average(tmp_path):
    made, _ = trained(tmp_path, "sd", loop__ema=0.5)
    state = load_checkpoint(checkpoints(tmp_path / "run" / "checkpoints")[-1])
    last = numbers(state["adapters"].values())
    assert in_file(made.path) == numbers(state["average"])
    assert len(last & in_file(made.path)) < len(last) / 10


def test_without_it_the_last_step_is(tmp_path):
    made, _ = trained(tmp_path, "sd")
    state = load_checkpoint(checkpoints(tmp_path / "run" / "checkpoints")[-1])
    assert state["average"] == []
    assert in_file(made.path) == numbers(state["adapters"].values())


def test_samples_and_the_held_out_loss_are_of_the_average(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(job, "preview", lambda family, parts, *rest: kept.append(snapshot(torch.nn.ModuleList(parts))))
    monkeypatch.setattr(job, "validation_loss", lambda module, *rest: kept.append(snapshot(module)) or 1.0)
    trained(tmp_path, loop__ema=0.5, sample={"every": 4}, data__held_out=0.25, loop__validate_every=4)
    state = load_checkpoint(checkpoints(tmp_path / "run" / "checkpoints")[-1])
    before, average = kept[:2], numbers(state["average"])
    assert before[0] == before[1] != average
    assert kept[2:] == [average, average]


def snapshot(module):
    return numbers(tensor.detach().clone() for tensor in module.parameters())


@pytest.mark.quick("3")
@pytest.mark.parametrize("number", [1, 3])
def test_a_stopped_run_goes_on_to_the_same_average(tmp_path, number):
    whole, _ = trained(tmp_path, loop__ema=0.5, name="a")
    part = {"output": tmp_path / "part", "name": "a", "loop__ema": 0.5, "loop__save_every": 1}
    records = job.run(config(tmp_path, **part))
    for record in records:
        if isinstance(record, Progress) and record.task == "training" and record.done == number + 1:
            records.close()
    resumed, _ = trained(tmp_path, **part, resume=True)
    one, other = load_file(whole.path), load_file(resumed.path)
    assert all(torch.equal(one[name], other[name]) for name in one)
