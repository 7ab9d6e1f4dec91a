"""The rules that keep the project readable: direction of imports, sizes, laziness, names that resolve."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from vislora.registry import ALGORITHMS, FAMILIES, FORMATS

ROOT = Path(__file__).parents[1]
SOURCES = [path for folder in ("vislora", "train_scripts", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BLOCKS = (ast.For, ast.AsyncFor, ast.While, ast.If, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match)
HEAVY = ("torch", "numpy", "PIL", "diffusers", "transformers")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def depth(node: ast.AST) -> int:
    """Count the blocks inside each other; inner functions count for themselves, `elif` is no deeper than its `if`."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FUNCTIONS):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and [child] == node.orelse
        deepest = max(deepest, depth(child) + (isinstance(child, BLOCKS) and not is_elif))
    return deepest


def test_imports_go_downwards() -> None:
    command = shutil.which("lint-imports", path=str(Path(sys.executable).parent)) or shutil.which("lint-imports")
    if command is None:
        pytest.skip("import-linter is not installed (extra `dev`)")
    done = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_functions_and_nesting_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    problems = [f"{len(text.splitlines())} lines"] if len(text.splitlines()) > 400 else []
    problems += size_problems(ast.parse(text))
    assert problems == []


def test_no_two_test_files_share_a_name() -> None:
    """pytest imports a test file by its bare name, so a second one of that name cannot be collected."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py")
    assert [name for name, count in names.items() if count > 1] == []


def size_problems(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > 60:
                yield f"{node.name}: {lines} lines"
            if depth(node) > 3:
                yield f"{node.name}: nested {depth(node)} deep"


@pytest.mark.parametrize("module", ["vislora", "vislora.cli", "vislora.config.train", "vislora.registry"])
def test_heavy_libraries_wait_for_their_first_use(module: str) -> None:
    script = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("registry", [ALGORITHMS, FORMATS, FAMILIES], ids=lambda registry: registry.kind)
def test_every_registered_name_resolves(registry) -> None:
    for name in registry:
        assert registry[name] is not None


def test_every_public_name_and_job_resolves() -> None:
    import vislora
    from vislora.cli import JOBS, _attribute

    for name in vislora.__all__:
        assert getattr(vislora, name) is not None
    for job in JOBS.values():
        assert callable(_attribute(job.config))
        assert callable(_attribute(job.run))
