"""What merging methods lose, and what resizing and merging cost on an adapter of full size.

Run: python benchmarks/merge.py [--megabytes N] [--listing FILE] [--report FILE]
--listing: {"keys": {key: shape}} of a kohya file; without it, one for SD 1.5 is made. The time is that of the whole
command in a process of its own; the peer is one SVD of each full change (`torch.linalg.svd`, float32), of 8 modules,
scaled up to all by the numbers in them.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from convert import make_source, sd15_shapes

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "samples" / "adapters"
METHODS = {"sum": (None, 8), "orthogonal": (None,), "magnitude": (8,), "ties": (8,), "dare": (8,)}


def errors(folder: Path) -> list[str]:
    """Return table rows: the relative error of each method on the sample adapters."""
    import vislora

    rows = []
    for method, ranks in METHODS.items():
        for rank in ranks:
            pair = (f"{SAMPLES}/ink.safetensors:0.8", f"{SAMPLES}/outline:0.5")
            report = vislora.merge(pair, folder / "m.safetensors", method=method, rank=rank, overwrite=True)
            rows.append(f"| {method} | {max(module.rank for module in report.modules)} | {report.error:.3f} |")
    return rows


def command(*arguments: str | Path) -> str:
    """Run vislora in a process of its own; return its seconds and memory as table cells."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "vislora", *map(str, arguments)], check=True, cwd=ROOT, capture_output=True)
    seconds = time.perf_counter() - began
    return f"{seconds:.1f} | {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024:.0f}"


def full_svd_seconds(source: Path, count: int = 8) -> float:
    """Return how long the SVDs of all full changes would take, from `count` modules evenly spread."""
    import torch

    from vislora import formats

    modules = sorted(formats.load(source).modules, key=lambda module: module.shape)
    shapes = [module.direction().flatten(1).shape for module in modules]
    work = [out * inside * min(out, inside) for out, inside in shapes]
    spent, done = 0.0, 0
    for index in torch.linspace(0, len(modules) - 1, count).long().tolist():
        matrix = modules[index].direction().flatten(1).float()
        began = time.perf_counter()
        torch.linalg.svd(matrix, full_matrices=False)
        spent, done = spent + time.perf_counter() - began, done + work[index]
    return spent * sum(work) / done


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--listing", type=Path)
    parser.add_argument("--report", type=Path)
    given = parser.parse_args()
    shapes = json.loads(given.listing.read_text())["keys"] if given.listing else sd15_shapes()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        rows = errors(folder)
        source = folder / "source.safetensors"
        size = make_source({key: tuple(shape) for key, shape in shapes.items()}, given.megabytes << 20, source)
        small = command("resize", source, folder / "small.safetensors", "--rank", "8")
        both = command(
            "merge", f"{source}:0.8", f"{folder / 'small.safetensors'}:0.5", "-o", folder / "both.safetensors"
        )
        peer = full_svd_seconds(source)
    lines = [
        f"{datetime.now(UTC):%Y-%m-%d}, {size / 1e6:.0f} MB, fp16",
        "",
        "| method | rank | relative error against the sum |",
        "|---|---|---|",
        *rows,
        "",
        "| command | seconds | peak MB |",
        "|---|---|---|",
        f"| resize to rank 8 | {small} |",
        f"| merge with that | {both} |",
        f"| peer: one SVD of every full change | {peer:.0f} | - |",
    ]
    print("\n".join(lines))
    if given.report:
        given.report.write_text("# Merging and resizing\n\n" + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
