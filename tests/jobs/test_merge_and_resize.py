"""`vislora merge` and `vislora resize`: whole commands, what they print, what they refuse; images of a merge."""

from __future__ import annotations

import json

import pytest

import vislora
from tests.jobs.test_generate import adapters, made, pixels  # noqa: F401
from vislora import formats
from vislora.cli import main
from vislora.errors import AdapterFileError, AdapterMismatchError, ConfigError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize("to", ["kohya", "diffusers", "peft"])
def test_a_merge_makes_the_image_of_the_stack(to, tmp_path, adapters):  # noqa: F811
    merged = tmp_path / ("merged" if to == "peft" else "merged.safetensors")
    report = vislora.merge([f"{adapters}/sd-a.safetensors:0.8", f"{adapters}/sd-b.safetensors:-0.5"], merged, to=to)
    assert report.error <= 1e-6
    stack = (f"{adapters}/sd-a.safetensors:0.8", f"{adapters}/sd-b.safetensors:-0.5")
    (one,), (other,) = made(tmp_path, adapter=stack), made(tmp_path, adapter=(str(merged),))
    assert abs(pixels(one) - pixels(other)).max() <= 1


def test_the_command_tells_and_reports(tmp_path, adapters, capsys):  # noqa: F811
    output, report = tmp_path / "merged.safetensors", tmp_path / "report.json"
    options = ["--adapters", str(adapters), "--rank", "2", "--report", str(report)]
    assert main(["merge", "sd-a:1", "sd-b:0.5", "-o", str(output), *options]) == 0
    shown = capsys.readouterr()
    assert "merged sd-a:1, sd-b:0.5" in shown.out
    assert "relative error" in shown.out
    found = json.loads(report.read_text())
    assert found["strengths"] == {"sd-a": 1.0, "sd-b": 0.5}
    assert {module["rank"] for module in found["modules"]} == {2}
    assert 0 < found["error"] < 1
    assert all(module.rank == 2 for module in formats.load(output).modules)


def test_order_does_not_matter(tmp_path, adapters):  # noqa: F811
    names = [
        f"{adapters}/sd-{letter}.safetensors:{strength}" for letter, strength in zip("abc", (1, 0.3, -2), strict=True)
    ]
    paths = [tmp_path / f"{number}.safetensors" for number in range(2)]
    vislora.merge(names, paths[0])
    vislora.merge(names[::-1], paths[1])
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_strengths_by_component_and_block(tmp_path, adapters):  # noqa: F811
    table = {"adapter": f"{adapters}/sd-a.safetensors", "components": {"te": 0}, "layers": {"mid_block": 0.5}}
    vislora.merge([], tmp_path / "a.safetensors", stack=[table])
    whole, part = formats.load(table["adapter"]), formats.load(tmp_path / "a.safetensors")
    assert {module.component for module in part.modules} == {"denoiser"}
    for module in part.modules:
        factor = 0.5 if module.path.startswith("mid_block") else 1.0
        source = whole.find(module.path)
        assert (module.direction() - factor * source.direction()).norm() <= 1e-7 * source.direction().norm()


@pytest.mark.parametrize(
    ("given", "settings", "kind", "message"),
    [
        (["sd-a", "sd3-a"], {}, AdapterMismatchError, "several model families"),
        (["sd-a", "sd-a:2"], {}, ConfigError, "more than once"),
        (["sd-a", "sd-x"], {}, ConfigError, "no adapter 'sd-x'"),
        (["sd-a:nan"], {}, ConfigError, "finite"),
        (["sd-a"], {"method": "tie"}, ConfigError, "method"),
        (["sd-a", "sd-b"], {"method": "ties"}, AdapterFileError, "rank or energy"),
        (["sd-a"], {"to": "peft"}, AdapterFileError, "is a folder"),
        ([], {}, ConfigError, "an adapter to merge"),
        ([], {"stack": [{"adapter": "sd-a", "steps": [0, 0.5]}]}, ConfigError, "no adapter file can have"),
        ([], {"stack": [{"adapter": "sd-a", "layers": {"no.such": 0}}]}, ConfigError, "matches no layer"),
    ],
)
def test_what_cannot_be_merged_writes_nothing(given, settings, kind, message, tmp_path, adapters):  # noqa: F811
    with pytest.raises(kind, match=message):
        vislora.merge(given, tmp_path / "out" / "m.safetensors", adapters=(adapters,), **settings)
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists_or_is_a_source_stays(tmp_path, adapters):  # noqa: F811
    (tmp_path / "m.safetensors").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="exists"):
        vislora.merge([f"{adapters}/sd-a.safetensors"], tmp_path / "m.safetensors")
    assert (tmp_path / "m.safetensors").read_bytes() == b"mine"
    with pytest.raises(ConfigError, match="is one of the adapters"):
        vislora.merge([f"{adapters}/sd-a.safetensors"], adapters / "sd-a.safetensors", overwrite=True)
    with pytest.raises(ConfigError, match="is the source itself"):
        vislora.resize(adapters / "sd-a.safetensors", adapters / "sd-a.safetensors", rank=1, overwrite=True)


def test_resize(tmp_path, adapters, capsys):  # noqa: F811
    output, report = tmp_path / "small.safetensors", tmp_path / "report.json"
    source = adapters / "sd-a.safetensors"
    assert main(["resize", str(source), str(output), "--rank", "1", "--report", str(report)]) == 0
    assert "now of rank 1" in capsys.readouterr().out
    assert all(module.rank == 1 for module in formats.load(output).modules)
    assert output.stat().st_size < source.stat().st_size
    assert 0 < json.loads(report.read_text())["error"] < 1
    with pytest.raises(ConfigError, match="say how small"):
        vislora.resize(source, tmp_path / "x.safetensors")
