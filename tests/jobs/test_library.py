"""The library: what is found, what is remembered, what changed; adapters that come and go within a memory budget."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

import vislora
from tests import tiny
from tests.jobs.test_generate import adapters  # noqa: F401
from tests.jobs.test_pipelines import state
from vislora.cli import main
from vislora.errors import AdapterFileError, AdapterMismatchError, ConfigError
from vislora.jobs import library as job
from vislora.jobs.library import INDEX, VERSION, Index
from vislora.jobs.pipelines import loaded_strengths


@pytest.fixture
def folder(tmp_path, adapters):  # noqa: F811
    place = tmp_path / "library"
    (place / "deep" / "er").mkdir(parents=True)
    for number, letter in enumerate("abc"):
        target = place / ("deep/er" if number == 2 else ".") / f"{letter}.safetensors"
        shutil.copy(adapters / f"sd-{letter}.safetensors", target)
    Image.new("RGB", (4, 4)).save(place / "a.preview.png")
    return place


def counted(monkeypatch):
    read = []
    real = job.inspect
    monkeypatch.setattr(job, "inspect", lambda path: (read.append(path.name), real(path))[1])
    return read


def test_everything_below_is_listed(folder):
    entries = {entry.name: entry for entry in Index([folder]).entries}
    assert set(entries) == {"a", "b", "c"}
    assert (entries["a"].family, entries["a"].format, entries["a"].rank) == ("sd", "kohya", 2)
    assert entries["a"].preview == folder / "a.preview.png"
    assert entries["b"].preview is None
    assert len(entries["c"].sha256) == 64
    assert Index([folder]).find("c").path == folder / "deep" / "er" / "c.safetensors"
    assert Index([folder]).find("c.safetensors") == Index([folder]).find("c")


def test_only_what_changed_is_read_again(folder, monkeypatch):
    read = counted(monkeypatch)
    first = Index([folder]).entries
    assert sorted(read) == ["a.safetensors", "b.safetensors", "c.safetensors"]
    read.clear()
    assert Index([folder]).entries == first
    assert read == []
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    os.utime(folder / "b.safetensors", ns=(1, 1))
    (folder / "deep" / "er" / "c.safetensors").unlink()
    shutil.copy(folder / "a.safetensors", folder / "d.safetensors")
    again = {entry.name: entry for entry in Index([folder]).entries}
    assert sorted(read) == ["b.safetensors", "d.safetensors"]
    assert set(again) == {"a", "b", "d"}
    assert again["b"].sha256 == again["a"].sha256 != first[1].sha256
    read.clear()
    Index([folder], refresh=True)
    assert len(read) == 3


DAMAGED = ("", "{", '{"version": 99}', f'{{"version": {VERSION}, "adapters": [{{"path": "a"}}]}}', "[1]")


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_index_is_made_anew(text, folder):
    wanted = Index([folder]).entries
    (folder / INDEX).write_text(text)
    assert Index([folder]).entries == wanted
    assert json.loads((folder / INDEX).read_text())["version"] == VERSION


def test_a_folder_that_cannot_be_written_to_has_no_index(folder, monkeypatch):
    def refuse(path, text):
        raise vislora.errors.VisloraError(f"cannot write {path}: read-only file system")

    monkeypatch.setattr(job, "write_text", refuse)
    index = Index([])
    index.folders = (folder,)
    notes = [record.text for record in index.read() if hasattr(record, "text")]
    assert len(index.entries) == 3
    assert "read-only" in notes[0]


def test_damaged_files_are_listed_and_not_used(folder, capsys):
    (folder / "bad.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    index = Index([folder])
    assert len(index.entries) == 4
    with pytest.raises(AdapterFileError, match=r"bad\.safetensors"):
        index.find("bad")
    assert main(["library", str(folder)]) == 1
    assert "bad.safetensors:" in capsys.readouterr().out


def test_names_that_are_not_there_or_not_alone(folder):
    (folder / "x").mkdir()
    shutil.copy(folder / "a.safetensors", folder / "x" / "b.safetensors")
    index = Index([folder])
    with pytest.raises(ConfigError, match="could be any of these") as error:
        index.find("b")
    assert str(folder / "x" / "b.safetensors") in str(error.value)
    assert index.find(str(folder / "b.safetensors")).path == folder / "b.safetensors"
    with pytest.raises(ConfigError, match="no adapter 'zz'"):
        index.find("zz")
    with pytest.raises(ConfigError, match="no folder"):
        Index([folder / "nowhere"])


def test_trigger_words(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "a.safetensors")
    tags = {"10_x": {"ink": 5, "cat": 2, "dog": 1, "fox": 1}, "y": {"cat": 7}}
    save_file(tensors, folder / "tags.safetensors", {"ss_tag_frequency": json.dumps(tags)})
    save_file(tensors, folder / "phrase.safetensors", {"modelspec.trigger_phrase": "blobby, round"})
    save_file(tensors, folder / "odd.safetensors", {"ss_tag_frequency": "[1"})
    found = {entry.name: entry.triggers for entry in Index([folder]).entries}
    assert found["tags"] == ("cat", "ink")
    assert found["phrase"] == ("blobby", "round")
    assert found["odd"] == ()


def test_the_command(folder, capsys):
    assert main(["library", str(folder), "--json", "--find", "a"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["name"], row["rank"]) == ("a", 2)
    assert main(["library", str(folder)]) == 0
    assert "trigger words" in capsys.readouterr().out
    assert main(["library", str(folder / "nowhere")]) == 2


def test_no_torch_is_imported(folder):
    code = "import sys; from vislora.cli import main; main(['library', sys.argv[1]]); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, capture_output=True)


def test_the_longest_unused_leave_when_memory_is_short(folder):
    pipe = tiny.PIPELINES["sd"]()
    before = state(pipe)
    size = (folder / "a.safetensors").stat().st_size
    library = vislora.Library([folder], memory=int(2.5 * size))
    library.apply(pipe, {"a": 1.0})
    library.apply(pipe, {"b": 0.5})
    assert loaded_strengths(pipe) == {"a": 0.0, "b": 0.5}
    library.apply(pipe, {"a": 0.7})
    assert library.residents(pipe) == ["b", "a"]
    library.apply(pipe, {"c": 1.0})
    assert loaded_strengths(pipe) == {"a": 0.0, "c": 1.0}
    with pytest.raises(ConfigError, match="may hold"):
        library.apply(pipe, {"a": 1.0, "b": 1.0, "c": 1.0})
    assert loaded_strengths(pipe) == {"a": 0.0, "c": 1.0}
    vislora.eject(pipe)
    library.apply(pipe, {"b": 1.0})
    assert loaded_strengths(pipe) == {"b": 1.0}
    vislora.eject(pipe)
    assert all(torch.equal(one, other) for one, other in zip(before.values(), state(pipe).values(), strict=True))


def test_what_is_loaded_otherwise_is_left_alone(folder):
    pipe = tiny.PIPELINES["sd"]()
    vislora.load(pipe, folder / "b.safetensors", 0.3, name="mine")
    library = vislora.Library([folder])
    library.apply(pipe, {"a": 1.0})
    library.apply(pipe, {})
    assert loaded_strengths(pipe) == {"mine": 0.3, "a": 0.0}


def test_a_changed_file_is_loaded_again(folder):
    pipe = tiny.PIPELINES["sd"]()
    library = vislora.Library([folder])
    library.apply(pipe, {"a": 1.0})
    wanted = tiny.PIPELINES["sd"]()
    vislora.load(wanted, folder / "b.safetensors")
    shutil.copy(folder / "b.safetensors", folder / "a.safetensors")
    os.utime(folder / "a.safetensors", ns=(5, 5))
    library.apply(pipe, {"a": 1.0})
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = torch.randn(1, 5, pipe.unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(1))
    assert torch.equal(pipe.unet(x, 3, text).sample, wanted.unet(x, 3, text).sample)
    assert loaded_strengths(pipe) == {"a": 1.0}


@pytest.mark.parametrize(
    ("strengths", "kind"),
    [
        ({"b": 1.0, "other": 1.0}, AdapterMismatchError),
        ({"b": float("nan")}, ConfigError),
        ({"b": 1.0, "nowhere": 1.0}, ConfigError),
    ],
)
def test_a_stack_that_cannot_be_applied_changes_nothing(strengths, kind, folder, adapters):  # noqa: F811
    shutil.copy(adapters / "sd3-a.safetensors", folder / "other.safetensors")
    pipe = tiny.PIPELINES["sd"]()
    library = vislora.Library([folder])
    library.apply(pipe, {"a": 0.5})
    with pytest.raises(kind):
        library.apply(pipe, strengths)
    assert loaded_strengths(pipe) == {"a": 0.5}
    assert library.residents(pipe) == ["a"]


@pytest.mark.parametrize("memory", ["lots", "-1GB", -5])
def test_budgets_that_are_none(memory, folder):
    with pytest.raises(ConfigError, match="memory"):
        vislora.Library([folder], memory=memory)
    assert vislora.Library([folder], memory="2GB").memory == 2 * 10**9
