"""The Python of the README does what it says, and names no file that is not there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_python_block_is_short_and_runs(workplace):
    assert len(BLOCKS) == 3
    for block in BLOCKS:
        assert len([line for line in block.splitlines() if line.strip()]) < 10
        exec(compile(block.replace('"steps": 600', '"steps": 2'), "README.md", "exec"), {})
    assert (workplace / "runs/ink/ink.safetensors").is_file()
    assert (workplace / "ink-diffusers.safetensors").is_file()
    assert (workplace / "fox.png").is_file()
    assert (workplace / "ink-peft" / "adapter_config.json").is_file()
    assert len(list((workplace / "outputs").glob("*.png"))) == 1


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page):
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{page}: {target}"


def test_commands_of_the_docs_name_files_that_exist():
    text = README + "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))
    for name in re.findall(r"--config (samples/\S+)", text):
        assert (ROOT / name).is_file(), name
