"""The command line as a user meets it: help, errors, exit codes, what goes to which stream."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from vislora import __version__, cli, console
from vislora.bars import BarView
from vislora.config.base import Section
from vislora.errors import ConfigError
from vislora.records import Done, Note, Progress, Record

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "numpy", "PIL", "diffusers", "transformers", "accelerate", "safetensors")
PARSER = ("argparse", "pydantic", "rich")

SPY = """
import sys
from vislora.cli import main
try:
    code = main(sys.argv[2:])
except SystemExit as stop:
    code = stop.code
print("LOADED", [name for name in sys.argv[1].split(",") if name in sys.modules], code, file=sys.stderr)
"""


class Toy(Section):
    """A job for these tests."""

    words: tuple[str, ...] = ()
    """What to say."""
    fail: str = ""
    """How to fail."""


FAILURES = {"config": ConfigError(["a: one", "b: two"], where="toy"), "stop": KeyboardInterrupt(), "bug": KeyError("x")}


def toy(config: Toy) -> Iterator[Record]:
    for word in config.words:
        yield Note(word)
    if config.fail:
        raise FAILURES[config.fail]
    yield Progress("saying", 1, 1, {"loss": 0.123456, "rate": "slow"})
    yield Done(None, summary="said", exit_code=3 if "three" in config.words else 0)


@pytest.fixture
def toy_job(monkeypatch) -> None:
    monkeypatch.setitem(cli.JOBS, "toy", cli.Job("say words", "tests.test_cli:Toy", "tests.test_cli:toy"))


def vislora(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vislora", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",), ("--version",)])
def test_the_first_help_page_loads_no_library_at_all(arguments: tuple[str, ...]) -> None:
    names = ",".join((*HEAVY, *PARSER))
    command = [sys.executable, "-c", SPY, names, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "LOADED [] 0"
    assert done.stdout


@pytest.mark.parametrize("job", list(cli.JOBS))
@pytest.mark.parametrize("arguments", [("--help",), ("--no-such-flag",)])
def test_help_and_wrong_flags_of_a_job_load_nothing_heavy(job: str, arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "-c", SPY, ",".join(HEAVY), job, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    expected = 0 if arguments == ("--help",) else 2
    assert done.stderr.strip().endswith(f"LOADED [] {expected}")
    assert "Traceback" not in done.stderr


def test_help_lists_every_job_and_version_is_one_line(capsys) -> None:
    assert cli.main([]) == 0
    told = capsys.readouterr().out
    for name, job in cli.JOBS.items():
        assert name in told
        assert job.about in told
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"vislora {__version__}\n"


def test_python_dash_m_runs_it_and_exits_with_its_code() -> None:
    done = vislora("trian")
    assert done.returncode == 2
    assert done.stderr == "error: unknown job 'trian' (did you mean 'train'?); jobs: " + ", ".join(cli.JOBS) + "\n"
    assert done.stdout == ""


def test_a_job_runs_and_its_streams_are_apart(toy_job, capsys) -> None:
    assert cli.main(["toy", "--words", "one", "[two]"]) == 0
    told = capsys.readouterr()
    assert told.out == "said\n"
    assert told.err.splitlines() == ["one", "[two]", "saying 1/1  loss 0.1235  rate slow  0:00"]


def test_the_exit_code_is_the_job_s(toy_job) -> None:
    assert cli.main(["toy", "--words", "three"]) == 3


def test_errors_of_the_user_are_one_block_and_exit_two(toy_job, capsys) -> None:
    assert cli.main(["toy", "--fail", "config"]) == 2
    assert capsys.readouterr().err == "error: toy\n  a: one\n  b: two\n"
    assert cli.main(["toy", "--wrds", "x"]) == 2
    assert "unknown flag --wrds (did you mean '--words'?)" in capsys.readouterr().err


def test_interrupts_exit_130_and_bugs_keep_their_traceback(toy_job, capsys) -> None:
    assert cli.main(["toy", "--fail", "stop"]) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
    with pytest.raises(KeyError):
        cli.main(["toy", "--fail", "bug"])


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f'"{sys.executable}" -m vislora train --help | true; echo "${{PIPESTATUS[0]}}"'
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.strip() in ("0", "141")


def test_plain_lines_come_now_and_then_and_at_the_end(monkeypatch, capsys) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(console.time, "monotonic", lambda: float(next(clock)))
    records = [*(Progress("train", step, 40) for step in range(41)), Progress("save", 1, 2), Done(None)]
    assert console.show(records) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("train")][-1] == "40/40"
    assert 3 <= len(lines) <= 7
    assert lines[-1].startswith("save 1/2")


def test_a_broken_off_job_leaves_its_last_state(capsys) -> None:
    def breaks() -> Iterator[Record]:
        yield Progress("train", 1, 9)
        raise ConfigError("no")

    with pytest.raises(ConfigError):
        console.show(breaks())
    assert capsys.readouterr().err.startswith("train 1/9")


def test_a_terminal_gets_bars_and_notes_above_them() -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    with BarView(terminal) as screen:
        screen.progress(Progress("train [x]", 1, 4, {"loss": 0.5}))
        screen.note(Note("look [here]", "warning"))
        screen.progress(Progress("train [x]", 4, 4, {"loss": 0.25}))
        screen.progress(Progress("save", 1, 1))
    told = terminal.file.getvalue()
    assert "train [x]" in told
    assert "4/4" in told
    assert "loss 0.25" in told
    assert "warning: look [here]" in told


def test_a_job_that_reports_nothing_on_the_way_needs_no_rich() -> None:
    script = "import sys; from vislora import console; from vislora.records import Done; console.show([Done(1, 'x')])"
    done = subprocess.run(
        [sys.executable, "-c", f"{script}; print('rich' in sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "x\nFalse\n"


def test_only_the_first_of_several_processes_speaks(monkeypatch, capsys) -> None:
    monkeypatch.setenv("RANK", "1")
    assert console.show([Note("a"), Progress("b", 1, 1), Done(None, "c", 4)]) == 4
    assert capsys.readouterr() == ("", "")
