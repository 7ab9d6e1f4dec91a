"""CPU time of help pages and of reading an adapter's header, against `import torch`, interleaved (bar: 0.15).

Run: python benchmarks/startup.py [ROUNDS]
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

ADAPTER = Path(__file__).resolve().parent.parent / "samples" / "adapters" / "ink.safetensors"
COMMANDS = {
    "import torch": ["-c", "import torch"],
    "vislora --help": ["-m", "vislora", "--help"],
    "vislora train --help": ["-m", "vislora", "train", "--help"],
    "vislora inspect": ["-m", "vislora", "inspect", str(ADAPTER)],
}


def cpu_seconds(arguments: list[str]) -> float:
    """Run python with `arguments` and return the user and system time of the process."""
    before = os.times()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main(rounds: int) -> None:
    """Print min, median and max of each command's ratio to `import torch`, pair by pair."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds + 1):
        for name, arguments in COMMANDS.items():
            times[name].append(cpu_seconds(arguments))
    torch = times["import torch"][1:]
    print(f"import torch: {statistics.median(torch):.2f} s CPU (median of {rounds}; the first round is a warm-up)")
    for name, seconds in times.items():
        ratios = sorted(mine / other for mine, other in zip(seconds[1:], torch, strict=True))
        if name != "import torch":
            middle = statistics.median(ratios)
            own = statistics.median(seconds[1:])
            print(f"{name}: {own:.2f} s, ratio {ratios[0]:.3f}-{middle:.3f}-{ratios[-1]:.3f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
