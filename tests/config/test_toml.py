from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator

from vislora.config import toml
from vislora.config.base import Section
from vislora.config.convert import ConvertConfig
from vislora.config.generate import GenerateConfig
from vislora.config.inspect import InspectConfig
from vislora.config.train import AdapterConfig, TargetConfig, TrainConfig
from vislora.errors import ConfigError

TRAIN = TrainConfig.of({"data": {"folder": "images"}})


class Pair(Section):
    """Two settings with a rule over both."""

    low: int = Field(0, ge=0)
    high: int = 10

    @model_validator(mode="after")
    def _ordered(self) -> Pair:
        if self.low > self.high:
            raise ValueError("low is above high")
        return self


class Outer(Section):
    """A section with a section."""

    pair: Pair = Pair()


def write(folder: Path, text: str) -> Path:
    path = folder / "settings.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_word_that_is_none_of_the_known_ones_is_told_with_the_nearest():
    with pytest.raises(ConfigError, match=r"init: .*\(got 'kaimin'\) \(did you mean 'kaiming'\?\)"):
        AdapterConfig.of({"init": "kaimin"})


@pytest.mark.parametrize(
    "config",
    [
        TRAIN,
        TRAIN.model_copy(update={"output": Path("runs/mit Leerzeichen/ü"), "name": 'a "quoted" \\ name\nof two lines'}),
        TRAIN.model_copy(
            update={
                "adapter": AdapterConfig(
                    rank=4, targets=(TargetConfig(pattern="re:a.*", rank=2), TargetConfig(pattern="*.to_k"))
                )
            }
        ),
        TRAIN.model_copy(update={"loop": TRAIN.loop.model_copy(update={"min_snr_gamma": None})}),
        GenerateConfig(),
        ConvertConfig(source=Path("a b.safetensors"), destination=Path("c"), to="peft", family="sd3"),
        InspectConfig(path=Path("a"), json=True),
        GenerateConfig(prompt=("a", "b, c"), adapter=("x:0.5",), guidance_scale=7, seed=2**62, like=Path("x.png")),
    ],
)
def test_what_is_dumped_loads_as_the_same_settings(config, tmp_path) -> None:
    text = toml.dump(config)
    assert toml.loads(text, type(config)) == config
    assert toml.load(write(tmp_path, text), type(config)) == config


@given(text=st.text(st.characters(codec="utf-8"), max_size=20), number=st.floats(1e-30, 10.0))
def test_any_text_and_number_survive(text: str, number: float) -> None:
    optimizer = TRAIN.optimizer.model_copy(update={"learning_rate": number})
    config = TRAIN.model_copy(update={"optimizer": optimizer, "name": text})
    assert toml.loads(toml.dump(config), TrainConfig) == config


def test_none_is_written_only_where_leaving_out_means_something_else() -> None:
    off = TRAIN.model_copy(update={"loop": TRAIN.loop.model_copy(update={"min_snr_gamma": None})})
    assert 'min_snr_gamma = "none"' in toml.dump(off)
    assert toml.dump(TRAIN).count('"none"') == 0


def test_a_preset_named_none_stays_a_name() -> None:
    config = TRAIN.model_copy(update={"adapter": AdapterConfig(preset="none")})
    assert toml.loads(toml.dump(config), TrainConfig).adapter.preset == "none"


def test_all_problems_are_told_at_once_with_paths_and_nearest_names(tmp_path) -> None:
    path = write(
        tmp_path,
        'outptu = "x"\nsample = 3\n[data]\nfoldr = "y"\nresolution = "big"\n[[adapter.targets]]\npatern = "*"\n',
    )
    with pytest.raises(ConfigError) as caught:
        toml.read(path, TrainConfig)
    told = str(caught.value)
    assert told.startswith(f"{path}: 5 problem(s)")
    assert "outptu: unknown setting (did you mean 'output'?)" in told
    assert "data.foldr: unknown setting (did you mean 'folder'?)" in told
    assert "adapter.targets.0.patern: unknown setting (did you mean 'pattern'?)" in told
    assert "data.resolution: " in told
    assert "sample: " in told


def test_what_flags_may_still_mend_is_no_problem_of_the_file(tmp_path) -> None:
    assert toml.read(write(tmp_path, "[adapter]\nrank = 2\n"), TrainConfig) == {"adapter": {"rank": 2}}
    assert toml.read(write(tmp_path, "pair.low = 20\n"), Outer) == {"pair": {"low": 20}}
    with pytest.raises(ConfigError, match="low is above high"):
        Outer.of({"pair": {"low": 20}})


def test_broken_syntax_names_file_and_line(tmp_path) -> None:
    path = write(tmp_path, "seed = 1\nseed = = 2\n")
    with pytest.raises(ConfigError, match=r"settings\.toml is not valid TOML: .*line 2"):
        toml.load(path, TrainConfig)


def test_a_missing_file_names_its_neighbour(tmp_path) -> None:
    write(tmp_path, "")
    with pytest.raises(ConfigError, match=r"no such config file: .*setings\.toml \(did you mean 'settings\.toml'\?\)"):
        toml.load(tmp_path / "setings.toml", TrainConfig)
    with pytest.raises(ConfigError, match="no such config file"):
        toml.load(tmp_path / "no" / "such.toml", TrainConfig)


def test_unreadable_files_are_config_errors(tmp_path) -> None:
    with pytest.raises(ConfigError, match="cannot read the config file"):
        toml.load(tmp_path, TrainConfig)
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"\n')
    with pytest.raises(ConfigError, match="cannot read the config file"):
        toml.load(tmp_path / "latin.toml", TrainConfig)


def test_a_byte_order_mark_is_no_syntax_error(tmp_path) -> None:
    path = tmp_path / "bom.toml"
    path.write_bytes(b'\xef\xbb\xbf[data]\nfolder = "x"\n')
    assert toml.load(path, TrainConfig).data.folder == Path("x")
