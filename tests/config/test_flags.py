from __future__ import annotations

from pathlib import Path

import pytest

from vislora.config import flags
from vislora.config.base import Positional, Section
from vislora.config.convert import ConvertConfig
from vislora.config.generate import GenerateConfig
from vislora.config.inspect import InspectConfig
from vislora.config.train import TargetConfig, TrainConfig
from vislora.errors import ConfigError


def train(*arguments: str) -> TrainConfig:
    return flags.parse(TrainConfig, arguments, prog="vislora train")


class Left(Section):
    """Left."""

    size: int = 1
    """Size."""
    flip: bool = False
    """Flip."""


class Both(Section):
    """Two sections with a name in common, and a positional file."""

    source: Positional[Path]
    """The file."""
    left: Left = Left()
    """Left."""
    right: Left = Left()
    """Right."""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "train.toml"
    path.write_text(
        '[data]\nfolder = "from-file"\n[adapter]\nrank = 4\nalpha = 2\ntargets = [{pattern = "a", rank = 1}]\n'
        '[sample]\nprompts = ["one", "two"]\n[loop]\nmin_snr_gamma = "none"\n',
        encoding="utf-8",
    )
    return str(path)


def test_defaults_then_file_then_flags(file: str) -> None:
    config = train("--config", file, "--adapter.rank", "16")
    assert config.loop.batch_size == TrainConfig.of({"data": {"folder": "x"}}).loop.batch_size
    assert (config.data.folder, config.adapter.alpha) == (Path("from-file"), 2.0)
    assert config.adapter.rank == 16
    assert config.adapter.targets == (TargetConfig(pattern="a", rank=1),)
    assert config.sample.prompts == ("one", "two")
    assert config.loop.min_snr_gamma is None


@pytest.mark.parametrize("spelling", [["--config={}"], ["--config", "{}"]])
def test_the_file_may_stand_anywhere(file: str, spelling: list[str]) -> None:
    config = train("--rank", "3", *(part.format(file) for part in spelling), "--steps", "7")
    assert (config.adapter.rank, config.loop.steps, config.data.folder) == (3, 7, Path("from-file"))


@pytest.mark.parametrize("name", ["--loop.batch-size", "--loop.batch_size", "--batch-size", "--batch_size"])
def test_dashes_underscores_and_the_last_part_alone(name: str) -> None:
    assert train("--folder", "x", name, "3").loop.batch_size == 3
    assert train("--folder=x", f"{name}=3").loop.batch_size == 3


def test_a_top_level_name_wins_over_a_nested_one() -> None:
    config = train("--folder", "x", "--seed", "5", "--name", "mine")
    assert (config.seed, config.sample.seed, config.name, config.optimizer.name) == (5, 0, "mine", "adamw")


def test_an_ambiguous_short_name_lists_the_full_ones() -> None:
    with pytest.raises(ConfigError, match=r"--size is short for more than one flag: --left\.size, --right\.size"):
        flags.parse(Both, ["file", "--size", "3"], prog="both")


def test_positional_settings() -> None:
    config = flags.parse(Both, ["file", "--left.size", "3", "--right.flip"], prog="both")
    assert config == Both(source=Path("file"), left=Left(size=3), right=Left(flip=True))


def test_positional_settings_may_stand_between_flags_and_in_the_file(tmp_path: Path) -> None:
    config = flags.parse(ConvertConfig, ["a", "--to", "peft", "b", "--overwrite"], prog="convert")
    assert (config.source, config.destination, config.overwrite) == (Path("a"), Path("b"), True)
    with pytest.raises(ConfigError, match="not given: destination"):
        flags.parse(ConvertConfig, ["a", "--to", "peft"], prog="convert")
    path = tmp_path / "convert.toml"
    path.write_text('source = "a"\ndestination = "b"\nto = "kohya"\n', encoding="utf-8")
    assert flags.parse(ConvertConfig, ["--config", str(path)], prog="convert").destination == Path("b")
    assert flags.parse(ConvertConfig, ["--config", str(path), "c"], prog="convert").source == Path("c")


def test_booleans_have_both_forms(tmp_path: Path) -> None:
    path = tmp_path / "on.toml"
    path.write_text('resume = true\n[data]\nfolder = "x"\nflip = true\n', encoding="utf-8")
    config = train("--config", str(path), "--no-resume", "--no-flip", "--tucker")
    assert (config.resume, config.data.flip, config.adapter.tucker) == (False, False, True)


def test_unknown_flags_are_told_at_once_with_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        train("--foldr", "x", "--adapter.rnk", "3")
    assert "--foldr (did you mean '--folder'" in str(caught.value)
    assert "--adapter.rnk (did you mean '--adapter.rank'" in str(caught.value)


def test_bad_values_are_told_at_once_with_their_paths() -> None:
    with pytest.raises(ConfigError) as caught:
        train("--folder", "x", "--rank", "0", "--alpha", "-1")
    assert "adapter.rank: " in str(caught.value)
    assert "adapter.alpha: " in str(caught.value)


def test_lists_of_a_file_are_replaced_not_extended(file: str, tmp_path: Path) -> None:
    assert train("--config", file, "--prompts", "three").sample.prompts == ("three",)
    path = tmp_path / "generate.toml"
    path.write_text('prompt = ["one"]\nadapter = ["a:1"]\n', encoding="utf-8")
    config = flags.parse(GenerateConfig, ["--config", str(path), "--prompt", "two", "--prompt", "three"], prog="x")
    assert (config.prompt, config.adapter) == (("two", "three"), ("a:1",))


def test_tables_can_be_given_inline(file: str) -> None:
    config = train("--config", file, "--targets", '{pattern = "*.to_k", rank = 4}', "{pattern = 'b'}")
    assert config.adapter.targets == (TargetConfig(pattern="*.to_k", rank=4), TargetConfig(pattern="b"))


@pytest.mark.parametrize("none", ["none", "None"])
def test_none_takes_back_what_the_file_says(file: str, none: str) -> None:
    assert train("--config", file, "--alpha", none).adapter.alpha is None


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "data.folder: required, but not given"),
        (["--folder", "x", "--device", "gpu"], "'gpu'"),
        (["--folder", "x", "--rank", "many"], "adapter.rank: "),
        (["--folder", "x", "--targets", "{pattern"], "inline TOML tables"),
        (["--folder", "x", "stray"], "stray"),
        (["--config"], "--config"),
        (["--folder"], "--data.folder: expected one argument"),
    ],
)
def test_arguments_that_cannot_be_read_are_config_errors(arguments: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        train(*arguments)
    assert told in str(caught.value)


def test_help_shows_the_file_s_values_as_defaults(file: str, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as caught:
        train("--config", file, "--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "ia3 have none. (default: 4)" in text
    assert "(default: from-file)" in text
    assert "(default: None)" not in text


@pytest.mark.parametrize("cls", [TrainConfig, GenerateConfig, ConvertConfig, InspectConfig])
def test_every_setting_is_documented(cls: type[Section]) -> None:
    from vislora.config import toml

    assert [name for name, field in toml.flat(cls) if not field.description] == []
