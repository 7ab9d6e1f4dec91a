"""Folders of adapters are converted whole, a bad one stops no other, clashes are told before anything is written."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import pytest
import torch

from tests.formats.format_helpers import REPOSITORY, sd_adapter
from tests.jobs.risky import risky
from vislora import formats
from vislora.algebra.compare import compare
from vislora.cli import main
from vislora.config.convert import ConvertConfig
from vislora.errors import ConfigError
from vislora.formats.container import is_one_adapter
from vislora.formats.writing import writable
from vislora.jobs.convert import convert, convert_folder, run
from vislora.jobs.folders import adapters_below
from vislora.jobs.parallel import each
from vislora.records import Done, Note, Progress
from vislora.registry import FORMATS

WRITABLE = [name for name in FORMATS if FORMATS[name].writable]


@pytest.fixture
def folder(tmp_path):
    """Two files, a PEFT folder of two components, a damaged file and a text."""
    place = tmp_path / "in"
    formats.save(sd_adapter(), place / "cat.v1.safetensors", "kohya")
    formats.save(sd_adapter(), place / "sub" / "dog.safetensors", "diffusers")
    formats.save(sd_adapter(), place / "sub" / "bird", "peft")
    (place / "bad.safetensors").write_bytes(b"\1\2\3")
    (place / "notes.txt").write_text("mine")
    (place / ".hidden.safetensors").write_bytes(b"")
    return place


def test_all_below_a_folder_is_found(folder):
    adapters, others = adapters_below(folder)
    names = [str(item.relative_to(folder)) for item in adapters]
    assert sorted(names) == ["bad.safetensors", "cat.v1.safetensors", "sub/bird", "sub/dog.safetensors"]
    assert [item.name for item in others] == ["notes.txt"]
    assert is_one_adapter(folder / "sub" / "bird")
    assert not is_one_adapter(folder)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_file_stops_no_other(workers, folder, tmp_path):
    values = {"source": folder, "destination": tmp_path / "out", "to": "comfyui", "report": tmp_path / "r.json"}
    *records, done = run(ConvertConfig.of({**values, "workers": workers}))
    assert isinstance(done, Done)
    assert done.exit_code == 1
    assert done.summary.startswith("3 of 4 adapters proven")
    assert "bad.safetensors" in done.summary
    written = [item for item in (tmp_path / "out").rglob("*") if item.is_file()]
    expected = ["bird.safetensors", "cat.v1.safetensors", "dog.safetensors"]
    assert sorted(item.name for item in written) == expected
    assert all(compare(sd_adapter(), formats.load(item)).exact for item in written)
    lines = [item.text for item in records if isinstance(item, Note)]
    assert any("sub/dog.safetensors: proven: 9 of 9" in line for line in lines)
    assert any("bad.safetensors" in line and "not a safetensors file" in line for line in lines)
    assert any("1 other files are left alone" in line for line in lines)
    assert [item.done for item in records if isinstance(item, Progress)] == [1, 2, 3, 4]
    told = json.loads((tmp_path / "r.json").read_text())
    assert not told["ok"]
    assert {item["source"].rsplit("/", 1)[-1]: item["ok"] for item in told["files"]} == {
        "bad.safetensors": False, "cat.v1.safetensors": True, "bird": True, "dog.safetensors": True
    }  # fmt: skip


def test_to_folders_and_from_python(folder, tmp_path):
    (folder / "bad.safetensors").unlink()
    report = convert_folder(folder, tmp_path / "out", "peft", workers=1)
    assert report.ok
    assert report.verdict == f"3 of 3 adapters proven, in {tmp_path / 'out'}"
    assert all((tmp_path / "out" / name / "unet").is_dir() for name in ("cat.v1", "sub/dog", "sub/bird"))
    assert not (tmp_path / "out" / "notes.txt").exists()


def test_what_clashes_is_told_at_once_and_nothing_is_written(folder, tmp_path):
    formats.save(sd_adapter(), folder / "sub" / "bird.safetensors", "kohya")
    out = tmp_path / "out"
    out.mkdir()
    (out / "cat.v1.safetensors").write_bytes(b"precious")
    with pytest.raises(ConfigError) as caught:
        convert_folder(folder, out, "kohya")
    assert len(caught.value.problems) == 2
    assert "would both become" in str(caught.value)
    assert "cat.v1.safetensors exists" in str(caught.value)
    assert [item.name for item in out.iterdir()] == ["cat.v1.safetensors"]


def test_an_adapter_never_goes_into_the_folder_that_another_becomes(tmp_path):
    formats.save(sd_adapter(), tmp_path / "in" / "a.safetensors", "kohya")
    formats.save(sd_adapter(), tmp_path / "in" / "a" / "b.safetensors", "kohya")
    with pytest.raises(ConfigError, match="would go into the folder that"):
        convert_folder(tmp_path / "in", tmp_path / "out", "peft")


@pytest.mark.parametrize("place", ["in", "in/out", "."])
def test_the_destination_is_beside_the_source(place, folder, tmp_path):
    with pytest.raises(ConfigError, match="beside it"):
        convert_folder(folder, tmp_path / place, "kohya", overwrite=True)


def test_bad_places(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        convert_folder(folder, tmp_path / "file", "kohya")
    with pytest.raises(ConfigError, match=r"report: .* is the place of an adapter"):
        convert_folder(folder, tmp_path / "out", "kohya", report=folder / "cat.v1.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no adapter"):
        convert_folder(tmp_path / "empty", tmp_path / "out", "kohya")
    with pytest.raises(ConfigError, match="is in the source"):
        convert(folder / "sub" / "bird", folder / "sub" / "bird" / "a.safetensors", "kohya")
    source = folder / "cat.v1.safetensors"
    with pytest.raises(ConfigError, match="report: "):
        convert(source, tmp_path / "a.safetensors", "kohya", report=source)
    assert not (tmp_path / "out").exists()


def test_a_killed_process_costs_its_own_task_only():
    found = dict(each(risky, [0, 1, 2], 2, lambda task: -1))
    assert found == {0: 0, 1: -1, 2: 20}


def test_a_fault_of_ours_is_told_too(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("vislora.jobs.convert.load", lambda *_: 1 / 0)
    report = convert_folder(folder, tmp_path / "out", "kohya", workers=1)
    assert not report.ok
    assert "ZeroDivisionError, a fault of vislora's" in report.files[0].problems[0]


def test_the_list_of_formats(capsys):
    assert main(["convert", "--list"]) == 0
    printed = capsys.readouterr().out
    table, families = printed.split("\n\n")
    rows = {line.split()[0]: line for line in table.splitlines()[1:]}
    assert set(rows) == set(FORMATS)
    assert "sd3" in families
    assert max(map(len, printed.splitlines())) < 170
    assert "a1111" in rows["kohya"]
    assert "any" in rows["diffusers"]


@pytest.mark.parametrize("alias", ["comfy", "comfyui", "a1111", "webui", "sd-scripts", "lycoris"])
def test_names_that_users_know(alias):
    config = ConvertConfig.of({"source": "a", "destination": "b", "to": alias})
    assert config.to in FORMATS
    assert writable(alias) is writable(config.to)


def test_unknown_names_give_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'diffusers'") as caught:
        ConvertConfig.of({"source": "a", "destination": "b", "to": "difusers", "family": "sdx"})
    assert "family: unknown name (did you mean" in str(caught.value)
    with pytest.raises(ConfigError, match="did you mean 'comfyui'"):
        writable("confyui")
    with pytest.raises(ConfigError, match="not given: destination, to"):
        ConvertConfig.of({"source": "a"})


@pytest.mark.parametrize("arguments", [["--help"], ["--list", "x", "--to", "nonsense"]])
def test_no_torch_before_it_is_needed(arguments):
    script = f"import sys; from vislora.cli import main\ntry:\n    main(['convert', *{arguments}])\nfinally:\n    "
    script += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


@pytest.mark.parametrize("to", WRITABLE)
def test_converting_twice_gives_the_same_bytes_and_back_the_same_tensors(to, tmp_path):
    formats.save(sd_adapter(), tmp_path / "a.safetensors", "kohya")
    end = ".safetensors" if writable(to).container == "file" else ""
    for name in ("b", "c"):
        assert convert(tmp_path / "a.safetensors", tmp_path / (name + end), to).ok
    assert _hashes(tmp_path / f"b{end}") == _hashes(tmp_path / f"c{end}")
    assert convert(tmp_path / f"b{end}", tmp_path / "d.safetensors", "kohya").ok
    assert convert(tmp_path / "d.safetensors", tmp_path / f"e{end}", to).ok
    assert compare(formats.load(tmp_path / "a.safetensors"), formats.load(tmp_path / "d.safetensors")).exact
    first, last = formats.load(tmp_path / f"b{end}"), formats.load(tmp_path / f"e{end}")
    tensors = {(item.name, slot): tensor for item in first.modules for slot, tensor in item.tensors.items()}
    back = {(item.name, slot): tensor for item in last.modules for slot, tensor in item.tensors.items()}
    assert tensors.keys() == back.keys()
    assert all(torch.equal(tensor, back[key]) and tensor.dtype == back[key].dtype for key, tensor in tensors.items())


def _hashes(path):
    files = [path] if path.is_file() else sorted(item for item in path.rglob("*") if item.is_file())
    return [hashlib.sha256(item.read_bytes()).hexdigest() for item in files]
