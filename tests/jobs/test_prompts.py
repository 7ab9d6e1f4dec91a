from __future__ import annotations

import pytest

from vislora.errors import ConfigError
from vislora.jobs.prompts import find_adapter, label_adapters, parse_adapter, parse_prompt, read_prompts


@pytest.mark.parametrize(
    ("raw", "text", "strengths"),
    [
        ("a cat", "a cat", {}),
        ("a cat <lora:ink>", "a cat", {"ink": 1.0}),
        ("<lora:ink:0.8>a <lora:b:-1e-1> cat", "a cat", {"ink": 0.8, "b": -0.1}),
        ("a, <lora:ink:0.5>, cat <lora:ink:.25>", "a, , cat".replace(" ,", ","), {"ink": 0.75}),
        ("a <lora:ink:> cat", "a cat", {"ink": 1.0}),
        ("a < b > c <loda:x:1>", "a < b > c <loda:x:1>", {}),
        ("<lora:my style-v1.5:1>", "", {"my style-v1.5": 1.0}),
    ],
)
def test_tags_leave_the_prompt(raw, text, strengths):
    prompt = parse_prompt(raw)
    assert all(strength.is_plain for strength in prompt.strengths.values())
    assert prompt.text == text
    assert {name: strength.value for name, strength in prompt.strengths.items()} == pytest.approx(strengths)


@pytest.mark.parametrize("number", ["x", "0,8", "nan", "inf", "1e9", "101", "0.8.1", "--1"])
def test_strengths_that_are_no_numbers(number):
    with pytest.raises(ConfigError, match="ink"):
        parse_prompt(f"a cat <lora:ink:{number}>")


@pytest.mark.parametrize(
    ("raw", "name", "strength"),
    [
        ("ink", "ink", 1.0),
        ("ink:0.8", "ink", 0.8),
        ("a/b.safetensors:-1", "a/b.safetensors", -1.0),
        ("C:\\loras\\ink.safetensors", "C:\\loras\\ink.safetensors", 1.0),
        ("C:\\loras\\ink.safetensors:.5", "C:\\loras\\ink.safetensors", 0.5),
        ("a:b", "a:b", 1.0),
        ("ink:1e-1", "ink", 0.1),
    ],
)
def test_flags(raw, name, strength):
    assert parse_adapter(raw) == (name, strength)


@pytest.mark.parametrize("raw", ["ink:nan", "ink:inf", "ink:1000", "ink:1.2.3", "ink:-Infinity"])
def test_flags_with_senseless_strengths(raw):
    with pytest.raises(ConfigError, match="ink"):
        parse_adapter(raw)


def test_prompt_files(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff# a comment\r\na cat\r\n\r\n   # another\r\n  a dog, #1  \r\nein Bär\n".encode())
    assert read_prompts(["first"], path) == ["first", "a cat", "a dog, #1", "ein Bär"]


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"# only a comment\n\n", None])
def test_prompt_files_that_are_of_no_use(data, tmp_path):
    if data is not None:
        (tmp_path / "p.txt").write_bytes(data)
    with pytest.raises(ConfigError):
        read_prompts([], tmp_path / "p.txt")


def touched(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_adapters_are_found_by_name(tmp_path):
    touched(
        tmp_path / "runs/ink/ink.safetensors",
        tmp_path / "runs/ink/checkpoints/ink-000003.safetensors",
        tmp_path / "runs/peft-v1.5/adapter_config.json",
        tmp_path / "runs/peft-v1.5/adapter_model.safetensors",
    )
    folders = [tmp_path / "nowhere", tmp_path / "runs"]
    for name in ("ink", "ink.safetensors", str(tmp_path / "runs/ink/ink.safetensors")):
        assert find_adapter(name, folders) == tmp_path / "runs/ink/ink.safetensors"
    assert find_adapter("peft-v1.5", folders) == tmp_path / "runs/peft-v1.5"
    for name in ("ink-000003", "adapter_model", "inc"):
        with pytest.raises(ConfigError, match="no adapter"):
            find_adapter(name, folders)
    with pytest.raises(ConfigError, match="did you mean 'ink'"):
        find_adapter("inks", folders)


def test_a_name_of_two_files_is_refused_with_both(tmp_path):
    touched(tmp_path / "a/ink.safetensors", tmp_path / "b/ink.safetensors")
    with pytest.raises(ConfigError, match="any of these") as caught:
        find_adapter("ink", [tmp_path])
    assert str(tmp_path / "a/ink.safetensors") in str(caught.value)
    assert str(tmp_path / "b/ink.safetensors") in str(caught.value)


def test_labels_do_not_depend_on_the_order(tmp_path):
    files = [tmp_path / f"{folder}/ink.safetensors" for folder in ("a/x", "b/x", "c/y")] + [
        tmp_path / "d/blob.safetensors"
    ]
    touched(*files)
    names = [str(path) for path in files]
    labels, paths = label_adapters(names, [])
    assert [labels[name] for name in names] == ["a/x/ink", "b/x/ink", "y/ink", "blob"]
    assert {label: paths[label] for label in paths} == {labels[str(path)]: path for path in files}
    assert label_adapters(names[::-1], []) == (labels, paths)


def test_one_file_has_one_label_however_it_is_named(tmp_path, monkeypatch):
    touched(tmp_path / "runs/ink.safetensors")
    monkeypatch.chdir(tmp_path)
    labels, paths = label_adapters(
        ["ink", "runs/ink.safetensors", str(tmp_path / "runs/ink.safetensors")], [tmp_path / "runs"]
    )
    assert set(labels.values()) == {"ink"}
    assert len(paths) == 1


def test_versions_in_folder_names_are_kept_apart(tmp_path):
    for name in ("style-v1.5", "style-v1.6"):
        touched(tmp_path / name / "adapter_config.json")
    labels, paths = label_adapters([str(tmp_path / "style-v1.5"), str(tmp_path / "style-v1.6")], [])
    assert set(labels.values()) == {"style-v1.5", "style-v1.6"}
    assert len(paths) == 2


def test_a_file_and_a_folder_of_one_name(tmp_path):
    touched(tmp_path / "ink.safetensors", tmp_path / "ink" / "adapter_config.json")
    labels, paths = label_adapters([str(tmp_path / "ink.safetensors"), str(tmp_path / "ink")], [])
    assert len(set(labels.values())) == len(paths) == 2
