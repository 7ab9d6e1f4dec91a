"""An algorithm of another package: the page's own example, installed, trained, saved, read and put to the tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vislora import formats
from vislora.errors import AdapterFileError, ConfigError
from vislora.formats.slots import foreign
from vislora.registry import ALGORITHMS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "algorithms.md").read_text()
SCRIPT = """
import sys
from pathlib import Path
import torch, vislora
from tests import tiny
from tests.jobs.train_helpers import trained
from vislora import formats
from vislora.jobs.convert import convert

out = Path(sys.argv[1])
value, _ = trained(out, "sd", adapter__algorithm="hira", adapter__alpha=1.0, loop__steps=2)
read = formats.load(value.path)
assert {item.algo for item in read.modules} == {"hira"}
assert {item.scale for item in read.modules} == {0.5}
unet = tiny.model("unet")
for item in read.modules:
    base = unet.get_submodule(item.path).weight.detach()
    product = item.tensors["hira_b"].double() @ item.tensors["hira_a"].double()
    torch.testing.assert_close(read.delta(item, base), 0.5 * base.double() * product.reshape(base.shape))
inputs = tiny.MODELS["unet"][1]()
before = unet(**inputs)[0]
vislora.load(unet, value.path)
assert not torch.equal(unet(**inputs)[0], before)
vislora.eject(unet)
assert torch.equal(unet(**inputs)[0], before)
report = convert(value.path, out / "again.safetensors", to="kohya")
assert report.verdict.startswith("proven"), report.verdict
again, _ = trained(out, "sd", output=out / "on", adapter={"begin": value.path}, loop__steps=1)
assert {item.algo for item in formats.load(again.path).modules} == {"hira"}
print(value.path)
"""


def installed(folder: Path, entry: str = "hira = hira:HIRA", code: str | None = None) -> dict[str, str]:
    """Put the package of the page into `folder`; return an environment that has it."""
    about = folder / "hira-0.1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: hira\nVersion: 0.1\n")
    (about / "entry_points.txt").write_text(f"[vislora.algorithms]\n{entry}\n")
    (folder / "hira.py").write_text(code or re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0])
    return {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def python(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_it_is_trained_read_and_converted_like_any_other(tmp_path):
    env = installed(tmp_path / "packages")
    done = python(env, "-c", SCRIPT, str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr[-3000:]
    path = done.stdout.split()[-1]
    shown = python(env, "-m", "vislora", "inspect", path)
    assert "hira" in shown.stdout
    with pytest.raises(AdapterFileError, match="hira_a"):
        formats.load(path)


@pytest.mark.slow
def test_the_contract_is_put_to_it(tmp_path):
    command = PAGE.split("python -m pytest -q ")[-1].split("\n")[0].split()
    done = python(installed(tmp_path), "-m", "pytest", "-p", "no:cacheprovider", *command)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 50


BROKEN = {
    "a name that is taken": ("lora = hira:HIRA", "", "algorithm 'lora' of hira:HIRA has a name that is taken"),
    "nothing there": ("hira = hira:NOTHING", "", "algorithm 'hira' cannot be had from hira:NOTHING"),
    "another name": ("hirra = hira:HIRA", "", "algorithm 'hirra' calls itself 'hira'"),
    "a slot that is taken": ("hira = hira:HIRA", "hira_a=diff", "its slot 'diff' is another kind's"),
}


@pytest.fixture
def anew():
    """Have this process look for other packages, and forget them afterwards."""

    def forget():
        foreign.cache_clear()
        ALGORITHMS.__dict__.pop("others", None)
        ALGORITHMS._parts.pop("hira", None)
        ALGORITHMS._parts.pop("hirra", None)
        sys.modules.pop("hira", None)

    forget()
    yield
    forget()


@pytest.mark.parametrize("what", BROKEN)
def test_a_package_that_is_wrong_is_named(what, tmp_path, monkeypatch, anew):
    entry, change, reason = BROKEN[what]
    old, _, new = change.partition("=")
    code = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]
    installed(tmp_path, entry, code.replace(old, new) if old else code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=reason):
        foreign()
