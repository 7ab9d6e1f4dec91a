from __future__ import annotations

import errno
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import vislora.jobs.train as job
from tests.jobs.train_helpers import config, image_folder, notes, same, trained
from vislora import formats
from vislora.errors import ConfigError, VisloraError
from vislora.jobs.train import run
from vislora.records import Done, Progress
from vislora.training import checkpoints


def steps_in(log: Path) -> list[int]:
    return [json.loads(line)["step"] for line in log.read_text().splitlines()]


def stopped(settings, after: int, number=signal.SIGINT) -> Done:
    """Train, and raise a signal once `after` steps are done; return the last record."""
    last = None
    for record in run(settings):
        last = record
        if isinstance(record, Progress) and record.task == "training" and record.done == after:
            signal.raise_signal(number)
    assert isinstance(last, Done)
    return last


@pytest.fixture(scope="module")
def whole_path(tmp_path_factory):
    """Return the adapter of the default settings, trained without a break."""
    return trained(tmp_path_factory.mktemp("whole"))[0].path


RICH = {
    "adapter__dropout": 0.1,
    "adapter__module_dropout": 0.1,
    "data__caption_dropout": 0.3,
    "data__flip": True,
    "optimizer__schedule": "cosine",
    "optimizer__warmup_steps": 1,
}


@pytest.mark.parametrize(("family", "number"), [("sd", signal.SIGINT), ("sd3", signal.SIGTERM)])
def test_a_stopped_run_goes_on_to_the_same_bits(family, number, tmp_path):
    before = signal.getsignal(number)
    whole, _ = trained(tmp_path, family, output=tmp_path / "whole", name="x", **RICH)
    done = stopped(config(tmp_path, family, name="x", **RICH), after=3, number=number)
    assert signal.getsignal(number) is before
    assert (done.exit_code, done.value.step, done.value.finished) == (130, 3, False)
    assert done.value.path == tmp_path / "run" / "checkpoints" / "x-000003.safetensors"
    assert "--resume" in done.summary
    assert len(formats.load(done.value.path).modules) == len(formats.load(whole.path).modules)
    value, records = trained(tmp_path, family, name="x", resume=True, **RICH)
    assert "going on from step 3 of 4" in notes(records)
    assert same(whole.path, value.path)
    assert steps_in(tmp_path / "run" / "log.jsonl") == [1, 2, 3, 4]


@pytest.mark.quick("adafactor")
@pytest.mark.parametrize("name", ["adafactor", "sgd"])
def test_every_optimizer_goes_on_to_the_same_bits(name, tmp_path):
    extra = {"optimizer__name": name, "loop__gradient_accumulation": 2, "adapter__text_encoders": True}
    whole, _ = trained(tmp_path, output=tmp_path / "whole", **extra)
    stopped(config(tmp_path, **extra), after=2)
    value, _ = trained(tmp_path, resume=True, **extra)
    assert same(whole.path, value.path)


def test_priors_on_pictures_of_the_base_go_on_to_the_same_bits(tmp_path):
    extra = {"prior": {"replace": {"a ": ["the "]}, "images": 2}, "adapter__text_encoders": True}
    whole, _ = trained(tmp_path, "sd", output=tmp_path / "whole", **extra)
    stopped(config(tmp_path, "sd", **extra), after=2)
    value, _ = trained(tmp_path, "sd", resume=True, **extra)
    assert same(whole.path, value.path)


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path):
    settings = {"loop__save_every": 1, **RICH, "optimizer__schedule": "constant"}
    slow = config(tmp_path, loop__steps=400, **settings)
    process = os.fork()
    if process == 0:
        for _ in run(slow):
            pass
        os._exit(0)
    folder = tmp_path / "run" / "checkpoints"
    until = time.monotonic() + 60
    while not checkpoints.checkpoints(folder) and time.monotonic() < until:
        time.sleep(0.005)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    at = int(checkpoints.checkpoints(folder)[-1].name.removeprefix("step-"))
    settings["loop__steps"] = at + 2
    whole, _ = trained(tmp_path, output=tmp_path / "whole", **settings)
    value, records = trained(tmp_path, resume=True, **settings)
    assert f"going on from step {at} of {at + 2}" in notes(records)
    assert same(whole.path, value.path)
    assert steps_in(tmp_path / "run" / "log.jsonl") == list(range(1, at + 3))


def test_tensorboard_shows_a_step_that_was_done_again_once(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = {"loop__tensorboard": True, "loop__save_every": 2, "optimizer__schedule": "constant"}
    killed = run(config(tmp_path, **settings))
    for record in killed:
        if isinstance(record, Progress) and record.task == "training" and record.done == 3:
            break
    killed.close()  # ends without a checkpoint of step 3
    _, records = trained(tmp_path, resume=True, **settings)
    assert "going on from step 2 of 4" in notes(records)
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    for name in ("loss", "learning_rate", "grad_norm"):
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert shown == [(line["step"], pytest.approx(line[name])) for line in log]
    assert steps_in(tmp_path / "run" / "log.jsonl") == [1, 2, 3, 4]


def test_a_run_killed_before_its_first_checkpoint_starts_over_on_resume(tmp_path):
    root = tmp_path / "run"
    root.mkdir()
    (root / "config.toml").write_text("")
    (root / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    with pytest.raises(ConfigError, match="--resume goes on with it, --overwrite starts anew"):
        trained(tmp_path)
    _, records = trained(tmp_path, resume=True)
    assert "no checkpoint yet: starting at step 0" in notes(records)
    assert steps_in(root / "log.jsonl") == [1, 2, 3, 4]


def test_more_steps_can_be_added(tmp_path):
    constant = {"optimizer__schedule": "constant"}
    whole, _ = trained(tmp_path, output=tmp_path / "whole", loop__steps=6, **constant)
    trained(tmp_path, loop__steps=3, **constant)
    value, _ = trained(tmp_path, loop__steps=6, resume=True, **constant)
    assert value.step == 6
    assert same(whole.path, value.path)


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    first, _ = trained(tmp_path)
    before = load_file(first.path)
    value, _ = trained(tmp_path, resume=True)
    after = load_file(value.path)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert steps_in(tmp_path / "run" / "log.jsonl") == [1, 2, 3, 4]


@pytest.mark.parametrize("place", ["images", "images/run", "images/../images/sub/run", "sources/run"])
def test_no_run_among_its_images(place, tmp_path):
    image_folder(tmp_path / "sources")
    with pytest.raises(ConfigError, match=r"lies in data\.(folder|sources), where its pictures count as images"):
        trained(tmp_path, "flux-kontext", data__sources=tmp_path / "sources", output=tmp_path / place)
    assert not (tmp_path / "images" / "run").exists()


def test_a_run_below_its_images_where_subfolders_are_not_read(tmp_path):
    value, _ = trained(tmp_path, output=tmp_path / "images" / "run", data__recursive=False)
    again, _ = trained(tmp_path, output=tmp_path / "images" / "run", data__recursive=False, resume=True)
    assert value == again


def test_a_folder_with_a_run_is_not_touched_unasked(tmp_path):
    first, _ = trained(tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="holds a run already"):
        trained(tmp_path)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    trained(tmp_path, overwrite=True, seed=1)
    (tmp_path / "old.safetensors").write_bytes(before[first.path])
    assert not same(first.path, tmp_path / "old.safetensors")


def test_an_adapter_that_was_there_is_not_overwritten_unasked(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.safetensors").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="already"):
        trained(tmp_path)


def test_a_run_that_cannot_start_does_not_destroy_the_one_before(tmp_path):
    first, _ = trained(tmp_path)
    for wrong in (
        {"base": str(tmp_path)},
        {"adapter__targets": [{"pattern": "nope"}]},
        {"data__folder": tmp_path / "x"},
    ):
        with pytest.raises(VisloraError):
            trained(tmp_path, overwrite=True, **wrong)
        assert first.path.exists()
        assert checkpoints.checkpoints(tmp_path / "run" / "checkpoints")


def test_other_settings_are_refused_by_name(tmp_path):
    stopped(config(tmp_path), after=2)
    with pytest.raises(ConfigError) as caught:
        trained(tmp_path, resume=True, adapter__rank=3, seed=5)
    message = str(caught.value)
    assert "adapter.rank: 2 in the checkpoint, 3 now" in message
    assert "seed: 0 in the checkpoint, 5 now" in message
    assert len(message.splitlines()) == 3


def test_a_setting_that_the_checkpoint_does_not_know_yet_had_its_default(tmp_path):
    stopped(config(tmp_path), after=2)
    (checkpoint,) = checkpoints.checkpoints(tmp_path / "run" / "checkpoints")
    saved = checkpoint / "state.json"
    state = json.loads(saved.read_text())
    settings = next(value for key, value in state["__dict__"] if key == "settings")["__dict__"]
    assert settings.count(["adapter.dora", False]) == 1
    settings.remove(["adapter.dora", False])
    saved.write_text(json.dumps(state))
    with pytest.raises(ConfigError, match=r"adapter\.dora: False in the checkpoint, True now"):
        trained(tmp_path, resume=True, adapter__dora=True)
    value, _ = trained(tmp_path, resume=True)
    assert (value.step, value.finished) == (4, True)


def test_other_images_are_refused_by_name(tmp_path):
    stopped(config(tmp_path), after=2)
    folder = tmp_path / "images"
    Image.new("RGB", (24, 24)).save(folder / "1.png")
    (folder / "2.txt").write_text("another caption")
    (folder / "3.png").unlink()
    (folder / "3.txt").unlink()
    Image.new("RGB", (24, 24)).save(folder / "9.png")
    (folder / "9.txt").write_text("new")
    with pytest.raises(ConfigError) as caught:
        trained(tmp_path, resume=True)
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert sorted(lines) == ["1.png was changed", "2.png was changed", "3.png is gone", "9.png is new"]


def test_a_moved_image_folder_is_no_other_one(tmp_path):
    stopped(config(tmp_path), after=2)
    (tmp_path / "images").rename(tmp_path / "moved")
    value, _ = trained(tmp_path, resume=True, data__folder=tmp_path / "moved")
    assert value.finished


def test_leftovers_of_a_kill_are_passed_over(tmp_path, whole_path):
    stopped(config(tmp_path), after=2)
    folder = tmp_path / "run" / "checkpoints"
    for name in (".step-000003.abcdef01.part", "step-000009"):
        (folder / name).mkdir()
    (folder / ".step-000003.abcdef01.part" / "state.json").write_text("{")
    value, _ = trained(tmp_path, resume=True)
    assert same(whole_path, value.path)


@pytest.mark.quick("cut-state.json", "gone-state.safetensors")
@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "empty", "gone"])
def test_a_damaged_checkpoint_is_one_clear_error(file, damage, tmp_path):
    if (file, damage) == ("state.json", "gone"):
        pytest.skip("that is a leftover, not a checkpoint")
    stopped(config(tmp_path, loop__save_every=1), after=3)
    newest = tmp_path / "run" / "checkpoints" / "step-000003" / file
    data = newest.read_bytes()
    newest.unlink() if damage == "gone" else newest.write_bytes(data[: len(data) // 2] if damage == "cut" else b"")
    with pytest.raises(VisloraError, match=r"step-000003 is damaged .*; delete that folder and run again") as caught:
        trained(tmp_path, resume=True, loop__save_every=1)
    assert "\n" not in str(caught.value)
    for item in newest.parent.iterdir():
        item.unlink()
    newest.parent.rmdir()
    value, records = trained(tmp_path, resume=True, loop__save_every=1)
    assert "going on from step 2" in notes(records)
    assert value.finished


def test_only_the_last_checkpoints_are_kept(tmp_path):
    trained(tmp_path, loop__save_every=1, loop__keep_checkpoints=2)
    found = checkpoints.checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name for path in found] == ["step-000003", "step-000004"]


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, whole_path, monkeypatch):
    original = checkpoints.save_file

    def full(tensors, path, *rest):
        if "step-000002" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(tensors, path, *rest)

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(VisloraError, match="no space left on the disk"):
        trained(tmp_path, loop__save_every=1)
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["run-000001.safetensors", "step-000001"]
    monkeypatch.setattr(checkpoints, "save_file", original)
    value, _ = trained(tmp_path, loop__save_every=1, resume=True)
    assert same(whole_path, value.path)


def test_a_full_disk_while_the_adapter_is_saved(tmp_path, monkeypatch):
    from vislora.formats.writing import write_tensors

    def full(path, *rest):
        write_tensors(path, *rest)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vislora.formats.writing.write_tensors", full)
    with pytest.raises(VisloraError, match="no space left on the disk"):
        trained(tmp_path)
    assert not (tmp_path / "run" / "run.safetensors").exists()
    monkeypatch.undo()
    value, records = trained(tmp_path, resume=True)
    assert "going on from step 4 of 4" in notes(records)
    assert value.path.exists()


def test_samples_go_on_too(tmp_path):
    """The last ones are of the finished adapter, also where the steps are no multiple."""
    extra = {"loop__steps": 3, "sample__every": 2, "sample__prompts": ("a cat",)}
    trained(tmp_path, output=tmp_path / "whole", **extra)
    stopped(config(tmp_path, **extra), after=1)
    trained(tmp_path, resume=True, **extra)
    for name in ("000000.png", "000002.png", "000003.png"):
        with (
            Image.open(tmp_path / "whole" / "samples" / name) as a,
            Image.open(tmp_path / "run" / "samples" / name) as b,
        ):
            assert a.tobytes() == b.tobytes()


def test_every_process_takes_its_share_and_resumes_where_all_were(tmp_path):
    """Two processes, taken turn by turn, see the batches of one; either sampler's place is the place of the run."""
    image_folder(tmp_path / "images", 7)
    taken, states = two_processes(tmp_path, turns=5)
    alone, _ = two_processes(tmp_path, turns=10, processes=1)
    assert [batch for turn in taken for batch in turn] == [batch for (batch,) in alone]
    assert states[0] == states[1]
    rest, _ = two_processes(tmp_path, turns=2, state=states[0])
    longer, _ = two_processes(tmp_path, turns=7)
    assert rest == longer[5:]


def two_processes(tmp_path, turns, processes=2, state=None):
    from vislora.data.sampler import Sampler
    from vislora.jobs.datasets import Prepared

    class Names:
        def batch(self, batch):
            return (batch.indices, batch.visits)

    shares, samplers = [], []
    for process in range(processes):
        sampler = Sampler({(16, 16): list(range(7))}, 2, seed=0)
        if state is not None:
            sampler.restore(state)
        shares.append(Prepared([], [], [], {}, Names(), sampler, None, [], None).batches(process, processes))
        samplers.append(sampler)
    taken = [tuple(next(share) for share in shares) for _ in range(turns)]
    return taken, [sampler.state() for sampler in samplers]


def test_a_second_signal_ends_at_once(tmp_path):
    def interrupted_twice():
        for record in job.run(config(tmp_path)):
            if isinstance(record, Progress) and record.task == "training":
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        interrupted_twice()
    value, _ = trained(tmp_path, resume=True)
    assert value.finished


@pytest.mark.quick("kohya")
@pytest.mark.parametrize("format", ["kohya", "peft"])
def test_each_checkpoint_has_its_adapter(format, tmp_path):
    kept = {"format": format, "loop__save_every": 1, "loop__keep_checkpoints": 3, "loop__steps": 5}
    trained(tmp_path, **kept)
    names = [f"run-{step:06d}{'' if format == 'peft' else '.safetensors'}" for step in (3, 4)]
    there = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert there == [*names, "step-000003", "step-000004", "step-000005"]
    until = stopped(config(tmp_path, output=tmp_path / "until", name="run", **kept), after=4)
    one, other = formats.load(tmp_path / "run" / "checkpoints" / names[-1]), formats.load(until.value.path)
    for module, same_one in zip(one.modules, other.modules, strict=True):
        assert torch.equal(one.delta(module), other.delta(same_one))
